"""What `--dry-run` and `lorasb compare` look at before anything starts: model and rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from launcher.cli import main
from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.data.first_rows import LOOKED_AT, describe_first_rows
from lorasb_ds.errors import ConfigError
from tests.runs import word_rows, write_jsonl

SWEEP = ("compare", "--method", "lora-sb", "--lr", "1e-3", "--output-dir", "sweep")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a model and rows."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", word_rows(16))
    write_jsonl(tmp_path / "held_out.jsonl", word_rows(4))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model/tokenizer.json").write_text("{}")
    save_file({"w": np.zeros((4, 4), np.float32)}, tmp_path / "model/model.safetensors")


def say(*options: str, verb: tuple[str, ...] = ("train", "--dry-run"), status: int = 0) -> str:
    given = ["--model", "model", "--data", "rows.jsonl", "--eval-data", "held_out.jsonl"]
    result = CliRunner().invoke(main, [*verb, *given, "--num-procs", "1", *options])
    assert result.exit_code == status, result.output
    return result.stderr


def test_what_is_there_is_described() -> None:
    said = say()
    assert "--model model: config.json, a tokenizer, 1 tensors of 0.00 GiB" in said
    assert "--data rows.jsonl: 16 rows: 16 question/answer" in said
    assert "--eval-data held_out.jsonl: 4 rows: 4 question/answer" in said
    result = CliRunner().invoke(main, ["train", "--dry-run", "--num-procs", "1"])
    assert len(result.stdout.splitlines()) == 1, "the command alone"
    assert "--data reasoning-gym:" in result.stderr
    assert "rows are generated at the start, and not looked at" in result.stderr


def test_names_on_the_hub_are_not_looked_at() -> None:
    said = say("--model", "some/one", "--data", "some/rows@train")
    assert "--model some/one is a name on the hub, which is not looked at" in said
    assert "--data some/rows@train is a name on the hub, which is not looked at" in said


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    wrong = ("--model", "./none", "--eval-data", "gone.csv", "--init-data", "gone.json")
    said = say(*wrong, status=2)
    assert "--model ./none: there is no such folder" in said
    assert "--eval-data gone.csv: there is no such file" in said
    assert "--init-data gone.json: there is no such file" in said
    for name in ("rows.jsonl", "held_out.jsonl"):
        write_jsonl(tmp_path / name, [{"ask": "1", "say": "2"}] * 3)
    assert "--data rows.jsonl: no known prompt and response columns" in say(status=2)
    said = say("--prompt-column", "ask", "--response-column", "say")
    assert "--data rows.jsonl: 3 rows: 3 ask/say" in said


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "the folder has no config.json"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("tokenizer.json", None, "has no tokenizer. It needs tokenizer.json"),
        ("model.safetensors", None, "the weights must be model.safetensors"),
        ("model.safetensors", "torn", "model.safetensors is no whole safetensors file"),
    ],
)
def test_a_folder_that_is_no_model(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    """It ends a comparison before its first run, too."""
    (tmp_path / "model" / file).unlink()
    if content is not None:
        (tmp_path / "model" / file).write_text(content)
    assert message in say(status=2)
    assert message in say(verb=SWEEP, status=2)
    assert not (tmp_path / "sweep").exists(), "no run has started"


def test_files_that_an_index_names(tmp_path: Path) -> None:
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/part-1.safetensors")
    index = {"weight_map": {"w": "part-1.safetensors", "v": "part-2.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    assert "part-2.safetensors is missing" in say(status=2)


def test_what_only_the_hosts_have(tmp_path: Path) -> None:
    """They may not be here; what is here is looked at."""
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    shutil.rmtree(tmp_path / "model")
    hosts = ("--hostfile", "hosts", "--master-addr", "10.0.0.1", "--output-dir", "out")
    said = say(*hosts, "--data", "/data/rows.jsonl")
    assert "--model model is not here, and not looked at: `lorasb doctor` asks the hosts" in said
    assert "--data /data/rows.jsonl is not here, and not looked at" in said
    assert "--eval-data held_out.jsonl: 4 rows" in said
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    assert "no known prompt and response columns" in say(*hosts, status=2)


def test_first_rows_decide_as_all_of_them_would(tmp_path: Path) -> None:
    """Rows are counted on until it is certain that the run would take them, or would not."""
    options, bad = DataOptions(), {"question": "?", "answer": ""}
    good, many = word_rows(1), LOOKED_AT * 2
    file = write_jsonl(tmp_path / "some.jsonl", [*[bad] * 20, *good * many])
    said = describe_first_rows(file, options)
    assert said.endswith(
        f"{many + 20:,} rows; of the first 1,000: 980 question/answer, 20 skipped: no response"
    )
    file = write_jsonl(tmp_path / "late.jsonl", [*[bad] * LOOKED_AT, *good * LOOKED_AT * 30])
    assert "of the first 1,001: 1 question/answer" in describe_first_rows(file, options)
    file = write_jsonl(tmp_path / "many.jsonl", [*[bad] * 200, *good * many])
    with pytest.raises(ConfigError, match=r"200 of 2200 rows would be skipped \(no response\)"):
        describe_first_rows(file, options)
    file = write_jsonl(tmp_path / "none.jsonl", [bad] * many)
    with pytest.raises(ConfigError, match=r"no row is left to learn from \(2000 skipped"):
        describe_first_rows(file, options)


def test_rows_with_a_label(tmp_path: Path) -> None:
    options = DataOptions(task_type="sequence-classification")
    rows = [{"sentence1": "a", "sentence2": "b", "label": n} for n in (0, 1, 1)]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    said = describe_first_rows(file, options)
    assert said.endswith("3 rows: 3 sentence1/sentence2/label")
    file = write_jsonl(tmp_path / "none.jsonl", [{"sentence1": "a", "label": 1}])
    with pytest.raises(ConfigError, match="no known columns of a text and its label"):
        describe_first_rows(file, options)


IMPORTED = """
import sys
from launcher.cli import main
try:
    main()
finally:
    print({"torch", "datasets", "transformers"} & set(sys.modules))
"""


def test_neither_torch_nor_datasets_is_imported() -> None:
    """The answer takes a second."""
    table = pandas.DataFrame(word_rows(3))
    table.to_csv("rows.csv", index=False)
    table.to_parquet("rows.parquet")
    words = "train --dry-run --num-procs 1 --model model --data rows.csv --data rows.parquet"
    command = [sys.executable, "-c", IMPORTED, *words.split(), "--data", "rows.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "rows.parquet: 3 rows: 3 question/answer" in done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
