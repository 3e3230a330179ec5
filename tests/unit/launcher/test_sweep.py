"""What a sweep is, what its runs come to, and which of them is best."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from launcher.sweeps.grid import Sweep, Trial, label, make_sweep, own_options, short
from launcher.sweeps.plots import draw_sweep
from launcher.sweeps.results import TrialResult, read_result
from launcher.sweeps.table import COLUMNS, MethodResult, as_dict, method_results, ranking, table
from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.proportions import Proportion
from tests.runs import made_up_run
from tests.unit.runs.test_plots import drawn, figures

__all__ = ["figures"]  # a fixture

METHODS = ["lora-sb", "lora-xs", "lora"]
losses = st.floats(0.1, 10)


def sweep(
    *methods: str, lr: str = "1e-3,4e-3", r: str = "32", seed: str = "42", best: int | None = None
) -> Sweep:
    return make_sweep(methods, [lr], [r], [seed], best)


def result(
    trial: Trial, loss: float, accuracy: Proportion | None = None, finished: bool = True
) -> TrialResult:
    return TrialResult(
        trial=trial,
        finished=finished,
        problem="",
        loss=loss,
        base_loss=3.0,
        trainable=1000 * (trial.r or 1),
        seconds=60.0 + trial.seed,
        init_seconds=2.0,
        memory_bytes=trial.seed << 30,
        accuracy=accuracy,
    )


def came_to(found: Mapping[Trial, float]) -> dict[Trial, TrialResult]:
    return {trial: result(trial, loss) for trial, loss in found.items()}


def refusal(**words: Any) -> str:
    chosen: dict[str, Any] = {"methods": ["lora-sb"], "lrs": ["1e-3"], "ranks": ["4"]}
    with pytest.raises(ConfigError) as caught:
        make_sweep(**{**chosen, "seeds": ["1"], **words})
    return str(caught.value)


# -- what it is


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_number_comes_back_from_its_name(number: float) -> None:
    assert float(short(number)) == number


def test_names() -> None:
    names = [
        Trial("lora-sb", 2e-3, 32, 42).name,
        Trial("lora", 1.2e-2, 8, 7).name,
        Trial("sb-random-s", 1.0, 1, 0).name,
        Trial("peft:some/folder/dora.v2.json", 3e-4, 16, 1).name,
        Trial("peft:ia3.json", 10, None, 1).name,
    ]
    assert names == [
        "lora-sb-r32-lr2e-3-s42",
        "lora-r8-lr1.2e-2-s7",
        "sb-random-s-r1-lr1e0-s0",
        "dora.v2-r16-lr3e-4-s1",
        "ia3-lr1e1-s1",
    ]


@given(
    st.sets(st.sampled_from(METHODS), min_size=1),
    st.sets(st.floats(1e-8, 10), min_size=1, max_size=4),
    st.sets(st.integers(1, 512), min_size=1, max_size=3),
    st.sets(st.integers(0, 99), min_size=1, max_size=3),
)
def test_all_seeds_of_all(
    methods: set[str], lrs: set[float], ranks: set[int], seeds: set[int]
) -> None:
    words = [",".join(map(str, values)) for values in (lrs, ranks, seeds)]
    found = make_sweep(sorted(methods), *([word] for word in words))
    trials = found.first()
    assert {(t.method, t.lr, t.r, t.seed) for t in trials} == set(
        itertools.product(methods, lrs, ranks, seeds)
    )
    assert len({trial.name for trial in trials}) == len(trials), "names tell them apart"
    assert found.then([("lora", 1, 1.0)]) == []


def test_lists_of_one_method() -> None:
    found = make_sweep(
        ["lora-sb", "lora", "peft:a/dora.json"],
        ["1e-3,4e-3", "lora=1e-4", "lora=2e-4", "8e-3", "dora=5e-4"],
        ["32", "lora-sb=32,96"],
        ["42"],
        files={"peft:a/dora.json": 16},
    )
    assert found.lrs == {
        "lora-sb": (1e-3, 4e-3, 8e-3),
        "lora": (1e-4, 2e-4),
        "peft:a/dora.json": (5e-4,),
    }
    assert found.ranks == {"lora-sb": (32, 96), "lora": (32,), "peft:a/dora.json": (16,)}
    assert list(found.ranks) == list(found.lrs), "rows stand as the methods were given"
    by_file = [trial for trial in found.first() if trial.method.startswith("peft:")]
    assert [trial.options for trial in by_file] == [
        {"method": "peft:a/dora.json", "lr": 5e-4, "seed": 42}
    ], "no --r: the file says it"


def test_learning_rates_of_one_rank() -> None:
    lrs = ["2e-3", "lora-sb-r96=5e-4,1e-3", "x-r2=1e-4"]
    methods = ["lora-sb", "lora", "x-r2=lora-sb"]
    found = make_sweep(methods, lrs, ["32", "lora-sb=32,96"], ["42"])
    assert [(label(t.method), t.r, t.lr) for t in found.first()] == [
        *(("lora-sb", 32, 2e-3), ("lora-sb", 96, 5e-4), ("lora-sb", 96, 1e-3)),
        *(("lora", 32, 2e-3), ("x-r2", 32, 1e-4)),
    ]
    assert found.describe()["lrs_of_r"] == {"lora-sb-r96": [5e-4, 1e-3]}
    twice = refusal(lrs=["1e-3,1e-3", "lora-sb-r8=1e-3"], ranks=["4,8"])
    assert "1e-3 in --lr of lora-sb at r = 4" in twice
    assert "1e-3 in --lr of lora-sb at r = 4" in refusal(lrs=["lora-sb-r4=1e-3,1e-3"], ranks=["4"])
    assert "no --lr of lora-sb at r = 4" in refusal(lrs=["lora-sb-r8=1e-3"], ranks=["4,8"])
    apart = make_sweep(["lora-sb"], ["lora-sb-r4=1e-3", "lora-sb-r4=2e-3"], ["4"], ["42"])
    assert [trial.lr for trial in apart.first()] == [1e-3, 2e-3]


def test_the_best_get_the_other_seeds() -> None:
    found = sweep("lora-sb", "lora", seed="42,43,44", best=1)
    assert {trial.seed for trial in found.first()} == {42}
    assert found.then([("lora", 32, 4e-3), ("lora-sb", 32, 1e-3)]) == [
        Trial("lora", 4e-3, 32, 43),
        Trial("lora", 4e-3, 32, 44),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"methods": ["lora-sc"]}, "--method 'lora-sc' is not known. Give one of lora-sb, lora-xs"),
        ({"methods": []}, "A sweep without runs: there is no --method."),
        ({"lrs": []}, "there is no --lr of lora-sb at r = "),
        ({"lrs": ["lora=1e-3"], "methods": ["lora", "lora-xs"]}, "no --lr of lora-xs at r = "),
        ({"seeds": [","]}, "no --seed."),
        ({"ranks": []}, "no --r of lora-sb."),
        ({"lrs": ["1e-3,0.001"]}, "Given more than once: 1e-3 in --lr of lora-sb at r = "),
        ({"lrs": ["1e-3", "1e-3"]}, "1e-3 in --lr of lora-sb"),
        ({"seeds": ["1,2,1"]}, "1 in --seed."),
        ({"ranks": ["4", "04"]}, "4 in --r of lora-sb."),
        ({"methods": ["lora", "lora"]}, "lora in --method"),
        ({"methods": ["lora", "peft:a/lora.json"]}, "lora in --method."),
        ({"methods": ["peft:a/x.json", "peft:b/x.json"]}, "x in --method."),
        ({"methods": ["peft:a/my dora.json"]}, "Rename the file"),
        ({"lrs": ["fast"]}, "--lr fast must be finite numbers, separated by commas"),
        ({"lrs": ["1e-3,nan"]}, "--lr 1e-3,nan must be finite numbers"),
        ({"lrs": ["lora-sb=inf"]}, "--lr inf must be finite numbers"),
        ({"lrs": ["-1e999"]}, "--lr -1e999 must be finite numbers"),
        ({"ranks": ["8.5"]}, "--r 8.5 must be whole numbers"),
        ({"lrs": ["lora=1e-3"]}, "--lr lora=1e-3: lora is not a --method of this sweep (lora-sb)"),
    ],
)
def test_refusals(words: dict[str, Any], said: str) -> None:
    assert said in refusal(**words)


def test_options_of_one_method() -> None:
    methods = ["lora-one", "peft:a/dora.json"]
    given = ["lora-one:precondition=0.1", "dora:weight-decay=0.01", "lora-one:init-lr=auto"]
    assert own_options(given, methods) == {
        "lora-one": {"precondition": "0.1", "init_lr": "auto"},
        "peft:a/dora.json": {"weight_decay": "0.01"},
    }


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lora-one", "is not METHOD:OPTION=VALUE"),
        ("lora-one:lr=1", "a method cannot have a --lr of its own"),
        ("lora-one:max-steps=9", "a method cannot have a --max-steps of its own"),
        ("lora-one:nonsense=9", "cannot have a --nonsense"),
        ("lora:gamma=9", "lora is not a --method of this sweep (lora-one)"),
    ],
)
def test_what_a_method_cannot_have(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        own_options([word], ["lora-one"])
    assert said in str(caught.value)


# -- what it comes to


@given(st.lists(losses, min_size=12, max_size=12, unique=True))
def test_the_best_learning_rate_is_that_of_the_least_mean(values: list[float]) -> None:
    found = sweep("lora-sb", "lora", lr="1e-3,2e-3,3e-3", seed="1,2")
    by_trial = dict(zip(found.first(), values, strict=True))
    rows = method_results(found, came_to(by_trial))
    table_of = np.array(values).reshape(2, 3, 2).mean(2)  # method, lr
    best = {m: min(means) for m, means in zip(("lora-sb", "lora"), table_of, strict=True)}
    assert [row.method for row in rows] == sorted(best, key=lambda method: best[method])
    for row in rows:
        means = table_of[("lora-sb", "lora").index(row.method)]
        assert row.best_lr == (1e-3, 2e-3, 3e-3)[means.argmin()]
        assert row.loss == pytest.approx(best[row.method])
        assert [rate.loss for rate in row.rates.values()] == pytest.approx(means)
        assert {result.trial.lr for result in row.results} == {row.best_lr}


@given(st.lists(losses, min_size=6, max_size=6, unique=True), st.lists(losses, min_size=4))
def test_more_seeds_of_the_best_do_not_make_another_the_best(
    values: list[float], later: list[float]
) -> None:
    """However they come out: else a command that goes on would run others than before."""
    found = sweep("lora-sb", "lora", lr="1e-3,2e-3,3e-3", seed="1,2,3", best=2)
    first = came_to(dict(zip(found.first(), values, strict=True)))
    chosen = ranking(method_results(found, first))
    for count in range(5):
        more = dict(zip(found.then(chosen)[:count], later, strict=False))
        assert ranking(method_results(found, first | came_to(more))) == chosen


def test_over_the_seeds() -> None:
    found = sweep("lora-sb", seed="1,2,3", best=1)
    low, high = (Trial("lora-sb", lr, 32, 1) for lr in (1e-3, 4e-3))
    more = {Trial("lora-sb", 4e-3, 32, 2): 0.9, Trial("lora-sb", 4e-3, 32, 3): 1.3}
    results = came_to({low: 0.9, high: 0.8, **more})
    shares = [Proportion(40, 80), Proportion(20, 83), Proportion(21, 100)]
    for trial, share in zip([high, *more], shares, strict=True):
        results[trial] = result(trial, results[trial].loss, share)
    (row,) = method_results(found, results)
    by_lr = {lr: rate.loss for lr, rate in row.rates.items()}
    assert by_lr == {1e-3: 0.9, 4e-3: 0.8}, "those of the seed that both have"
    assert row.loss == pytest.approx(np.mean([0.8, 0.9, 1.3]))
    assert row.spread == pytest.approx(np.std([0.8, 0.9, 1.3], ddof=1))
    assert row.accuracy == Proportion(81, 263)
    assert row.seconds == 62
    assert row.memory_bytes == 3 << 30
    assert dict(zip(COLUMNS, *table([row]), strict=True)) == {
        "method": "lora-sb",
        "r": "32",
        "trainable": "32,000",
        "best lr": "4e-3↑",
        "held-out loss": "1.0000 ± 0.2646 (n = 3)",
        "accuracy (95 %)": "30.8% (25.5% to 36.6%)",  # tests/unit/models/test_generation.py
        "time": "0:01:02",
        "init": "2.0 s",
        "GiB": "3.00",
        "loss of each lr": "1e-3: 0.9000, 4e-3: 0.8000",
    }


@pytest.mark.parametrize(
    ("values", "edge"),
    [
        ([1.0], "↕"),
        ([1.0, 2.0, 3.0], "↓"),
        ([2.0, 1.0, 3.0], ""),
        ([3.0, 2.0, 1.0], "↑"),
        ([3.0, 1.0, math.nan], ""),
        ([math.nan, math.nan], ""),
    ],
)
def test_an_end_of_the_list_is_not_tuned(values: list[float], edge: str) -> None:
    lrs = [f"{10 + i}e-4" for i in range(len(values))]
    trials = sweep("lora-sb", lr=",".join(lrs)).first()
    backwards = sweep("lora-sb", lr=",".join(reversed(lrs)))
    results = came_to(dict(zip(trials, values, strict=True)))
    (row,) = method_results(backwards, results)
    assert row.edge == edge, "by the numbers, in whatever order they were given"


def test_runs_that_are_missing() -> None:
    found = sweep("lora-sb", "lora", "lora-xs", seed="1,2")
    sb = [trial for trial in found.first() if trial.method == "lora-sb"]
    xs = Trial("lora-xs", 4e-3, 32, 2)
    results = {trial: result(trial, math.nan, finished=False) for trial in found.first()}
    results |= came_to({sb[0]: 0.7, sb[2]: 0.9, sb[3]: 0.5, xs: 0.6})
    rows = method_results(found, results)
    assert [row.method for row in rows] == ["lora-xs", "lora-sb", "lora"], "the empty one last"
    assert rows[2].best_lr is None
    assert [(*row[3:5], row[-1]) for row in table(rows)] == [
        ("4e-3↑", "0.6000 (n = 1 of 2)", "1e-3: -, 4e-3: 0.6000 (1 of 2)"),
        ("4e-3↑", "0.7000 ± 0.2828 (n = 2)", "1e-3: 0.7000 (1 of 2), 4e-3: 0.7000"),
        ("-", "-", "1e-3: -, 4e-3: -"),
    ]
    assert table(rows)[2][3:-1] == ["-"] * 6
    assert ranking(rows) == [("lora-xs", 32, 4e-3), ("lora-sb", 32, 4e-3)]


@given(
    st.lists(st.one_of(losses, st.just(math.nan)), min_size=12, max_size=12),
    st.sampled_from([None, 1]),
)
def test_what_fails_on_a_seed_is_not_the_best(values: list[float], best: int | None) -> None:
    """As long as a learning rate has all the seeds that any of them has."""
    found = sweep("lora-sb", lr="1e-3,2e-3,3e-3,4e-3", seed="1,2,3", best=best)
    by_seeds = np.array(values).reshape(4, 3)[:, : 3 if best is None else 1]
    results = came_to(dict(zip(found.first(), by_seeds.ravel().tolist(), strict=True)))
    (row,) = method_results(found, results)
    known = np.isfinite(by_seeds)
    whole = [i for i in range(4) if (known[i] | ~known.any(0)).all() and known.any()]
    if not known.any():
        assert row.best_lr is None
    elif whole:
        with_all = by_seeds[whole][:, known.any(0)].mean(1)
        assert row.loss == pytest.approx(with_all.min())
        assert row.best_lr in [(1e-3, 2e-3, 3e-3, 4e-3)[i] for i in whole]
        assert len(row.results) == known.any(0).sum()


def test_a_further_seed_that_fails_is_told_and_changes_no_choice() -> None:
    found = sweep("lora-sb", seed="1,2,3", best=1)
    low, high = found.first()
    results = came_to({low: 0.9, high: 0.8})
    second, third = found.then(ranking(method_results(found, results)))
    results |= came_to({second: 1.2, third: math.nan})
    (row,) = method_results(found, results)
    assert table([row])[0][3:5] == ["4e-3↑", "1.0000 ± 0.2828 (n = 2 of 3)"]
    described = row.describe()
    assert (len(described["runs"]), described["seeds_asked"]) == (2, 3)


def test_json_has_no_nan() -> None:
    found = sweep("lora-sb", "lora", seed="1,2")
    trials = found.first()
    results = {trial: result(trial, math.nan, finished=False) for trial in trials}
    results |= came_to({trials[0]: 0.5})
    content = json.loads(json.dumps(as_dict(found, results), allow_nan=False))
    assert [run["name"] for run in content["runs"]] == [trial.name for trial in trials]
    assert [run["loss"] for run in content["runs"]] == [0.5] + [None] * 7
    best, empty = content["results"]
    assert (best["method"], best["best_lr"], best["at_edge"]) == ("lora-sb", 1e-3, "lower")
    assert best["sweep"] == [
        {"lr": 1e-3, "loss": 0.5, "seeds": 1, "seeds_asked": 2},
        {"lr": 4e-3, "loss": None, "seeds": 0, "seeds_asked": 2},
    ]
    assert best["runs"] == [trials[0].name]
    assert best["loss_std"] is None
    assert empty["best_lr"] is empty["loss"] is empty["accuracy"] is None
    assert content["base_loss"] == 3.0


# -- from folders


def test_a_folder_in_every_state(tmp_path: Path) -> None:
    trial = Trial("lora-sb", 1e-3, 32, 42)
    nothing = read_result(tmp_path / "nothing", trial)
    assert (nothing.finished, nothing.problem) == (False, "")
    assert math.isnan(nothing.loss)
    half = read_result(made_up_run(tmp_path / "half", finished=False), trial)
    assert (half.finished, half.problem) == (False, "unfinished")
    assert math.isnan(half.loss), "of a run that may go on there is no result"
    run = made_up_run(tmp_path / "run")
    (run / "init.json").write_text('{"total_s": 12.5}')
    (run / "eval").mkdir()
    score = {"right": 3, "rows": 8, "share": 0.375, "interval": [0.1, 0.7]}
    scores = {"exact_match": score}
    (run / "eval" / "eval.json").write_text(json.dumps({"results": [{"scores": scores}]}))
    found = read_result(run, trial)
    assert found.finished
    assert found.loss == 0.75, "of the last step"
    assert (found.base_loss, found.init_seconds, found.seconds) == (3.0, 12.5, 20.0)
    assert (found.trainable, found.memory_bytes) == (12345, 6 << 30)
    assert found.accuracy == Proportion(3, 8)
    best = made_up_run(tmp_path / "best", {"load_best_model_at_end": True, "eval_every": 5})
    assert read_result(best, trial).loss == 0.5, "of the step whose adapter it has saved"
    described = json.loads((best / "run.json").read_text())
    described["saved"] = {"step": 10, "stage": "trained", "eval_loss": 0.75}
    (best / "run.json").write_text(json.dumps(described))
    assert read_result(best, trial).loss == 0.75, "as it says: 0.5 may be of other rows"
    for broken in ("", "[]", '{"results": []}', '{"results": [{"scores": {}}]}'):
        (run / "eval" / "eval.json").write_text(broken)
        (run / "init.json").write_text(broken)
        found = read_result(run, trial)
        assert found.accuracy is None
        assert math.isnan(found.init_seconds)


def containers(figure: Figure) -> list[Any]:
    """Those of error bars."""
    return list(figure.axes[0].containers)


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_pictures(tmp_path: Path, figures: list[Figure]) -> None:
    found = sweep("lora-sb", "lora", lr="1e-3,2e-3,4e-3", r="4,8", seed="1,2", best=2)
    assert draw_sweep(tmp_path, tmp_path, method_results(found, {}), math.nan) == []
    values = [0.9, 0.7, math.nan, 0.8, 0.6, 40.0] * 2
    results = came_to(dict(zip(found.first(), values, strict=True)))
    rows: list[MethodResult] = method_results(found, results)
    for row in rows:
        made_up_run(tmp_path / "runs" / row.results[0].trial.name, row.results[0].trial.options)
    pictures = draw_sweep(tmp_path, tmp_path / "runs", rows, 3.0)
    assert [path.name for path in pictures] == [
        "loss-over-steps.png",
        "loss-over-lr.png",
        "loss-over-parameters.png",
    ]
    alone = Trial("lora-sb", 1e-3, 32, 42)
    made_up_run(tmp_path / "runs" / alone.name, alone.options)
    one = method_results(sweep("lora-sb", lr="1e-3"), came_to({alone: 0.5}))
    assert draw_sweep(tmp_path, tmp_path / "runs", one, 3.0) == pictures
    over_steps, over_lr, over_parameters = map(drawn, figures[:3])
    assert "lora-sb, r = 8, lr 2e-3" in over_steps
    assert over_lr["lora-sb, r = 4"] == [(1e-3, 0.9), (2e-3, 0.7)]
    assert over_lr["lora, r = 8"] == [(1e-3, 0.8), (2e-3, 0.6), (4e-3, 40.0)]
    for axes in (over_lr, over_parameters):
        assert ("base" in axes) == (axes is over_lr), "where one is worse"
    assert figures[1].axes[0].get_ylim()[1] < 4, "what is far worse is not on it"
    best = [container.lines[0].get_xydata().tolist() for container in containers(figures[2])]
    assert best == [[[4000, 0.7], [8000, 0.6]]] * 2
    for path in pictures:
        width, height = png_size(path)
        assert width > 600
        assert height > 400
