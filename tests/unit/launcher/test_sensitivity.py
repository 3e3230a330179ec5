"""`lorasb sensitivity` without training: sizes of samples, what is compared with what, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.commands.sensitivity import numbers
from launcher.jobs.launch_options import LaunchOptions
from launcher.sweeps.plots import draw_sensitivity
from launcher.sweeps.pool import Place
from launcher.sweeps.runs import RUNS, check_folder, errors_in, sweep_folder, train_command
from launcher.sweeps.sensitivity import (
    Draw,
    Result,
    as_dict,
    by_size,
    read_result,
    run_table,
    sample_sizes,
    table,
    told_sizes,
)
from lorasb_ds.errors import ConfigError
from tests.runs import made_up_run

NAN = math.nan


def test_sizes_of_samples() -> None:
    assert list(sample_sizes([0.01, 0.0001, 0.001], 100_000)) == [10, 100, 1000]
    assert list(sample_sizes([1, 0.5], 7)) == [4, 7]
    # Those that would have less than two rows are one size, under the smallest share.
    assert sample_sizes([0.01, 0.001, 0.0001, 0.005], 400) == {2: 0.0001, 4: 0.01}
    assert told_sizes([0.0001, 0.001, 0.005, 0.01, 0.01], 400) == [
        "0.0001 of 400 rows: samples of 2 (the fewest that there can be; the share is 0.04)",
        "0.001 of 400 rows: samples of 2 (the fewest that there can be; the share is 0.4), as for "
        "0.0001: taken once",
        "0.005 of 400 rows: samples of 2, as for 0.0001: taken once",
        "0.01 of 400 rows: samples of 4",
    ]
    for share in (0.0, -0.1, 1.01, NAN):
        with pytest.raises(ConfigError, match="is not a share of the rows"):
            sample_sizes([0.1, share], 400)
    with pytest.raises(ConfigError, match="1 row is too few"):
        sample_sizes([0.1], 1)


# Pairs by their names: sizes 4 and 40, seeds 1 and 2, in an order that is none.
RESULTS = [
    Result(Draw(40, 1), 0.02, 3.0, 2.0),
    Result(Draw(4, 2), 0.01, 3.5, 2.75),
    Result(Draw(40, 2), 0.04, 3.25, 2.25),
    Result(Draw(4, 1), NAN, 4.5, 3.25),
]
SAME = [[1.0 if i == j else 0.0 for j in range(4)] for i in range(4)]


def overlaps(**pairs: float) -> list[list[float]]:
    """A matrix of the runs above: ``_03=0.5`` is that of the first and the last."""
    found = [list(row) for row in SAME]
    for name, value in pairs.items():
        i, j = int(name[1]), int(name[2])
        found[i][j] = found[j][i] = value
    return found


def test_what_is_compared_with_what() -> None:
    """Between seeds of a size; and with the largest sample of another seed."""
    A = overlaps(_02=0.9, _13=0.3, _01=0.5, _23=0.7, _03=0.99, _12=0.98)
    B = overlaps(_02=0.8, _13=0.2, _01=0.4, _23=0.5, _03=0.99, _12=0.98)
    found = {"A": A, "B": B, "chance": [0.1, 0.05]}
    small, large = sizes = by_size(RESULTS, found, 400)
    assert (small.num_rows, large.num_rows) == (4, 40)
    assert (small.share, large.share) == (0.01, 0.1)
    assert small.between == (0.3, 0.2)
    assert small.with_largest == pytest.approx((0.6, 0.45))
    assert large.between == large.with_largest == (0.9, 0.8)
    assert table(sizes) == [
        ["4", "1 %", "4.0000 ± 0.7071", "3.0000 ± 0.3536", "0.300", "0.200", "0.600", "0.450"],
        ["40", "10 %", "3.1250 ± 0.1768", "2.1250 ± 0.1768", "0.900", "0.800", "0.900", "0.800"],
    ]
    told = json.loads(json.dumps(as_dict(400, RESULTS, sizes, found), allow_nan=False))
    assert told["sizes"][0]["overlap_with_largest"] == pytest.approx({"A": 0.6, "B": 0.45})
    assert told["sizes"][1]["seeds"] == [1, 2]
    assert told["overlap_by_chance"] == {"A": 0.1, "B": 0.05}
    assert [run["init_lr"] for run in told["runs"]] == [0.02, 0.01, 0.04, None]
    assert run_table(RESULTS)[3] == ["4-rows-s1", "4", "1", "-", "4.5000", "3.2500"]


def test_one_seed(tmp_path: Path) -> None:
    """There is nothing between seeds, and the largest sample is that of the same seed."""
    results = [RESULTS[0], RESULTS[3]]
    found = {"A": [[1.0, 0.6], [0.6, 1.0]], "B": [[1.0, 0.5], [0.5, 1.0]], "chance": [0.1, 0.1]}
    small, large = sizes = by_size(results, found, 400)
    assert small.with_largest == (0.6, 0.5)
    assert [math.isnan(value) for value in (*small.between, *large.with_largest)] == [True] * 4
    assert table(sizes)[1] == ["40", "10 %", "3.0000", "2.0000", "-", "-", "-", "-"]
    assert as_dict(400, results, sizes, found)["sizes"][1]["overlap_with_largest"]["A"] is None
    draw_sensitivity(tmp_path / "picture.png", sizes, (0.1, 0.1))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_runs(tmp_path: Path) -> None:
    """Finished ones only; of a run that takes its best adapter, the loss of that."""
    draw = Draw(8, 1)
    assert read_result(tmp_path / "nowhere", draw) is None
    assert read_result(made_up_run(tmp_path / "early", finished=False), draw) is None
    folder = made_up_run(tmp_path / "last")
    result = read_result(folder, draw)
    assert result is not None
    assert (result.init_loss, result.loss) == (2.0, 0.75)
    assert math.isnan(result.init_lr)
    (folder / "init.json").write_text('{"step": {"init_lr": 0.125}}')
    result = read_result(folder, draw)
    assert result is not None
    assert result.init_lr == 0.125
    result = read_result(made_up_run(tmp_path / "best", {"load_best_model_at_end": True}), draw)
    assert result is not None
    assert result.loss == 0.5


def test_lists_of_numbers() -> None:
    assert numbers("--share", "0.1,1e-3,0.1,", float) == (0.1, 0.001)
    with pytest.raises(ConfigError, match="--init-seeds 1,x must be whole numbers"):
        numbers("--init-seeds", "1,x", int)
    with pytest.raises(ConfigError, match="--share is empty"):
        numbers("--share", ",", float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--method lora", "--method lora: the bases of an init are compared"),
        ("--method lora-xs", "Give one of lora-sb, sb-random"),
        ("--data rows.jsonl", "Name held-out rows by --eval-data"),
        ("--share 2", "--share 2 is not a share of the rows"),
        ("--init-seeds -1", "--init-seed -1 is not allowed"),
        ("--num-gpus 1", "--num-procs (CPU) and --num-gpus exclude each other"),
        ("--init-samples 8", "No such option '--init-samples'"),
        ("--init-from runs/x", "No such option '--init-from'"),
    ],
)
def test_refused_before_anything_starts(given: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    command = f"sensitivity --num-procs 1 --output-dir {folder} {given}"
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not folder.exists()


def test_a_folder_of_something_else_is_refused_before_rows_are_counted(tmp_path: Path) -> None:
    """There is no such model: whoever looked for rows would say so."""
    (tmp_path / "thesis.tex").touch()
    command = f"sensitivity --num-procs 1 --output-dir {tmp_path} --model nobody/nothing"
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2, result.output
    assert "is not empty, and has no sensitivity.json" in result.output


OPTIONS: dict[str, Any] = {"r": 4, "lr": 1e-3, "init_data": ["a.jsonl"], "processes": 2}


def test_the_folder_of_a_sweep(tmp_path: Path) -> None:
    """Goes on with the same options, and is refused with others; --overwrite starts anew."""
    folder = tmp_path / "study"
    pictures = ["sensitivity.png"]
    with sweep_folder(folder, "sensitivity", OPTIONS, overwrite=False):
        (folder / RUNS / "one").mkdir(parents=True)
        for name in ("mine.txt", "mine.png", "sensitivity.md", *pictures):
            (folder / name).write_text("not theirs, or theirs")
        with (
            pytest.raises(ConfigError, match="another `lorasb sensitivity` is at work there"),
            sweep_folder(folder, "sensitivity", OPTIONS, overwrite=False),
        ):
            pass
    with sweep_folder(folder, "sensitivity", OPTIONS, overwrite=False):
        assert (folder / RUNS).is_dir()
    other = OPTIONS | {"r": 8, "processes": 1, "init_data": None}
    with pytest.raises(ConfigError) as error:
        check_folder(folder, "sensitivity", other, overwrite=False)
    message = str(error.value)
    assert "--r is 8 now, and was 4\n" in message
    assert "processes is 1 now, and was 2\n" in message
    assert "--init-data is None now, and was ['a.jsonl']\n" in message
    assert "--lr" not in message
    with sweep_folder(folder, "sensitivity", other, True, pictures):
        left = {path.name for path in folder.iterdir()} - {"sensitivity.lock"}
        assert left == {"mine.txt", "mine.png", "sensitivity.json"}
    check_folder(folder, "sensitivity", other, overwrite=False)
    (folder / "sensitivity.json").unlink()
    with pytest.raises(ConfigError, match=r"not empty, and has no sensitivity\.json"):
        check_folder(folder, "sensitivity", other, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        check_folder(folder / "mine.txt", "sensitivity", other, overwrite=True)


def test_what_was_overwritten_in_part_can_be_overwritten(tmp_path: Path) -> None:
    """The removal fails half-way, as if it was killed there."""
    with sweep_folder(tmp_path, "sensitivity", OPTIONS, overwrite=False):
        (tmp_path / "sensitivity.md").mkdir()  # which is no file to be removed
        (tmp_path / RUNS).mkdir()
    other = OPTIONS | {"r": 8}
    with pytest.raises(OSError), sweep_folder(tmp_path, "sensitivity", other, True):  # noqa: PT011
        pass
    assert not (tmp_path / RUNS).exists()
    with pytest.raises(ConfigError, match="--r is 8 now, and was 4"):
        check_folder(tmp_path, "sensitivity", other, overwrite=False)
    (tmp_path / "sensitivity.md").rmdir()
    with sweep_folder(tmp_path, "sensitivity", other, overwrite=True):
        check_folder(tmp_path, "sensitivity", other, overwrite=False)


def test_commands_of_runs() -> None:
    """As they would be typed, on this host and on one of a hostfile."""
    values: dict[str, Any] = dict.fromkeys(LaunchOptions.__dataclass_fields__)
    values |= {"include": "", "exclude": "b", "launcher": "pdsh", "launcher_args": ""}
    values |= {"env": (), "no_ssh": False, "allow_fewer_hosts": False, "skip_preflight": False}
    values |= {"failure_timeout": 60.0, "start_timeout": 600.0, "max_restarts": 2, "dry_run": True}
    here = LaunchOptions(**values | {"num_procs": 2, "exclude": ""})
    options = {"init_samples": 8, "init_seed": 1, "lr": None, "init_data": ("a", "b")}
    words = train_command(here, options, Place(), 29501)
    assert " ".join(words[3:]) == (
        "train --num-procs 2 --max-restarts 2 --master-port 29501 --init-samples 8 --init-seed 1 "
        "--init-data a --init-data b"
    )
    several = LaunchOptions(**values | {"hostfile": "hosts", "num_nodes": 2})
    words = train_command(several, {}, Place(include="a:0,1"))
    assert " ".join(words[3:]) == "train --hostfile hosts --include a:0,1 --max-restarts 2"


def test_why_a_run_has_failed(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert errors_in(log) == ""
    log.write_text("step 1\nlorasb: error: first\nlorasb: restart 1\nlorasb: error: last,\nmore\n")
    assert errors_in(log) == "last,\nmore"
