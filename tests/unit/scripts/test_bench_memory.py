"""What the benchmarks of loading measure and compute is what it is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import ROOT, run_ranks


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_watched_tells_kinds_of_memory(tmp_path: Path) -> None:
    """In a process of its own: what others have left in this one's heap would count, too."""
    run_ranks("watched", 1, folder=str(tmp_path))


@pytest.mark.usefixtures("scripts")
def test_80_layers_from_two() -> None:
    from bench_wide import LAYERS, VOCABULARY, peak_of_all, seconds_of_all

    # 3 s a layer, 2 s for a vocabulary of 1000.
    assert seconds_of_all(5, 8, 1000) == pytest.approx(LAYERS * 3 + 2 * VOCABULARY / 1000)
    hidden, tokens, r = 64, 10, 4

    def model(layers: int, vocabulary: int, ranks: int) -> dict[str, float]:
        """A rank's bytes as they are made up: blocks of 1000 bytes, two tables, work of 500."""
        share = (1000 * layers + 2 * 2 * vocabulary * hidden) / ranks
        work = 500 + 2 * vocabulary * hidden  # one table is gathered
        training = layers * (16 * r * r + 2 * tokens * hidden)
        return {
            "held_bytes": share,
            "block_bytes": 1000 / ranks,
            "basis_bytes": 300,
            "optimizer_bytes": 16 * r * r,
            "activation_bytes": 2 * tokens * hidden,
            "load_peak_bytes": share + work,
            "init_peak_bytes": share + work + 300 * layers,
            "step_peak_bytes": share + work + training,
        }

    small = model(2, 1000, 2)
    for ranks in (2, 8):
        whole = model(LAYERS, VOCABULARY, ranks)
        for part in ("load", "init", "step"):
            predicted = peak_of_all(small, part, hidden, 1000, ranks)
            assert predicted == pytest.approx(whole[f"{part}_peak_bytes"]), (part, ranks)
