"""What a run stores means the same from every folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_ds.config.resolve import load_run_config, with_adapter
from lorasb_ds.config.stored_paths import ABSOLUTE, absolute, with_absolute_paths
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.training.artifacts import describe, save_adapter
from lorasb_ds.training.prepare import prepare
from tests.runs import word_rows, write_jsonl

KEPT = {
    "demo": "model",
    "org/name": "model",
    "openai/gsm8k:main@test": "data",
    "reasoning-gym:word_sorting?size=3": "data",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "bos").mkdir(parents=True)
    (tmp_path / "rows[1].jsonl").touch()
    return tmp_path


@pytest.mark.parametrize("name", KEPT)
def test_names_are_kept(here: Path, name: str) -> None:
    (here / "demo").mkdir()  # is not what --model demo means
    assert with_absolute_paths({KEPT[name]: name}) == {KEPT[name]: name}
    if KEPT[name] == "data":
        assert with_absolute_paths({"data": (name,)}) == {"data": (name,)}


def test_paths_are_absolute(here: Path) -> None:
    for name in ("models/bos", "./models/bos", "models/../models/bos/", "~/models/bos"):
        assert absolute(name) == str(here / "models/bos")
    stored = with_absolute_paths(
        {
            "model": "models/bos",
            "data": ("rows[1].jsonl", "org/data"),
            "eval_data": "~/rows[1].jsonl",
            "init_data": None,
            "method": "peft:dora.json",
            "init_from": "runs/one",
            "resume": "auto",
            "r": 4,
        }
    )
    assert stored == {
        "model": str(here / "models/bos"),
        "data": (str(here / "rows[1].jsonl"), "org/data"),
        "eval_data": str(here / "rows[1].jsonl"),
        "init_data": None,
        "method": f"peft:{here}/dora.json",
        "init_from": str(here / "runs/one"),
        "resume": "auto",
        "r": 4,
    }
    (here / "link").symlink_to("models")
    assert absolute("link/bos") == str(here / "link/bos"), "links may lead elsewhere later"


@pytest.mark.usefixtures("one_process")
def test_a_run_of_relative_paths(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run.json and its adapter name the base and the rows so that any folder finds them."""
    write_jsonl(tmp_path / "rows.jsonl", word_rows(8))
    monkeypatch.chdir(tmp_path)
    model = os.path.relpath(tiny_model, tmp_path)
    given = {"model": model, "data": "rows.jsonl", "r": 2, "init_samples": 4, "max_steps": 1}
    run = prepare(load_run_config(given), 1)
    folder = Path("runs/one")
    described = describe(run, folder)
    config = described["config"]
    assert config["model"] == str(tiny_model)
    assert config["data"] == (str(tmp_path / "rows.jsonl"),)
    assert config["output_dir"] == str(tmp_path / folder)
    A, B = torch.ones(2, 48), torch.ones(48, 2)
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_adapter(run, folder / "adapter", {f"{layer}A.weight": A, f"{layer}B.weight": B}, pairs=1)
    (folder / "run.json").write_text(json.dumps(described))
    monkeypatch.chdir("/")
    stored = json.loads((tmp_path / folder / "adapter/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tiny_model)
    assert read_adapter(str(tmp_path / folder)).base_path == str(tiny_model)
    replayed = load_run_config({}, str(tmp_path / folder / "run.json"))
    assert prepare(replayed, 1).made_from == run.made_from
    assert with_adapter({}, str(tmp_path / folder))["model"] == str(tiny_model)


def replay(folder: Path, mark: bool, given: dict[str, Any] | None = None, **stored: Any) -> Any:
    content = {"config": {"model": "org/name", "data": ["org/data"], "r": 4, **stored}}
    (folder / "run.json").write_text(json.dumps({**content, **({ABSOLUTE: True} if mark else {})}))
    return load_run_config(given or {}, str(folder / "run.json"))


@pytest.mark.parametrize("field", ["model", "data"])
def test_hub_names_are_no_folders(here: Path, field: str) -> None:
    """A folder with the name of what the run took from the hub is not taken for it."""
    name = {"model": "org/name", "data": "org/data"}[field]
    run = here / "run"
    run.mkdir()
    assert replay(run, mark=True).model == "org/name"
    (here / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"--{field}: the run's {name} is the hub's"):
        replay(run, mark=True)
    replay(run, mark=True, given={field: f"./{name}"})  # means the folder
    if field == "model":
        with pytest.raises(ConfigError, match="is the hub's"):
            with_adapter({}, str(run))
        assert with_adapter({"model": "x"}, str(run))["model"] == "x"


def test_earlier_runs_mean_what_is_here(here: Path) -> None:
    """Those of before, whose paths are relative, are replayed as they were."""
    run = here / "run"
    run.mkdir()
    config = replay(run, mark=False, model="models/bos", data=["rows[1].jsonl"])
    assert (config.model, config.data) == ("models/bos", ("rows[1].jsonl",))
    assert with_adapter({}, str(run))["model"] == "models/bos"
