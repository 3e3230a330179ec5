"""What is read before a run begins, against the files that there are."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.models import checkpoint_files
from lorasb_ds.models.checkpoint_files import StoredTensor
from lorasb_ds.models.loading import load_base
from lorasb_ds.training.prepare import prepare
from tests.classifiers import opinions
from tests.runs import word_rows, write_jsonl


@pytest.mark.parametrize("task_type", ["causal-lm", "sequence-classification"])
def test_each_header_is_read_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_type: str
) -> None:
    """By checking a run, planning it, identifying its base, and loading it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(folder, max_shard_size="20KB")
    files = {path.name for path in folder.glob("*.safetensors")}
    assert len(files) > 1
    headers, opened = Counter[str](), Counter[str]()
    read_header, open_file = checkpoint_files.read_header, Path.open

    def counted_header(path: Path, option: str) -> dict[str, StoredTensor]:
        headers[path.name] += 1
        return read_header(path, option)

    def counted_open(path: Path, *args: object, **kwargs: object) -> object:
        opened[path.name] += path.parent == folder
        return open_file(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(checkpoint_files, "read_header", counted_header)
    monkeypatch.setattr(Path, "open", counted_open)
    rows = word_rows(8) if task_type == "causal-lm" else opinions(8)
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"model": str(folder), "data": data, "r": 4, "init_samples": 4, "task_type": task_type}
    run = prepare(load_run_config(given), 1)
    load_base(run.base, run.config, run.ds_config)
    assert headers == dict.fromkeys(files, 1)
    # The header, and the samples that the digest is of.
    assert {name: opened[name] for name in files} == dict.fromkeys(files, 2)


def test_a_mixture_of_experts_is_not_classified_with(tiny_moe: Path, tmp_path: Path) -> None:
    given = {"model": str(tiny_moe), "data": write_jsonl(tmp_path / "rows.jsonl", opinions(8))}
    with pytest.raises(ConfigError, match="is a mixture of experts, which cannot be trained as a"):
        prepare(load_run_config(given | {"task_type": "sequence-classification"}), 1)
