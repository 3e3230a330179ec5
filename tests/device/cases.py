"""What ranks do on the device ``pretend``, which each starts first; see tests/runs.py."""

from __future__ import annotations

import gc
import importlib
import json
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def start() -> None:
    """Make ``pretend`` this process's device, one of as many as there are ranks."""
    from deepspeed.accelerator import set_accelerator

    from tests.device import pretend
    from tests.device.accelerator import PretendAccelerator

    device = pretend.enable()
    device.native.set_count(int(os.environ.get("LOCAL_SIZE", 1)))
    set_accelerator(PretendAccelerator(device))
    importlib.import_module("tests.device.backend")
    # bitsandbytes' kernels for all devices would be compiled, for minutes.
    torch.compiler.set_stance("force_eager")


def build() -> None:
    from tests.device import pretend

    pretend.load()


def worker(worker: str, options: Sequence[str]) -> None:
    """`launcher/train.py OPTIONS` or another worker, as ``tests.fork_server.run_worker`` does."""
    from tests.fork_server import run_worker

    start()
    run_worker(worker, options)


def runs(configs: Mapping[str, Mapping[str, Any]], out: str, on_device: bool = True) -> None:
    """Whole runs one after the other, in one process group; one that fails does not end the others.

    Args:
        configs: name -> the run's options; "zero_optimization" is added to its ds_config's.
        out: a folder for NAME.RANK.json: what went wrong, if anything, and what was counted.
        on_device: on ``pretend``, or else on the CPU.
    """
    if on_device:
        start()
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.system.signals import StopRequest
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import run_training

    zero.init_process_group()
    for name, config in configs.items():
        options, problem = dict(config), None
        section = options.pop("zero_optimization", {})
        if on_device:
            reset_counts()
        try:
            run = prepare(load_run_config(options), zero.world_size())
            run.ds_config["zero_optimization"] |= section
            assert run_training(run, StopRequest()) == "finished"
        except Exception:
            problem = traceback.format_exc()
        found = {"problem": problem} | (counts() if on_device else {})
        Path(f"{out}/{name}.{dist.get_rank()}.json").write_text(json.dumps(found))
        gc.collect()  # the engine's hooks make cycles


def reset_counts() -> None:
    from tests.device import backend, pretend

    for counter in (pretend.host_waits, backend.calls, backend.sent_bytes):
        counter.clear()
    torch.pretend.native.reset_pinned_peak()


def counts() -> dict[str, Any]:
    """What this rank's device and backend have counted since ``reset_counts``."""
    from tests.device import backend, pretend

    return {
        "waits": [[why, where, n] for (why, where), n in pretend.host_waits.items()],
        "calls": dict(backend.calls),
        "sent_bytes": dict(backend.sent_bytes),
        "pinned_peak": torch.pretend.native.pinned_peak(),
    }


# -- what the device and the backend refuse


