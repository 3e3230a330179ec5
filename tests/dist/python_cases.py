"""What a program does with ``lorasb_ds.train``, alone or on each rank of a job."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from lorasb_ds import ConfigError, JobError, RunConfig, train
from lorasb_ds.config.paths import SHIPPED_DS_CONFIGS
from lorasb_ds.runs import run_log
from lorasb_ds.training import alignment, rebase
from lorasb_ds.training.out_of_memory import OutOfMemoryError
from tests.runs import metrics, word_rows

SHORT = {"dtype": "fp32", "r": 4, "lr": 1e-3, "max_steps": 4, "init_samples": 4}


def config_of(model: str, folder: Path, **more: Any) -> RunConfig:
    return RunConfig(model=model, output_dir=str(folder), **SHORT | more)


def large_tensors() -> list[torch.Size]:
    """Shapes of those that are there, such as the model's embedding."""
    found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return [tensor.shape for tensor in found if tensor.untyped_storage().nbytes() > 1 << 20]


def run_twice(model: str, folder: str, data: str, eval_data: str) -> None:
    """The second run of the process has the same rows from files."""
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()
    rows, held_out = word_rows(40), word_rows(6)
    first, second = Path(folder, "given"), Path(folder, "files")
    logged: list[dict[str, Any]] = []
    made = iter(rows)
    zero3 = {"ds_config": "zero3"}
    found = train(
        config_of(model, first, **zero3),
        rows=lambda: made,
        eval_rows=held_out,
        on_log=logged.append,
    )
    assert logged == metrics(first)
    assert [row["step"] for row in logged] == [0, 0, 1, 2, 3, 4, 4]
    assert found.status == "finished"
    assert found.folder == first
    assert (found.adapter / "adapter_model.safetensors").is_file()
    assert (found.steps, found.loss) == (4, logged[-2]["loss"])
    assert found.eval_loss == logged[-1]["eval_loss"]
    named = json.loads((first / "run.json").read_text())["config"]
    files = {named["eval_data"], *named["data"]}
    assert files == {str(path) for path in first.glob("rows-*.jsonl")}
    assert len(files) == 2
    read = [json.loads(line) for line in Path(named["data"][0]).read_text().splitlines()]
    assert read == rows

    again = train(config_of(model, second, data=(data,), eval_data=eval_data, **zero3))
    assert (again.loss, again.eval_loss) == (found.loss, found.eval_loss)
    assert "RANK" not in os.environ
    assert large_tensors() == [], "memory is free for the next run"


def interrupted(model: str, folder: str) -> None:
    """A Ctrl-C in step 2, and the rest of the run; then runs that are refused or break off."""
    logged: list[int] = []

    def log(row: dict[str, Any]) -> None:
        logged.append(row["step"])
        if row["step"] == 2 and len(logged) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = train(config_of(model, Path(folder)), rows=word_rows(40), on_log=log)
    assert (stopped.status, stopped.steps) == ("stopped", 3)  # asked after the step's end
    assert not stopped.adapter.exists()
    assert large_tensors() == []
    go_on = config_of(model, Path(folder), resume="auto")
    with pytest.raises(ConfigError, match="rows"):
        train(go_on, rows=word_rows(39))
    finished = train(go_on, rows=word_rows(40), on_log=log)
    assert (finished.status, finished.steps) == ("finished", 4)
    assert logged == [1, 2, 3, 4], "each row once"

    config = config_of(model, Path(folder, "another"))
    with pytest.raises(ZeroDivisionError):  # what a callback raises
        train(config, rows=word_rows(20), on_log=lambda row: 1 / 0)
    with pytest.raises(ConfigError, match="is not empty"):
        train(config, rows=word_rows(4))
    os.environ["RANK"] = "0"
    with pytest.raises(ConfigError, match="RANK=0 of a job, but no LOCAL_RANK, WORLD_SIZE, MASTER"):
        train(config, rows=word_rows(4))
    with pytest.raises(ConfigError, match="this one is rank 0 of a job"):
        train(config, rows=word_rows(4), launch={"num_procs": 2})


def refused_late(model: str, folder: str) -> None:
    """A model that only a forward pass shows to be unfit leaves memory for the next run."""
    with pytest.raises(ConfigError, match="its tokens see those after"):
        train(config_of(model, Path(folder), ds_config="zero3"), rows=word_rows(8))
    assert large_tensors() == []


