"""A sweep: methods x learning rates x ranks x seeds, as runs that have names. Torch-free, pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from lorasb_ds.config.methods import METHODS, PEFT_PREFIX
from lorasb_ds.errors import ConfigError, option_name

Number = TypeVar("Number", int, float)

# Options that a sweep sets in its runs, and that the user gives for the sweep.
SWEPT = ("method", "lr", "r", "seed", "output_dir", "overwrite", "resume")
# Options that a method may have for itself: all but rows, batches and the number of steps.
OWN = (
    *("lora_alpha", "gamma", "precondition", "target_modules", "rank_allocation"),
    *("init_lr", "init_update", "init_samples", "init_data", "init_seed", "rebase_every"),
    "init_from",
    *("optimizer", "weight_decay", "lr_scheduler", "warmup_ratio", "max_grad_norm"),
)
NAME = re.compile(r"[\w+][\w.+-]*", re.ASCII)  # of a folder, on every file system


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    method: str
    lr: float
    r: int | None  # None: a PEFT configuration's that has none
    seed: int

    @property
    def name(self) -> str:
        """``lora-sb-r32-lr2e-3-s42``."""
        r = "" if self.r is None else f"-r{self.r}"
        return f"{label(self.method)}{r}-lr{short(self.lr)}-s{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """Return the fields of RunConfig. The r of a PEFT configuration is in its file."""
        own = {"method": method_of(self.method), "lr": self.lr, "seed": self.seed}
        return own if is_file(self.method) else {**own, "r": self.r}


def method_of(method: str) -> str:
    """Return the method of ``NAME=METHOD``, which is METHOD with options of its own."""
    name, is_named, named = method.partition("=")
    return named if is_named and NAME.fullmatch(name) else method


def label(method: str) -> str:
    """Return a method's name in names of runs: its own, a file of PEFT's for its configuration."""
    if (named := method_of(method)) != method:
        return method.removesuffix(f"={named}")
    return Path(method.removeprefix(PEFT_PREFIX)).stem if is_file(method) else method


def is_file(method: str) -> bool:
    return method_of(method).startswith(PEFT_PREFIX)


def short(number: float) -> str:
    """Return the shortest text that a number can be read back from: 2e-3, 1.2e-2, 1e0."""
    # Not Decimal.normalize: it rounds to the precision of a context that libraries change.
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    assert isinstance(exponent, int)
    first, *rest = map(str, digits)
    power, decimals = exponent + len(rest), "".join(rest).rstrip("0")
    return f"{first}{'.' if decimals else ''}{decimals}e{power}"


@dataclass(frozen=True)
class Sweep:
    """Learning rates and ranks of every method; seeds, the first of which every trial has.

    Args:
        best: number of (method, r) that get the other seeds, at their best learning rate; with None
            all do, at all learning rates.
        lrs_of_r: learning rates of a method at one r, in place of ``lrs``.
    """

    lrs: Mapping[str, tuple[float, ...]]
    ranks: Mapping[str, tuple[int | None, ...]]
    seeds: tuple[int, ...]
    best: int | None = None
    lrs_of_r: Mapping[tuple[str, int | None], tuple[float, ...]] = field(default_factory=dict)

    def rates(self, method: str, r: int | None) -> tuple[float, ...]:
        """Return the learning rates of a row of the table."""
        return self.lrs_of_r.get((method, r), self.lrs[method])

    @property
    def contenders(self) -> list[tuple[str, int | None]]:
        """Every (method, r), each of which is a row of the table."""
        return [(method, r) for method, ranks in self.ranks.items() for r in ranks]

    def first(self) -> list[Trial]:
        """Return the trials that do not depend on results."""
        seeds = self.seeds if self.best is None else self.seeds[:1]
        return [
            Trial(method, lr, r, seed)
            for method, r in self.contenders
            for lr in self.rates(method, r)
            for seed in seeds
        ]

    def then(self, ranking: Sequence[tuple[str, int | None, float]]) -> list[Trial]:
        """Return the trials that depend on results.

        Args:
            ranking: (method, r, its best learning rate), the best one first.
        """
        if self.best is None:
            return []
        return [
            Trial(method, lr, r, seed)
            for method, r, lr in ranking[: self.best]
            for seed in self.seeds[1:]
        ]

    def describe(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "lrs": {method: list(lrs) for method, lrs in self.lrs.items()},
            "lrs_of_r": {f"{label(m)}-r{r}": list(lrs) for (m, r), lrs in self.lrs_of_r.items()},
            "ranks": {method: list(ranks) for method, ranks in self.ranks.items()},
            "seeds": list(self.seeds),
            "best": self.best,
        }


def make_sweep(
    methods: Sequence[str],
    lrs: Sequence[str],
    ranks: Sequence[str],
    seeds: Sequence[str],
    best: int | None = None,
    files: Mapping[str, int | None] | None = None,
) -> Sweep:
    """Make a sweep from the words of a command line.

    Args:
        lrs, ranks: lists as ``1e-3,2e-3`` for all methods, or ``METHOD=1e-4,3e-4`` for one; of
            lrs also ``METHOD-rN=1e-4,3e-4`` for one at r = N.
        seeds: lists.
        files: the rank that each PEFT configuration among the methods has.
    Raises:
        ConfigError: if they do not make a sweep, or two runs would have the same name.
    """
    problems = [
        f"--method {method!r} is not known. Give one of {', '.join(METHODS)}, or "
        f"{PEFT_PREFIX}FILE.json."
        for method in methods
        if method_of(method) not in METHODS and not is_file(method)
    ]
    problems += [
        f"--method {method}: {label(method)!r} is part of its runs' names, which are letters, "
        "digits and '._+-'. Rename the file."
        for method in methods
        if is_file(method) and not NAME.fullmatch(label(method))
    ]
    if problems:
        raise ConfigError(*problems)
    ours = [method for method in methods if not is_file(method)]
    given = _by_method("--r", ranks, ours, int)
    of_methods = {method: given.get(method, ((files or {}).get(method),)) for method in methods}
    rows = {f"{label(m)}-r{r}": (m, r) for m, of_method in of_methods.items() for r in of_method}
    names = {*rows} - {*map(label, methods)}  # a method may be called like a row of another
    of_rows = [word for word in lrs if word.rpartition("=")[0] in names]
    sweep = Sweep(
        lrs=_by_method("--lr", [word for word in lrs if word not in of_rows], methods, _finite),
        ranks=of_methods,
        seeds=_numbers("--seed", seeds, int),
        best=best,
        lrs_of_r={
            row: _numbers("--lr", [w.rpartition("=")[2] for w in words], _finite)
            for name, row in rows.items()
            if (words := [word for word in of_rows if word.rpartition("=")[0] == name])
        },
    )
    missing = {"--method": methods, "--seed": sweep.seeds}
    missing |= {
        f"--lr of {label(method)}{_at(r)}": sweep.rates(method, r) for method, r in sweep.contenders
    }
    missing |= {f"--r of {label(method)}": found for method, found in sweep.ranks.items()}
    if empty := [name for name, found in missing.items() if not found]:
        raise ConfigError(
            f"A sweep without runs: there is no {', no '.join(empty)}. Give at least one of each: "
            "--method lora-sb --lr 1e-3,4e-3 --r 32 --seed 42."
        )
    check_names(methods, sweep)
    return sweep


def _at(r: int | None) -> str:
    return "" if r is None else f" at r = {r}"


def check_names(methods: Iterable[str], sweep: Sweep) -> None:
    """Refuse a sweep in which two runs have the same name, and so the same folder.

    Raises:
        ConfigError: with what was given twice.
    """
    given = {
        "--method": [label(method) for method in methods],
        "--seed": list(map(str, sweep.seeds)),
    }
    for method, r in sweep.contenders:
        given[f"--lr of {label(method)}{_at(r)}"] = [short(lr) for lr in sweep.rates(method, r)]
    for method, ranks in sweep.ranks.items():
        given[f"--r of {label(method)}"] = list(map(str, ranks))
    twice = [
        f"{value} in {option}"
        for option, values in given.items()
        for value, count in Counter(values).items()
        if count > 1
    ]
    if twice:
        raise ConfigError(
            f"Two runs would have the same name. Given more than once: {', '.join(twice)}. Give "
            "each once; PEFT's files need names of their own."
        )


def own_options(given: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Parse words ``METHOD:OPTION=VALUE`` into method -> its own options.

    Raises:
        ConfigError: for a word of another form, or an option that methods cannot have.
    """
    found: dict[str, dict[str, str]] = {}
    for word in given:
        match = re.fullmatch(r"(.+):([\w-]+)=(.*)", word)
        if match is None:
            raise ConfigError(
                f"--for {word!r} is not METHOD:OPTION=VALUE. Write it as lora-one:precondition=0.1."
            )
        method, field = _method(f"--for {word}", match[1], methods), match[2].replace("-", "_")
        if field not in OWN:
            raise ConfigError(
                f"--for {word}: a method cannot have a {option_name(field)} of its own. It can "
                f"have {', '.join(map(option_name, OWN))}; and --lr METHOD=…, --r METHOD=…"
            )
        found.setdefault(method, {})[field] = match[3]
    return found


