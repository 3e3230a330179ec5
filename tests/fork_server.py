"""A process that imports everything once and forks the ranks of one job after the other.

A fresh interpreter takes some 6 s to import torch, DeepSpeed and the trainer; a fork takes none.
The server has no thread beside its own, no process group and no random state that was used: a rank
starts as a fresh interpreter would. It ends, and its ranks with it, when its caller does.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

# The trainer's and the evaluator's, and what transformers imports when a model is built.
PRELOADED = (
    *("tests.dist.cases", "launcher.train", "launcher.workers.eval", "launcher.workers.adapters"),
    *("lorasb_ds.training.trainer", "lorasb_ds.evaluation.evaluator", "bitsandbytes", "peft"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
    *("torch.utils.tensorboard", "torch.utils.cpp_extension", "torch._dynamo", "matplotlib.figure"),
    *("datasets", "pandas", "deepspeed.ops.op_builder.all_ops"),
    "deepspeed.module_inject.auto_ep_config",
)
WORKERS = {
    "train": "launcher.train",
    "eval": "launcher.workers.eval",
    "adapters": "launcher.workers.adapters",
}
STACKS_S = 3.0  # for the stacks of a rank that hangs


@dataclass(frozen=True)
class Job:
    """A function of this module, its arguments, and the whole environment of each rank."""

    function: str
    arguments: dict[str, Any]
    environments: Sequence[dict[str, str]]
    timeout_s: float


@dataclass(frozen=True)
class Outcome:
    """Each rank's status, and what it printed.

    A status is None if the rank was ended because another one failed, or (``timed_out``) because
    the time was over; then the stacks of those are in what they printed.
    """

    statuses: list[int | None]
    outputs: list[str]
    timed_out: bool


def main() -> None:
    caller = Connection(int(sys.argv[1]))
    for module in PRELOADED:
        importlib.import_module(module)
    # Built here if need be, whatever it takes. A rank that is ended while it builds leaves the lock
    # of torch's extensions behind, and every later process would wait for that without end.
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    others = [name for name in threads[1:] if name != "jemalloc_bg_thd"]  # begun anew by a fork
    assert not others, f"{others} would be missing in the ranks"
    gc.collect()
    gc.freeze()  # pages that nobody writes to stay shared
    try:
        while True:
            caller.send(run(caller.recv(), caller))
    except (EOFError, BrokenPipeError):
        return


def run(job: Job, caller: Connection) -> Outcome:
    """Fork the ranks; wait for their end, or end them."""
    outputs = [tempfile.TemporaryFile() for _ in job.environments]  # noqa: SIM115, closed below
    statuses: dict[int, int] = {}
    ranks: list[int] = []
    sys.stdout.flush()
    sys.stderr.flush()
    for environment, output in zip(job.environments, outputs, strict=True):
        pid = os.fork()
        if pid == 0:
            caller.close()
            _be_a_rank(job, environment, output.fileno())
        ranks.append(pid)
    deadline = time.monotonic() + job.timeout_s
    timed_out = False
    while len(statuses) < len(ranks) and not any(statuses.values()) and not timed_out:
        if caller.poll(0.01):  # nothing is asked meanwhile: the caller has ended
            break
        timed_out = time.monotonic() > deadline
        _reap(ranks, statuses)
    ended = dict(statuses)
    if timed_out:
        _end(ranks, statuses, signal.SIGABRT, STACKS_S)
    _end(ranks, statuses, signal.SIGKILL, 60)
    texts = []
    for output in outputs:
        output.seek(0)
        texts.append(output.read().decode(errors="replace"))
        output.close()
    return Outcome([ended.get(pid) for pid in ranks], texts, timed_out)


def _reap(ranks: Sequence[int], statuses: dict[int, int]) -> None:
    """Note which ranks have ended, and how: a negative status is a signal."""
    for pid in ranks:
        if pid not in statuses:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)


def _end(ranks: Sequence[int], statuses: dict[int, int], signum: int, within_s: float) -> None:
    """Signal those that are left, and wait for them for so long."""
    for pid in ranks:
        if pid not in statuses:
            os.kill(pid, signum)
    deadline = time.monotonic() + within_s
    while len(statuses) < len(ranks) and time.monotonic() < deadline:
        _reap(ranks, statuses)
        time.sleep(0.01)


def _be_a_rank(job: Job, environment: dict[str, str], output: int) -> NoReturn:
    """What the child does, in place of returning: the server's loop is not its business."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.enable(file=2, all_threads=True)  # SIGABRT, too
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # $TMPDIR may be another one
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        globals()[job.function](**job.arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    # As the worker ends (launcher/train.py): some thread of gloo's may outlive its group.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# -- what ranks are asked to do


def run_case(case: str, **arguments: Any) -> None:
    """A function of tests/dist/cases.py or of MODULE:NAME, and the end of its process group."""
    import torch.distributed as dist

    module, _, name = case.rpartition(":")
    getattr(importlib.import_module(module or "tests.dist.cases"), name)(**arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_worker(worker: str, options: Sequence[str]) -> None:
    """`launcher/train.py OPTIONS` or another worker, which ends the process."""
    module = importlib.import_module(WORKERS[worker])
    sys.argv = [str(module.__file__), *options]
    module.main()
