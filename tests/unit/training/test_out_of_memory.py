"""What is told of a process without memory left, against the planner and real allocators."""

from __future__ import annotations

import errno
import re
import shlex
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from launcher.cli import main
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.planner.footprint import Footprint
from lorasb_ds.planner.placement import Placement
from lorasb_ds.planner.strategies import Cluster, cpu_cluster
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.units import GIB
from lorasb_ds.training import phases
from lorasb_ds.training.memory import RunMemory
from lorasb_ds.training.out_of_memory import (
    NUM_REMEDIES,
    OutOfMemoryError,
    Phase,
    Remedy,
    explain,
    is_out_of_memory,
    parts,
    remedies,
)
from tests.runs import ROOT
from tests.unit.planner.test_footprint import LLAMA_7B, footprint_of, work_of

PHASES: tuple[Phase, ...] = ("load", "init", "train", "evaluation", "save")
GPUS, CPUS = Cluster(1, 4, 80 * GIB), cpu_cluster(2, 64 * GIB)
LIVE = {"max_live_parameters": 10**9, "prefetch_bucket_size": 5 * 10**7}
SHARDED = Placement("bf16", 4, **LIVE)
WHOLE = Placement("bf16", 2, stage=2)
WORK = work_of(LLAMA_7B, r=64, max_length=1024, num_labels=1000, micro_batch_size=4)


def found(
    phase: Phase,
    placement: Placement = SHARDED,
    cluster: Cluster = GPUS,
    work: Workload = WORK,
    **options: Any,
) -> dict[str, Remedy]:
    """Options -> what they do."""
    config = RunConfig(**options)
    memory = memory_of(placement, cluster, work)
    return {remedy.options: remedy for remedy in remedies(phase, memory, config)}


def planned(placement: Placement, work: Workload) -> Footprint:
    return footprint_of(LLAMA_7B, placement, **vars(work))


def memory_of(placement: Placement, cluster: Cluster, work: Workload) -> RunMemory:
    return RunMemory(LLAMA_7B, placement, work, planned(placement, work), cluster)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSgesvd"
        ),
        RuntimeError(
            "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, "
            "when calling `cusolverDnCreate(handle)`."
        ),
        RuntimeError(
            "NCCL error in: NCCLUtils.cpp:93, unhandled cuda error, NCCL version 2.27.5\n"
            "Last error:\nCuda failure 2 'out of memory'"
        ),
        RuntimeError(
            "NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc 6291456"
        ),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"),
    ],
)
def test_out_of_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = RuntimeError("the worker failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def test_so_is_what_torch_says_on_this_host() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        RuntimeError(
            "NCCL error: unhandled cuda error\nLast error:\nCuda failure 1 'invalid argument'"
        ),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not(error: BaseException) -> None:
    error.__cause__ = error  # a circle ends, too
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("one_memory", [False, True])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_parts_are_the_planner_s(form: Any, offload: Any, one_memory: bool) -> None:
    for stage, ranks, budget, hosted, checkpointed in product(
        (2, 3), (1, 4), (None, 2 * GIB), (False, True), (False, True)
    ):
        placement = Placement(
            form, ranks, stage=stage, offload=offload if stage == 3 else "none", **LIVE
        )
        work = replace(
            WORK,
            init_memory_bytes=budget,
            init_offload=hosted,
            gradient_checkpointing=checkpointed,
        )
        memory = planned(placement, work)
        peaks = {phase: sum(parts(memory, phase, one_memory).values()) for phase in PHASES}
        phases = memory.phases(one_memory)
        assert peaks["load"] == phases["load"]
        assert peaks["init"] == phases["init"]
        assert max(peaks["train"], peaks["save"]) == phases["train"]
        assert peaks["evaluation"] < peaks["train"]


def test_what_is_saved_is_the_difference_of_two_plans() -> None:
    checkpointed = replace(WORK, gradient_checkpointing=True)
    for phase in ("init", "train"):
        before = planned(SHARDED, WORK).phases(False)[phase]
        after = planned(SHARDED, checkpointed).phases(False)[phase]
        assert found(phase)["--gradient-checkpointing"].saved_bytes == before - after
    # Loading: half of the shard of a weight, and of what is gathered in its last forward pass, but
    # for a layer that is dequantized there.
    rounded = found("load")["--load-in-8bit"].saved_bytes
    plans = [planned(replace(SHARDED, form=form), WORK) for form in ("bf16", "int8")]
    assert rounded == plans[0].phases(False)["load"] - plans[1].phases(False)["load"]
    numel = sum(out * in_ for out, in_ in LLAMA_7B.layers.values())
    less_gathered = plans[0].gathered - plans[1].gathered - plans[1].dequantized
    assert rounded == pytest.approx(numel / 4 + less_gathered, rel=0.01)
    offloaded = found("save")["--ds-config ds_configs/zero3_offload.json"].saved_bytes
    assert offloaded > 0.9 * LLAMA_7B.num_parameters * 2 / 4


def test_larger_runs_have_more_to_save() -> None:
    names = ("--gradient-checkpointing", "--max-length 512")
    sizes = (2, 4, 8)
    for name in names:
        saved = [
            found("train", work=replace(WORK, micro_batch_size=n))[name].saved_bytes for n in sizes
        ]
        assert saved == sorted(set(saved))
    micro = [
        found("train", work=replace(WORK, micro_batch_size=n))[
            f"--micro-batch-size {n // 2} --gradient-accumulation-steps 2"
        ].saved_bytes
        for n in sizes
    ]
    assert micro == sorted(set(micro))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("placement", "cluster"), [(SHARDED, GPUS), (WHOLE, GPUS), (WHOLE, CPUS)])