def smallest_scale(model: str, folder: str) -> None:
    """fp16's loss scale is at its minimum, and R is too large for fp16 after the first step."""
    # DeepSpeed asks for hardware; torch computes in fp16 on any CPU, slowly.
    get_accelerator().is_fp16_supported = lambda: True
    ds_config = json.loads((SHIPPED_DS_CONFIGS / "zero2.json").read_text())
    ds_config["fp16"] = {"enabled": "auto", "initial_scale_power": 0, "hysteresis": 1}
    file = Path(folder, "ds_config.json")
    file.write_text(json.dumps(ds_config))
    options = SHORT | {"dtype": "fp16", "lr": 1e30, "warmup_ratio": 0, "ds_config": str(file)}
    run = Path(folder, "run")
    with pytest.raises(FloatingPointError, match="loss scale is 1, its minimum") as caught:
        train(RunConfig(model=model, output_dir=str(run), **options), rows=word_rows(8))
    step = metrics(run)[-1]["step"] + 1
    assert str(caught.value).startswith(f"step {step} has a gradient that is not finite in fp16")
    assert "Give --dtype bf16, lower --lr" in str(caught.value)
    assert "look at the rows of this step: rows-" in str(caught.value)
    assert str(caught.value.__cause__).startswith("Current loss scale already at minimum")


def no_memory_for_an_init(model: str, folder: str) -> None:
    """A re-basing and an alignment that need more than there is, in the middle of training."""

    def too_large(*_: Any, **__: Any) -> Any:
        return torch.empty(1 << 55)

    for name, more, module, part in (
        ("alignment", {"track_alignment": 2}, alignment, "average_gradients"),
        ("re-basing", {"rebase_every": 2}, rebase, "initialize_by"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, part, too_large)
            with pytest.raises(OutOfMemoryError) as caught:
                train(config_of(model, Path(folder, name), **more), rows=word_rows(20))
        text = str(caught.value)
        assert text.startswith(f"Out of memory ({name}).")
        assert "DefaultCPUAllocator: can't allocate memory" in text


def two_ranks(model: str, folder: str) -> None:
    """Rank 0's rows are those of all, and it gets the rows of numbers."""
    rank, logged = int(os.environ["RANK"]), []

    def rows() -> list[dict[str, str]]:
        assert rank == 0
        return word_rows(40)

    with pytest.raises(ConfigError, match="rows: there are none"):
        train(config_of(model, Path(folder)), rows=[])
    found = train(config_of(model, Path(folder)), rows=rows, on_log=logged.append)
    assert logged == (metrics(Path(folder)) if rank == 0 else [])
    assert (found.status, found.steps) == ("finished", 4)
    assert found.loss == metrics(Path(folder))[-1]["loss"]


def refused_by_one(model: str, folder: str, data: str) -> None:
    """What one rank alone finds wrong is refused by both, and nobody waits."""
    rank = int(os.environ["RANK"])
    for refusing in (0, 1):
        run = Path(folder, str(refusing))
        with pytest.MonkeyPatch.context() as patch:
            if rank != refusing:
                patch.chdir(Path(data).parent)
            with pytest.raises(ConfigError, match=Path(data).name) as caught:
                train(config_of(model, run, data=(Path(data).name,)))
        assert str(caught.value).startswith("Rank ") == (rank != refusing)
        assert (f"Rank {refusing}: " in str(caught.value)) == (rank != refusing)

    run = Path(folder, "run")
    train(config_of(model, run, data=(data,), max_steps=1))
    if rank == 0:  # which alone reads the basis
        size = (run / "basis.safetensors").stat().st_size
        with (run / "basis.safetensors").open("r+b") as basis:
            basis.seek(size - 4)
            basis.write(b"oops")
    with pytest.raises(ConfigError, match="is damaged"):
        train(config_of(model, run, data=(data,), max_steps=1, resume="auto"))


def log_raises(model: str, folder: str, data: str) -> None:
    """What rank 0's callback or disk raises ends the run on both ranks, wherever it is."""
    rank = int(os.environ["RANK"])

    def run_to(where: str, message: str, last_step: int, at: int, **more: Any) -> None:
        logged: list[dict[str, Any]] = []

        def log(row: dict[str, Any]) -> None:
            logged.append(row)
            if len(logged) == at:
                raise ZeroDivisionError(message)

        config = config_of(model, Path(folder, where), data=(data,), **more)
        with pytest.raises(ZeroDivisionError if rank == 0 else JobError, match=message) as caught:
            train(config, on_log=log)
        assert str(caught.value).startswith("Rank 0 has failed: ZeroDivision") == (rank != 0)
        rows = metrics(Path(folder, where))
        assert rows[-1]["step"] == last_step
        if rank == 0:
            assert logged == rows, "no row is written or told after that"

    run_to("step", "pruned", last_step=2, at=2)
    run_to("last", "pruned at the end", last_step=4, at=4)
    run_to("evaluation", "base is bad", last_step=0, at=1, eval_data=data)
    assert [row.get("stage") for row in metrics(Path(folder, "evaluation"))] == ["base"]

    full = Path(folder, "full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "append_text", no_space)
        with pytest.raises(OSError if rank == 0 else JobError, match="No space left on device"):
            train(config_of(model, full, data=(data,)))
    assert train(config_of(model, full, data=(data,), resume="auto")).status == "finished"


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