def _method(what: str, name: str, methods: Sequence[str]) -> str:
    """Find a method by what --method has, or by its label."""
    for method in methods:
        if name in (method, label(method)):
            return method
    known = ", ".join(map(label, methods)) or "there is none"
    raise ConfigError(f"{what}: {name} is not a --method of this sweep ({known}). Give it, too.")


def _by_method(
    option: str, given: Sequence[str], methods: Sequence[str], number: Callable[[str], Number]
) -> dict[str, tuple[Number, ...]]:
    """Return method -> its own list, or the one of all methods."""
    of_all: list[Number] = []
    own: dict[str, list[Number]] = {}
    for word in given:
        name, is_own, numbers = word.rpartition("=")
        found = _numbers(option, [numbers], number)
        if is_own:
            own.setdefault(_method(f"{option} {word}", name, methods), []).extend(found)
        else:
            of_all.extend(found)
    return {method: tuple(own.get(method, of_all)) for method in methods}


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def _numbers(
    option: str, given: Sequence[str], number: Callable[[str], Number]
) -> tuple[Number, ...]:
    words = [word for text in given for word in text.split(",") if word.strip()]
    try:
        return tuple(map(number, words))
    except ValueError:
        kind = "whole numbers" if number is int else "finite numbers"
        raise ConfigError(
            f"{option} {','.join(words)} must be {kind}, separated by commas. Fix it."
        ) from None