def test_the_cheapest_come_first(phase: Phase, placement: Placement, cluster: Cluster) -> None:
    every = list(found(phase, placement, cluster).values())
    assert every
    assert all(remedy.saved_bytes > 0 for remedy in every)
    priced = [bool(remedy.price) for remedy in every]
    assert priced == sorted(priced), "what changes the result comes last"
    costs = [(r.recomputes, r.more_traffic_bytes) for r in every if not r.price]
    assert costs == sorted(costs)


def test_what_each_phase_is_offered() -> None:
    init, train = list(found("init")), list(found("train"))
    assert init[:2] == ["--init-memory-gib 2", "--init-offload"]
    # The host holds a quarter of the base; half a micro-batch gathers all of it twice as often.
    offload, micro_batch = train[:2]
    assert offload == "--ds-config ds_configs/zero3_offload.json"
    assert micro_batch == "--micro-batch-size 2 --gradient-accumulation-steps 2"
    assert not [name for name in train if name.startswith("--init")]
    for phase in ("load", "save"):
        assert not {"--gradient-checkpointing", *init[:2]} & found(phase).keys()
    assert "--gradient-checkpointing" not in found("evaluation")
    assert train[-2:] == ["--max-length 512", "8 GPUs"]
    for phase in PHASES:  # to the memory that is gone anyway
        on_cpus = " ".join(found(phase, WHOLE, CPUS))
        assert "offload" not in on_cpus
        assert "GPU" not in on_cpus
    assert "--ds-config ds_configs/zero3.json" in found("load", WHOLE, CPUS)
    assert "--ds-config ds_configs/zero3.json" not in found("load", replace(WHOLE, world_size=1))


def test_nothing_is_offered_twice() -> None:
    work = replace(
        WORK,
        gradient_checkpointing=True,
        activation_offload=True,
        init_memory_bytes=2 * GIB,
        init_offload=True,
        micro_batch_size=1,
    )
    placement = replace(SHARDED, form="nf4", offload="cpu")
    for phase in PHASES:
        assert found(phase, placement, work=work).keys() <= {"--max-length 512", "8 GPUs"}
    assert found("load", replace(WHOLE, world_size=1, form="int8"), CPUS) == {}


@pytest.mark.parametrize(
    ("size", "accumulation", "options"),
    [
        (6, 1, "--micro-batch-size 3 --gradient-accumulation-steps 2"),
        (4, 8, "--micro-batch-size 2 --gradient-accumulation-steps 16"),
        (9, 2, "--micro-batch-size 3 --gradient-accumulation-steps 6"),
        (7, 1, "--micro-batch-size 1 --gradient-accumulation-steps 7"),
    ],
)
def test_a_step_keeps_its_rows(size: int, accumulation: int, options: str) -> None:
    work = replace(WORK, micro_batch_size=size)
    assert options in found("train", work=work, gradient_accumulation_steps=accumulation)


def test_offered_options_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    offered = {name for phase in PHASES for p in (SHARDED, WHOLE) for name in found(phase, p)}
    assert len(offered) > 8
    for options in offered - {"8 GPUs"}:
        command = ["train", "--num-gpus", "4", *shlex.split(options), "--dry-run"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("placement", "cluster"), [(SHARDED, GPUS), (WHOLE, CPUS)])
def test_the_text(phase: Phase, placement: Placement, cluster: Cluster) -> None:
    text = explain(
        phase,
        torch.OutOfMemoryError("Tried to allocate 20 GiB.\nTraceback of C++"),
        in_use_bytes=3 * GIB,
        memory=memory_of(placement, replace(cluster, memory_bytes=7 * GIB), WORK),
        config=RunConfig(),
    )
    held = re.findall(r"^ +(\d+\.\d\d)  (.+)$", text, re.MULTILINE)
    sizes = [float(size) for size, _ in held]
    assert sizes == sorted(sizes, reverse=True)
    assert "base" in {name for _, name in held}
    peak = re.search(r"Planned were (\d+\.\d\d) GiB", text)
    assert peak
    assert float(peak[1]) == pytest.approx(sum(sizes), abs=0.05), "but for what is too small"
    assert f"Out of memory ({phase})." in text
    assert "7.00 were free" in text
    assert "3.00 are in use" in text
    assert 1 <= text.count(" GiB less;") <= NUM_REMEDIES
    assert text.endswith("The error was: Tried to allocate 20 GiB.")


def test_a_phase_within_another_explains_its_own() -> None:
    """A re-basing takes an init's memory, whatever the run's first init was loaded from."""
    config = RunConfig(init_from="runs/earlier", rebase_every=10)
    run: Any = SimpleNamespace(memory=memory_of(SHARDED, GPUS, WORK), config=config)
    with (
        pytest.raises(OutOfMemoryError) as caught,
        phases.phase(run, "train"),
        phases.phase(run, "init", "re-basing"),
    ):
        raise MemoryError
    assert isinstance(caught.value.__cause__, MemoryError)
    assert str(caught.value).startswith("Out of memory (re-basing).")
    assert "gradients of layers" in str(caught.value)
    assert "--init-memory-gib 2" in str(caught.value)
    with pytest.raises(ValueError, match="other"), phases.phase(run, "train"):
        raise ValueError("some other error")
