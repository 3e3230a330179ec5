"""scripts/fetch_demo.py, as far as it goes without a network."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.runs import ROOT


def test_a_folder_of_others_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may be anybody's folder, with a model of that name in it."""
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    main = runpy.run_path(str(ROOT / "scripts/fetch_demo.py"))["main"]
    weights = tmp_path / "SmolLM2-135M-Instruct" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("theirs")
    with pytest.raises(SystemExit, match="is none of ours"):
        main()
    assert weights.read_text() == "theirs"