def mixed_devices() -> None:
    start()
    torch.pretend.native.set_count(2)
    x, y, other = (torch.ones(4, device=of) for of in ("pretend", "cpu", "pretend:1"))
    for refused in (
        lambda: x + y,
        lambda: y + x,
        lambda: x + other,
        lambda: torch.cat([x, y]),
        lambda: x @ y,
        lambda: x.mul_(y),
        lambda: y.mul_(x),
        lambda: y + x.sum(),
        lambda: torch.where(x > 0, y, x),
        lambda: y[x.long()],
        lambda: x.index_select(0, torch.tensor([1])),
        lambda: torch.mm(x[None], y[:, None]),
        lambda: torch.mm(y[None], y[:, None], out=x[:1, None]),
        lambda: torch._foreach_add([x, x], [x, y]),
        lambda: torch.nn.functional.embedding(y.long(), x[:, None]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            refused()
    # What CUDA takes: numbers, indices, and copies.
    assert (x + torch.tensor(2.0)).tolist() == [3] * 4
    assert x[torch.tensor([0, 2])].tolist() == [1, 1]
    x[torch.tensor([1])] = torch.tensor(5.0)
    assert x.cpu().tolist() == [1, 5, 1, 1]
    assert y.to("pretend").add_(x).copy_(other).device == torch.device("pretend:0")


def generators() -> None:
    start()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="pretend", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="device"):
        torch.randn(3, generator=torch.Generator("pretend"))
    torch.manual_seed(3)
    host, drawn = torch.get_rng_state(), torch.randn(3, device="pretend")
    assert torch.equal(torch.get_rng_state(), host), "the device draws from its own generator"
    seeded = torch.Generator("pretend").manual_seed(3)
    assert torch.equal(torch.randn(3, device="pretend", generator=seeded), drawn)
    state = torch.pretend.get_rng_state()
    drawn = torch.randn(3, device="pretend")
    torch.pretend.set_rng_state(state)
    assert torch.equal(torch.randn(3, device="pretend"), drawn)


def memory() -> None:
    start()
    native = torch.pretend.native
    x = torch.ones(128 * 10 + 1, device="pretend")
    assert native.in_use(0) == native.peak(0) == 512 * 11
    with pytest.raises(RuntimeError, match="pin"):
        x.pin_memory()
    with pytest.raises(RuntimeError, match="pin"):
        torch.empty(3, device="pretend", pin_memory=True)
    pinned = torch.empty(3000, dtype=torch.uint8).pin_memory()
    assert pinned.is_pinned()
    assert pinned[5:].is_pinned()
    assert not torch.empty(3).is_pinned()
    assert native.pinned_peak() == 4096
    with pytest.raises(RuntimeError, match="divisible"):
        x.view(torch.uint8)[1:9].view(torch.float32)
    shifted = x.untyped_storage()[1:9]
    floats = torch.empty(0, device="pretend").set_(shifted, 0, (2,), (1,))
    with pytest.raises(RuntimeError, match="misaligned address"):
        floats.add_(1)
    del x, shifted, floats
    assert native.in_use(0) == 0
    a = torch.ones(32, 16, dtype=torch.int8, device="pretend")
    for rows, columns, message in ((16, 8, "greater than 16"), (32, 7, "multiple of 8")):
        with pytest.raises(RuntimeError, match=message):
            torch._int_mm(a[:rows], torch.ones(16, columns, dtype=torch.int8, device="pretend"))
    assert torch._int_mm(a, a[:16].T.contiguous()[:, :8]).tolist() == [[16] * 8] * 32


def host_waits() -> None:
    """Each line waits, or it does not."""
    start()
    from tests.device import pretend

    x, y = torch.arange(4.0, device="pretend"), torch.ones(4)
    pinned = torch.empty(4).pin_memory()
    for waits, line in (
        (True, lambda: x.sum().item()),
        (True, lambda: bool(x.any())),
        (True, lambda: x.tolist()),
        (True, lambda: x.cpu()),
        (True, lambda: y.to("pretend")),
        (True, lambda: torch.tensor([1.0], device="pretend")),
        (True, lambda: x.nonzero()),
        (True, lambda: x[x > 2]),
        (True, lambda: x[torch.tensor([1])]),
        (True, lambda: torch.pretend.synchronize()),
        (True, lambda: y.copy_(x, non_blocking=True)),
        (False, lambda: pinned.copy_(x, non_blocking=True)),
        (True, lambda: y.to("pretend", non_blocking=True)),
        (False, lambda: y.pin_memory().to("pretend", non_blocking=True)),
        (False, lambda: (x * 2 + torch.tensor(1.0)).softmax(0)[1:].clone()),
        (False, lambda: torch.zeros(3, device="pretend").index_select(0, x[:1].long())),
    ):
        with pretend.counted() as found:
            line()
        assert bool(found) == waits, (line.__code__.co_firstlineno, found)
        assert all(where.startswith("tests/device/cases.py:") for _, where in found)


def krylov_waits() -> None:
    """A Krylov space is looked at every few steps, and waits for nothing else."""
    start()
    from lorasb_ds.distributed.collectives import ALONE
    from lorasb_ds.init import lanczos
    from lorasb_ds.init.sharded_svd import truncated_svd
    from tests.device import pretend

    generator = torch.Generator().manual_seed(0)
    M = torch.randn(900, 700, generator=generator).sign().to("pretend", torch.int8)
    steps, looks = [0], [0]

    def counted(of: Any, counter: list[int]) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            counter[0] += 1
            return of(*args, **more)

        return call

    lanczos._orthogonalized = counted(lanczos._orthogonalized, steps)
    lanczos.is_converged = counted(lanczos.is_converged, looks)
    with pretend.counted() as found:
        truncated_svd(M, 16, method="krylov", group=ALONE)
    waits = sum(found.values())
    assert 3 <= looks[0] <= 0.8 * steps[0], (looks, steps)
    # A look takes eigenvalues and their verdict; the first block comes from the host, and five
    # numbers begin and end the decomposition.
    assert waits <= 2 * looks[0] + 6, found


def collectives() -> None:
    """NCCL's rules, and what it computes; on two ranks."""
    start()
    from lorasb_ds.distributed import zero
    from tests.device import backend

    zero.init_process_group()
    rank = dist.get_rank()
    here = torch.device("pretend", rank)
    x, whole = torch.full((2,), rank + 1.0, device=here), torch.ones(4, device=here)
    for message, refused in (
        ("device type cpu", lambda: dist.all_reduce(torch.ones(2))),
        ("device type cpu", lambda: dist.broadcast(torch.ones(2), 0)),
        ("this rank is on", lambda: dist.all_reduce(torch.ones(2, device=f"pretend:{1 - rank}"))),
        ("contiguous", lambda: dist.all_reduce(torch.ones(2, 3, device=here).T)),
        ("torch.int16", lambda: dist.all_reduce(x.to(torch.int16))),
        ("no such reduction", lambda: dist.all_reduce(x.int(), dist.ReduceOp.BAND)),
        ("from 2 times", lambda: dist.all_gather_into_tensor(whole[:3], x)),
        ("to 2 times", lambda: dist.reduce_scatter_tensor(x, whole[:3])),
        ("any source", lambda: dist.recv(x)),
    ):
        with pytest.raises(RuntimeError, match=message):
            refused()
    backend.sent_bytes.clear()

    work = dist.all_reduce(x, async_op=True)
    assert x.isnan().all(), "nothing is there before it has been waited for"
    work.wait()
    assert x.tolist() == [3, 3]
    dist.all_reduce(x, dist.ReduceOp.AVG)
    assert x.tolist() == [3, 3]
    assert backend.sent_bytes == {"all_reduce": 16}
    dist.reduce(x, 1)
    assert x.tolist() == [6, 6] if rank == 1 else x.isnan().all()
    x.fill_(rank)
    dist.all_gather_into_tensor(whole, x)
    assert whole.tolist() == [0, 0, 1, 1]
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x)
    assert torch.cat(parts).tolist() == [0, 0, 1, 1]
    dist.reduce_scatter_tensor(x, whole)
    assert x.tolist() == [2 * rank] * 2
    dist.reduce_scatter(x, [whole[:2], whole[2:]])
    assert x.tolist() == [2 * rank] * 2
    exchanged = torch.empty_like(whole)
    dist.all_to_all_single(exchanged, whole + 10 * rank)
    assert exchanged.tolist() == [rank, rank, 10 + rank, 10 + rank]
    dist.gather(x, parts if rank == 0 else None)
    assert rank == 1 or torch.cat(parts).tolist() == [0, 0, 2, 2]
    dist.scatter(x, parts if rank == 0 else None)
    assert x.tolist() == [2 * rank] * 2
    if rank == 0:
        dist.send(x + 5, 1)
    else:
        dist.recv(x, 0)
        assert x.tolist() == [5, 5]
    dist.broadcast(x, 1)
    assert x.tolist() == [5, 5]
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, f"rank {rank}")
    assert objects == ["rank 0", "rank 1"]
    dist.barrier(group=zero.new_group())
