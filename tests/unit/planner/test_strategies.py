"""Strategies on clusters, their bytes, `lorasb plan`, and how `train` uses it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from deepspeed.launcher.runner import fetch_hostfile

from launcher.cli import main
from launcher.commands.plan_inputs import find_workload
from launcher.hosts.hostfile import read_hostfile
from lorasb_ds.errors import ConfigError
from lorasb_ds.planner.config_shape import shape_from_config
from lorasb_ds.planner.known_models import BUILT_IN, HUB_NAMES
from lorasb_ds.planner.placement import Placement
from lorasb_ds.planner.strategies import Cluster, cpu_cluster, plan, recommended
from lorasb_ds.planner.traffic import step_traffic
from lorasb_ds.planner.workload import Workload
from lorasb_ds.system.host_memory import available_bytes
from lorasb_ds.system.units import GIB
from lorasb_ds.training.memory import RunMemory
from tests.runs import ROOT, word_rows, write_jsonl

OPTIONS: dict[str, Any] = {"r": 64, "max_length": 1024, "micro_batch_size": 4, "init_samples": 64}
OPTIONS |= {"gradient_checkpointing": False, "init_memory_gib": None, "expert_r": None}
OPTIONS |= {"init_micro_batch_size": None, "sequence_parallel": 1}
LLAMA_7B = shape_from_config("llama-7b", BUILT_IN["llama-7b"])


def work_of(**changes: Any) -> Workload:
    return find_workload(LLAMA_7B, OPTIONS | changes)


def invoke(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_what_fits_is_recommended() -> None:
    large = plan(LLAMA_7B, Cluster(1, 8, 80 * GIB), work_of())
    best = recommended(large)
    assert best is not None
    assert best.strategy.name == "bf16 on every rank"
    # Its host has no room for bf16 either.
    small = plan(LLAMA_7B, Cluster(1, 1, 16 * GIB, host_memory_bytes=8 * GIB), work_of())
    best = recommended(small)
    assert best is not None
    assert best.strategy.form == "nf4"
    assert "--init-memory-gib" in best.added
    assert best.work.init_memory_bytes is not None
    assert best.memory.init.predicted_bytes <= best.work.init_memory_bytes
    assert recommended(plan(LLAMA_7B, Cluster(1, 1, 2 * GIB), work_of())) is None


def test_every_plan_is_consistent() -> None:
    for memory_gib in (4, 16, 40, 80):
        cluster = Cluster(2, 4, memory_gib * GIB, host_memory_bytes=30 * GIB)
        for found in plan(LLAMA_7B, cluster, work_of()):
            within = found.needed_bytes <= cluster.memory_bytes
            hosted = found.host_needed_bytes <= 30 * GIB
            assert found.fits == (within and hosted and not found.memory.init.exceeds_budget)
            assert found.headroom_bytes == cluster.memory_bytes - found.needed_bytes
            asked = (
                "--gradient-checkpointing" in found.added,
                "--init-memory-gib" in found.added,
            )
            held = (found.work.gradient_checkpointing, found.work.init_memory_bytes is not None)
            assert asked == held


def test_what_makes_no_sense_is_left_out() -> None:
    one = [p.strategy.name for p in plan(LLAMA_7B, Cluster(1, 1, 80 * GIB), work_of())]
    assert "bf16, ZeRO-3" not in one, "one rank has nothing to share"
    cpu = [p.strategy.name for p in plan(LLAMA_7B, cpu_cluster(2, 160 * GIB), work_of())]
    assert not any("offloaded" in name for name in cpu), "to where it is already"


def test_traffic_of_a_step() -> None:
    """Two gathers of blocks, with checkpointing, too, where blocks can be kept; one of embedding
    and head; none where all is whole."""
    work = work_of()
    sharded = Placement("bf16", 4, prefetch_bucket_size=int(5e7))
    factors = sum(64 * (out + in_) for out, in_ in work.targets.values())
    tables = 2 * 32000 * 4096
    whole = 2 * 2 * (LLAMA_7B.num_parameters - tables + factors) + 2 * tables
    step = step_traffic(LLAMA_7B, sharded, work)
    assert step.bytes == pytest.approx(whole * 3 / 4, rel=1e-3)
    recomputed = replace(work, gradient_checkpointing=True)
    roomy = replace(sharded, max_live_parameters=int(3e8))  # for a block and a bucket
    assert step_traffic(LLAMA_7B, roomy, recomputed) == step
    for tight in (sharded, replace(roomy, offload="nvme")):
        again = step_traffic(LLAMA_7B, tight, recomputed)
        assert again.bytes - step.bytes == pytest.approx((whole - 2 * tables) / 2 * 3 / 4, rel=1e-2)
    replicated = step_traffic(LLAMA_7B, Placement("bf16", 4, stage=2), work)
    assert replicated.bytes == work.num_trainable * 6 * 3 // 4
    hosted = step_traffic(LLAMA_7B, replace(sharded, offload="cpu"), work)
    assert hosted.host_bytes == pytest.approx(whole / 4, rel=1e-3)


def test_the_order_of_those_that_fit() -> None:
    """Nothing computed twice, then the fewest bytes, then the order of the strategies."""
    plans = plan(LLAMA_7B, Cluster(1, 4, 80 * GIB), work_of())
    whole, rounded, sharded, *_ = plans
    assert whole.step.total_bytes == rounded.step.total_bytes < sharded.step.total_bytes
    assert recommended(plans) is whole
    assert recommended([*plans[::-1]]) is rounded
    recomputing = replace(whole, work=replace(whole.work, gradient_checkpointing=True))
    assert recommended([recomputing, sharded]) is sharded
    assert recommended([recomputing, replace(sharded, fits=False)]) is recomputing
    offloaded = replace(sharded, step=replace(sharded.step, host_bytes=1))
    assert recommended([offloaded, sharded]) is sharded


def test_the_command_as_a_user_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = invoke("--model", "llama-3-70b", "--gpus-per-node", "8")
    assert "70.55 billion parameters on 8 GPU(s) with 80.0 GiB each" in text
    assert len(re.findall(r"^(?:bf16|4-bit)", text, re.MULTILINE)) == 6
    *_, line = text.strip().splitlines()
    words = shlex.split(line)
    assert words[:2] == ["lorasb", "train"]
    assert (ROOT / words[words.index("--ds-config") + 1]).is_file()
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / words[words.index("--data") + 1], word_rows(1))
    dry_run = CliRunner().invoke(main, [*words[1:], "--dry-run"])
    assert dry_run.exit_code == 0, dry_run.output


def test_a_mixture_of_experts_as_a_user_sees_it() -> None:
    text = invoke("--model", "qwen3-30b-a3b")
    assert "95% of them in experts, of which a token goes to 8 of 128 in a block" in text
    assert "--expert-r" not in text, "it is the default of `lorasb train`, too"
    frozen, trained = (
        json.loads(invoke("--model", "qwen3-30b-a3b", "--expert-r", r, "--json")) for r in "08"
    )
    assert "--expert-r 0" in frozen["command"]
    assert trained["parameters_in_experts"] == 48 * 128 * 3 * 768 * 2048
    for without, with_experts in zip(frozen["strategies"], trained["strategies"], strict=True):
        assert without["bytes"]["A, B, R"] < with_experts["bytes"]["A, B, R"]
        assert without["init"]["bytes"] <= with_experts["init"]["bytes"]


def test_json_holds_the_same_numbers() -> None:
    arguments = ("--model", "mixtral-8x7b", "--host-memory-gib", "512")
    found = json.loads(invoke(*arguments, "--json"))
    assert found["recommended"] in [s["name"] for s in found["strategies"] if s["fits"]]
    text = invoke(*arguments)
    for strategy in found["strategies"]:
        assert f"{strategy['needed_bytes'] / GIB:.2f}" in text
        peaks = strategy["peak_bytes"]
        assert strategy["needed_bytes"] == max(peaks.values()) + 3 * 2**29
    assert found["command"] in text


def test_folders_hub_names_and_hosts(tiny_model: Path, tmp_path: Path) -> None:
    assert "0.00 billion" in invoke("--model", str(tiny_model), "--r", "8", "--num-procs", "2")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# two hosts\nnode-1 slots=4\n\nnode-2 slots=4  # the other\n")
    text = invoke("--model", "llama-7b", "--hostfile", str(hostfile))
    assert "on 8 GPU(s) with 80.0 GiB each, 2 hosts" in text
    assert f"deepspeed --hostfile {hostfile} launcher/train.py" in text


def test_hostfile_as_deepspeed_reads_it() -> None:
    for file in (ROOT / "hostfiles").iterdir():
        assert read_hostfile(str(file)) == fetch_hostfile(str(file))


def test_the_command_of_a_shape_names_its_model() -> None:
    assert set(HUB_NAMES) == set(BUILT_IN)
    assert "--model meta-llama/Meta-Llama-3-70B" in invoke("--model", "llama-3-70b")


def test_narrow_layers_are_named(tiny_model: Path) -> None:
    said = ["--model", str(tiny_model), "--num-procs", "2", "--r"]
    assert "no adapter on" not in invoke(*said, "24")
    assert re.search(r"no adapter on \d+ layer\(s\) such as \S+k_proj \(", invoke(*said, "25"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "no/such-model"], r"no hub name in the cache.*llama-7b"),
        (["--model", "a b c"], "none of the built-in shapes"),
        (["--model", "llama-7b", "--r", "5000"], "--r 5000 exceeds 4096, the most that a layer"),
        (["--model", "llama-7b", "--expert-r", "4"], "--expert-r 4: llama-7b has no experts"),
        (["--model", "qwen3-30b-a3b", "--expert-r", "800"], "--expert-r 800 exceeds 768.*0 leaves"),
        (["--model", "llama-7b", "--nodes", "0"], "--nodes"),
        (["--model", "llama-7b", "--gpu-memory-gib", "0"], "--gpu-memory-gib"),
        (["--model", "llama-7b", "--hostfile", "nowhere"], "there is no such file"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    assert re.search(message, " ".join(invoke(*arguments, status=2).split()))


@pytest.mark.parametrize("content", ["node-1\n", "a slots=0\n", "a slots=1\na slots=2\n", "# no\n"])
def test_bad_hostfiles(tmp_path: Path, content: str) -> None:
    (tmp_path / "hostfile").write_text(content)
    with pytest.raises(ConfigError, match="host slots=N"):
        read_hostfile(str(tmp_path / "hostfile"))


def test_uneven_hosts(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("a slots=4\nb slots=8\n")
    text = invoke("--model", "llama-7b", "--hostfile", str(tmp_path / "hostfile"), status=2)
    assert "4, 8 slots" in text


def test_instant() -> None:
    """No torch, on the largest shape. Measures processor time, since the machine may be busy."""
    code = (
        "import resource, sys; from launcher.cli import main\n"
        "main(['plan', '--model', 'llama-3-405b', '--nodes', '4'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert time.perf_counter() - start < 20
    assert float(done.stdout.split()[-1]) < 2


@pytest.mark.slow  # half a minute: 80 plans, with all that may be added to them
def test_the_table_in_the_docs_is_the_command_s() -> None:
    assert invoke("--table").strip() in (ROOT / "docs/planning.md").read_text()


def test_a_run_that_cannot_fit_is_refused_with_what_would() -> None:
    roomy = Cluster(1, 2, 999 * GIB)  # so that nothing is changed to fit
    plans = {p.strategy.name: p for p in plan(LLAMA_7B, roomy, work_of())}
    whole = plans["bf16 on every rank"]
    cluster = Cluster(1, 2, 24 * GIB, host_memory_bytes=64 * GIB)
    found = RunMemory(LLAMA_7B, whole.placement, work_of(), whole.memory, cluster)
    with pytest.raises(ConfigError, match=r"24.00 are free.*What would fit: --ds-config .*--force"):
        found.check_fits()
    assert found.needed_bytes > found.free_bytes == 24 * GIB
    assert replace(found, cluster=roomy).problem is None
    loaded = replace(found, computes_init=False)
    assert set(loaded.phases) == {"load", "train"}
    tiny = replace(found, cluster=Cluster(1, 2, GIB))
    assert tiny.problem is not None
    assert "Nothing fits on 2 of them" in tiny.problem


def test_available_memory_within_a_cgroup(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert available_bytes(proc, cgroups) == 500 * 1024
    (proc / "self/cgroup").write_text("0::/job/step\n")
    inner, outer = cgroups / "job/step", cgroups / "job"
    inner.mkdir(parents=True)
    for folder, limit, used, cached in ((inner, "max", 9, 9), (outer, str(400 * 1024), 300, 100)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used * 1024}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached * 1024}\n")
    assert available_bytes(proc, cgroups) == 200 * 1024
    assert available_bytes() > 0


def test_pieces_of_rows() -> None:
    """Half of the rows on each of two ranks, and no masks; the command says so."""
    whole, halves = (
        plan(LLAMA_7B, Cluster(1, 4, 80 * GIB), work_of(sequence_parallel=size)) for size in (1, 2)
    )
    for one, other in zip(whole, halves, strict=True):
        assert other.memory.activations < one.memory.activations / 2
        assert other.memory.base == one.memory.base
    text = invoke("--model", "llama-7b", "--sequence-parallel", "4", "--gpus-per-node", "8")
    assert "--sequence-parallel 4" in text.strip().splitlines()[-1]
    refused = invoke("--model", "llama-7b", "--sequence-parallel", "3", status=2)
    assert "--sequence-parallel 3 does not divide the number of processes, 8" in refused
