"""Ranks by layer (``--rank-allocation``): numbers go where the next direction captures most."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorasb_ds.config.overwriting import read_object
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import RUN_JSON
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.basis import open_basis, stored_ranks
from lorasb_ds.models.linear_layers import Shapes


def planned_ranks(config: RunConfig, targets: Shapes, run: Path | None) -> dict[str, int]:
    """Return the ranks that ``--rank-allocation energy`` gives to the layers. Not collective.

    Args:
        targets: layers with an adapter. Those that the basis lacks get --r; ``check_basis`` will
            refuse it.
        run: the folder of the run that is resumed, whose basis has the ranks; None: they are made
            from the spectra in --init-from.
    Raises:
        ConfigError: if the basis cannot be read, or allows no other ranks.
    """
    if run is not None:
        return dict.fromkeys(targets, config.r) | _ranks_of_run(config, run)
    assert config.init_from is not None, "load_run_config has refused it"
    option = f"--init-from {config.init_from}"
    with open_basis(Path(config.init_from), option) as file:
        stored = stored_ranks(file)
        spectra = {n: file.get_tensor(f"{n}.S").tolist() for n in targets if n in stored}
    largest = max(stored.values(), default=0)
    if largest <= config.r:
        raise ConfigError(
            f"--rank-allocation energy: the basis of {option} has r = {largest}, so that no layer "
            f"can have a larger rank than --r {config.r}. Give a smaller --r, or a basis with more "
            f"directions: `lorasb init --r {2 * config.r}`."
        )
    gains = {name: [s * s for s in S[: stored[name]]] for name, S in spectra.items()}
    ranks = allocate_ranks(gains, len(gains) * config.r**2)
    return dict.fromkeys(targets, config.r) | ranks


def _ranks_of_run(config: RunConfig, run: Path) -> dict[str, int]:
    """Return the ranks in the basis of a run that is resumed, which must have the same options."""
    earlier = read_object(run / RUN_JSON).get("config")
    made = earlier if isinstance(earlier, dict) else {}
    for option, field in (("--r", "r"), ("--rank-allocation", "rank_allocation")):
        if (asked := getattr(config, field)) != made.get(field):
            raise ConfigError(
                f"--resume {config.resume}: {option} {asked} differs from the run's "
                f"{made.get(field)}. Leave it out, or start a new run with --init-from."
            )
    with open_basis(run, f"--resume {config.resume}") as file:
        return stored_ranks(file)


def allocate_ranks(gains: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Return a rank for each layer, so that ``Σ r²`` is at most a budget and much is gained.

    Every layer begins with rank 1. The layer whose next direction gains most for each number that
    it adds, 2 r + 1 of them, gets it, as long as the budget has room for some layer's.

    A layer's gains descend and its costs ascend, so that the ranks at the first direction that does
    not fit are exactly the best for what they cost: no other ranks of that cost gain more. After
    that, less remains than one direction costs, and the rest of the result is a good one: what the
    best ranks of the whole budget would gain in addition is less than that direction.

    Args:
        gains: layer -> what each of its directions gains, none more than the one before it; of as
            many as its rank may be, one at least.
        budget: at least one number for each layer.
    """
    ranks = dict.fromkeys(gains, 1)
    left = budget - len(gains)
    # Equal gains go to the layers in their order.
    names = list(gains)
    candidates = [step for i, name in enumerate(names) for step in _next(i, gains[name], 1)]
    heapq.heapify(candidates)
    while candidates:
        _, i = heapq.heappop(candidates)
        r = ranks[names[i]]
        if (cost := 2 * r + 1) > left:
            continue
        left -= cost
        ranks[names[i]] = r + 1
        for step in _next(i, gains[names[i]], r + 1):
            heapq.heappush(candidates, step)
    return ranks


def _next(i: int, gains: Sequence[float], r: int) -> Iterator[tuple[float, int]]:
    """Yield the step from rank r of layer i to the next, if there is one; the best is smallest."""
    if r < len(gains):
        yield -gains[r] / (2 * r + 1), i
