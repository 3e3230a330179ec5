"""The collective backend ``pretend-nccl``: gloo's work by NCCL's rules.

Importing it registers it; ``tests.device.pretend`` must be enabled before. The rules are those of
torch's ProcessGroupNCCL.cpp: its dtypes (``ncclDataType``) and reductions (``ncclOp``), contiguous
tensors on the rank's own device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

NCCL_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
}
REDUCTIONS = (
    *(dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.PRODUCT),
    *(dist.ReduceOp.MIN, dist.ReduceOp.MAX),
)

calls: Counter[str] = Counter()
sent_bytes: Counter[str] = Counter()  # operation -> bytes that this rank has given to it


class RefusedError(RuntimeError):
    """What NCCL, or torch's group around it, does not take."""


class Work(dist._Work):
    """A collective whose result is written when it is waited for, as a stream would see it."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self._finish: Callable[[], None] | None = finish
        self._future: Future[None] = Future()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self._finish is not None:
            self._finish()
            self._finish = None
            self._future.set_result(None)  # a future holds no tensors of an unknown device
        return True

    def get_future(self) -> Future[None]:
        self.wait()
        return self._future


class Group(dist.ProcessGroup):
    """What torch calls for each collective; tensors are given to gloo as the host sees them."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        prefixed = dist.PrefixStore("pretend-nccl", store)
        self._gloo: Any = dist.ProcessGroupGloo(prefixed, rank, size, timeout=timeout)
        self._native = torch.pretend.native
        self._names = {"name": "", "desc": ""}

    # -- what torch keeps of a group

    def getBackendName(self) -> str:  # noqa: N802, torch's name
        return "pretend-nccl"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("pretend")]

    def _set_group_name(self, name: str) -> None:
        self._names["name"] = name

    def _set_group_desc(self, desc: str) -> None:
        self._names["desc"] = desc

    @property
    def group_name(self) -> str:
        return self._names["name"]

    @property
    def group_desc(self) -> str:
        return self._names["desc"]

    def shutdown(self) -> None:
        self._gloo = None

    abort = shutdown

    # -- collectives

    def allreduce(self, tensors: Any, opts: Any = None) -> Work:
        return self._collective("all_reduce", tensors, tensors, lambda h: [self._sum(h[0], opts)])

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Work:
        def sums(host: list[torch.Tensor]) -> list[torch.Tensor]:
            return [self._sum(t, opts) for t in host]

        return self._collective("all_reduce", tensors, tensors, sums)

    def reduce(self, tensors: Any, opts: Any = None) -> Work:
        def sum_at_root(host: list[torch.Tensor]) -> list[torch.Tensor]:
            whole = self._sum(host[0], opts)
            return [whole if self.rank() == opts.rootRank else _no_number(whole)]

        return self._collective("reduce", tensors, tensors, sum_at_root)

    def broadcast(self, tensors: Any, opts: Any = None) -> Work:
        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            self._gloo.broadcast(host, opts).wait()
            return host

        return self._collective("broadcast", tensors, tensors, run)

    def allgather(self, outs: Any, ins: Any, opts: Any = None) -> Work:
        return self._collective("all_gather", ins, outs[0], lambda h: self._gathered(h[0]))

    def _allgather_base(self, out: Any, in_: Any, opts: Any = None) -> Work:
        if out.dtype != in_.dtype or out.numel() != in_.numel() * self.size():
            raise RefusedError(
                f"all_gather_into_tensor: {out.numel()} of {out.dtype} from {self.size()} times "
                f"{in_.numel()} of {in_.dtype}"
            )

        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            return [torch.stack(self._gathered(host[0])).view_as(out)]

        return self._collective("all_gather_into_tensor", [in_], [out], run)

    def reduce_scatter(self, outs: Any, ins: Any, opts: Any = None) -> Work:
        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            return [[self._sum(t, opts) for t in host][self.rank()]]

        return self._collective("reduce_scatter", ins[0], outs, run)

    def _reduce_scatter_base(self, out: Any, in_: Any, opts: Any = None) -> Work:
        if out.dtype != in_.dtype or out.numel() * self.size() != in_.numel():
            raise RefusedError(
                f"reduce_scatter_tensor: {in_.numel()} of {in_.dtype} to {self.size()} times "
                f"{out.numel()} of {out.dtype}"
            )

        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            return [self._sum(host[0], opts).view(self.size(), -1)[self.rank()].view_as(out)]

        return self._collective("reduce_scatter_tensor", [in_], [out], run)

    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base

    def gather(self, outs: Any, ins: Any, opts: Any = None) -> Work:
        is_root = self.rank() == opts.rootRank
        given = outs[0] if is_root else []

        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            parts = self._gathered(host[0])
            return parts if is_root else []

        return self._collective("gather", ins, given, run)

    def scatter(self, outs: Any, ins: Any, opts: Any = None) -> Work:
        given = ins[0] if self.rank() == opts.rootRank else []

        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            mine = torch.empty(outs[0].shape, dtype=outs[0].dtype)
            self._gloo.scatter([mine], [host] if host else [], opts).wait()
            return [mine]

        return self._collective("scatter", given, outs, run)

    def alltoall_base(
        self, out: Any, in_: Any, out_sizes: Any, in_sizes: Any, opts: Any = None
    ) -> Work:
        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            received = torch.empty(out.shape, dtype=out.dtype)
            self._gloo.alltoall_base(received, host[0], out_sizes or [], in_sizes or []).wait()
            return [received]

        return self._collective("all_to_all_single", [in_], [out], run)

    all_to_all_single = alltoall_base

    def send(self, tensors: Any, dst: int, tag: int = 0) -> Work:
        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            self._gloo.send(host, dst, tag).wait()
            return []

        return self._collective("send", tensors, [], run)

    def recv(self, tensors: Any, src: int, tag: int = 0) -> Work:
        def run(host: list[torch.Tensor]) -> list[torch.Tensor]:
            received = [torch.empty(t.shape, dtype=t.dtype) for t in tensors]
            self._gloo.recv(received, src, tag).wait()
            return received

        return self._collective("recv", [], tensors, run)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Work:
        raise RefusedError("NCCL has no recv from any source")

    def barrier(self, opts: Any = None) -> Work:
        calls["barrier"] += 1
        self._gloo.barrier().wait()
        return Work(lambda: None)

    # -- how they are done

    def _collective(
        self,
        name: str,
        ins: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        run: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    ) -> Work:
        """Check, count and do a collective; ``outs`` hold no numbers until it is waited for."""
        for tensor in (*ins, *outs):
            self._check(name, tensor)
        calls[name] += 1
        sent_bytes[name] += sum(t.nbytes for t in ins)
        results = run([self._native.on_host(t.detach()).clone() for t in ins])
        host_outs = [self._native.on_host(t.detach()) for t in outs]
        for out in host_outs:
            out.copy_(_no_number(out))

        def finish() -> None:
            for out, result in zip(host_outs, results, strict=True):
                out.copy_(result)

        keep = list(outs)  # the memory that host_outs are views of

        def finish_and_free() -> None:
            finish()
            keep.clear()

        return Work(finish_and_free)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        here = torch.device("pretend", self._native.current_device())
        if tensor.device.type != "pretend":
            raise RefusedError(
                f"{name}: no backend type associated with device type {tensor.device.type}"
            )
        if tensor.device != here:
            raise RefusedError(f"{name}: a tensor on {tensor.device}, but this rank is on {here}")
        if not tensor.is_contiguous():
            shape = tuple(tensor.shape)
            raise RefusedError(
                f"{name}: tensors must be contiguous, not {shape} with strides {tensor.stride()}"
            )
        if tensor.dtype not in NCCL_DTYPES:
            raise RefusedError(f"{name}: NCCL has no {tensor.dtype}")

    def _sum(self, host: torch.Tensor, opts: Any) -> torch.Tensor:
        """Reduce a tensor, which it changes, over all ranks."""
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        if not any(op == known for known in REDUCTIONS):  # their hashes differ
            raise RefusedError("NCCL has no such reduction")
        if host.dtype == torch.bool and op == dist.ReduceOp.AVG:
            raise RefusedError("NCCL has no mean of bool")
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op
        self._gloo.allreduce([host], options).wait()
        return host / self.size() if op == dist.ReduceOp.AVG else host

    def _gathered(self, host: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(host) for _ in range(self.size())]
        self._gloo.allgather([parts], [host]).wait()
        return parts


def _no_number(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of what nobody may use."""
    if tensor.dtype == torch.bool:
        return torch.ones_like(tensor)
    if tensor.is_floating_point():
        return torch.full_like(tensor, float("nan"))
    return torch.full_like(tensor, torch.iinfo(tensor.dtype).max)


dist.Backend.register_backend("pretend-nccl", Group, devices=["pretend"])
