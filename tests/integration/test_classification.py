"""Classifiers: trained, resumed, loaded by PEFT, evaluated."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from launcher.workers.preview import preview
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.evaluator import evaluate_model
from lorasb_ds.export.adapter_reader import read_adapter
from tests.classifiers import OTHERS, opinions, other_base, pairs, tiny_base
from tests.runs import Runs, metrics, run_worker, write_jsonl

# Family, rows, processes, and what else.
RUNS: dict[str, tuple[str, bool, int, str]] = {
    "classes": ("roberta", False, 2, "--ds-config zero3 --save-every 3 --keep-last 9 --lr 0.01"),
    "numbers": ("bert", True, 1, "--ds-config zero2"),
    "decoder": ("llama", False, 1, "--ds-config zero1 --gradient-checkpointing"),
    "bf16": ("roberta", False, 2, "--ds-config zero2 --dtype bf16"),
    "4bit": ("bert", True, 2, "--ds-config zero3 --dtype bf16 --load-in-4bit"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Runs:
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str) -> Path:
        family, has_numbers, world_size, more = RUNS[name]
        if not (base := folder / family).exists():
            tiny_base(family, base, demo_model)
        rows = pairs(60) if has_numbers else opinions(60)
        data = write_jsonl(folder / f"{name}.jsonl", rows)
        options = f"--task-type sequence-classification --model {base} --data {data} {more}"
        options += " --val-set-size 12 --r 4 --init-samples 16 --max-length 48 --max-steps 5"
        options += f" --micro-batch-size 2 --eval-every 2 --output-dir {folder / name}"
        if "--dtype" not in more:
            options += " --dtype fp32"
        run_worker(*options.split(), world_size=world_size)
        return folder / name

    return Runs(folder, make)


def logits_by_peft(run: Path, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Of each row alone, as a user computes them with transformers and PEFT."""
    content = json.loads((run / "run.json").read_text())
    base: Any = AutoModelForSequenceClassification.from_pretrained(
        content["config"]["model"], num_labels=max(1, len(content["labels"]))
    )
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    found = []
    for row in rows:
        texts = [row[name] for name in ("sentence", "sentence1", "sentence2") if name in row]
        with torch.no_grad():
            found.append(model(**tokenizer(*texts, return_tensors="pt")).logits[0])
    return torch.stack(found)


@pytest.mark.parametrize(
    "name", ["classes", "numbers", "decoder", pytest.param("bf16", marks=pytest.mark.slow)]
)
def test_peft_and_eval_give_what_the_run_measured(runs: Runs, name: str, tmp_path: Path) -> None:
    """Adapter and head, in the logits of every held-out row."""
    run = runs[name]
    rows = [json.loads(line) for line in Path(f"{run}.jsonl").read_text().splitlines()]
    held_out = rows_held_out(run, rows)
    data = write_jsonl(tmp_path / "held_out.jsonl", held_out)
    logits = logits_by_peft(run, held_out)
    labels = torch.tensor([row["label"] for row in held_out])
    if labels.is_floating_point():
        loss = torch.nn.functional.mse_loss(logits[:, 0], labels).item()
    else:
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
    trained = next(row for row in metrics(run) if row.get("stage") == "trained")
    tolerance = 0.03 if name == "bf16" else 1e-4
    assert trained["eval_loss"] == pytest.approx(loss, abs=tolerance)

    found = evaluate_model(adapter=str(run), data=data, dtype="fp32")
    assert found.loss == pytest.approx(loss, abs=1e-4)
    assert found.task == "classification"
    if labels.is_floating_point():
        predicted = torch.tensor([answer["predicted"] for answer in found.answers])
        torch.testing.assert_close(predicted, logits[:, 0], atol=1e-4, rtol=1e-3)
        assert found.scores.keys() == {"pearson", "spearman"}
        assert trained["eval_pearson"] == pytest.approx(found.scores["pearson"], abs=1e-3)
    else:
        of_eval = torch.tensor([answer["logits"] for answer in found.answers])
        torch.testing.assert_close(of_eval, logits, atol=1e-4, rtol=1e-3)
        right = int((logits.argmax(1) == labels).sum())
        assert found.scores["accuracy"].right == right
        if name != "bf16":
            assert trained["eval_accuracy"] == pytest.approx(right / len(labels))


def rows_held_out(run: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from lorasb_ds.data.run_rows import split_rows

    config = json.loads((run / "run.json").read_text())["config"]
    return [rows[i] for i in split_rows(len(rows), 12, config["seed"])[1]]


def test_what_a_run_leaves(runs: Runs) -> None:
    run = runs["classes"]
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier"]
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    head = {n for n in tensors if ".lora_" not in n}
    prefix = "base_model.model.classifier"
    assert head == {f"{prefix}.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")}
    assert not (run / "adapter/chat_template.jinja").exists()
    content = json.loads((run / "run.json").read_text())
    assert content["labels"] == ["0", "1"]
    assert content["trainable_parameters"] == 12 * 16 + content["head_parameters"]
    report = (run / "report.md").read_text()
    assert "| | step | loss | accuracy | f1 | matthews |" in report
    assert f"| and the classification head | {content['head_parameters']:,} |" in report
    card = (run / "adapter/README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)
    assert code is not None
    base = content["config"]["model"]
    code = code[1].replace('"roberta"', repr(base)).replace("FOLDER", str(run / "adapter"))
    exec(code, found := {})  # noqa: S102, what we tell users to do
    assert found["model"].config.id2label == {0: "0", 1: "1"}
    assert found["model"].peft_config["default"].task_type == "SEQ_CLS"


def test_the_head_is_resumed(runs: Runs, tmp_path: Path) -> None:
    """From a checkpoint the run ends as if it had not been interrupted, dropout included."""
    run = shutil.copytree(runs["classes"], tmp_path / "run")
    step = run / "checkpoints/step-00000003"
    state = load_file(step / "state.safetensors")
    for name in json.loads((run / "run.json").read_text())["head"]:
        assert {name, f"{name}.exp_avg", f"{name}.exp_avg_sq"} <= state.keys()
    for later in (run / "checkpoints").glob("step-*"):
        if later != step:
            shutil.rmtree(later)
    shutil.rmtree(run / "adapter")
    output = run_worker("--resume", str(run), world_size=2)
    assert "resumed after step 3" in output
    whole, resumed = (
        load_file(folder / "adapter/adapter_model.safetensors") for folder in (runs["classes"], run)
    )
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_eval_over_ranks(runs: Runs, tmp_path: Path) -> None:
    """On shards of ZeRO-3, of a checkpoint, too; and what cannot be evaluated is said."""
    run = runs["classes"]
    data = write_jsonl(tmp_path / "rows.jsonl", opinions(9, 60))
    options = f"--data {data} --task-type sequence-classification --model {run.parent / 'roberta'}"
    options += f" --dtype fp32 --output-dir {tmp_path / 'out'}"
    found = []
    for adapter, world_size in ((run, None), (run, 2), (run / "checkpoints/step-00000005", 2)):
        more = "--ds-config zero3 --overwrite" if world_size else ""
        run_worker(
            *f"--adapter {adapter} {options} {more}".split(), worker="eval", world_size=world_size
        )
        (result,) = json.loads((tmp_path / "out/eval.json").read_text())["results"]
        found.append(result["loss"])
        assert result["scores"]["accuracy"]["rows"] == 9
    assert found == pytest.approx([found[0]] * 3, abs=1e-5)

    for given, why in (
        ({"adapter": None, "model": str(run.parent / "roberta")}, "needs the --adapter"),
        ({"adapter": str(run), "task": "exact"}, "--task exact: the run is a classifier's"),
        (
            {
                "adapter": str(run),
                "data": write_jsonl(tmp_path / "o.jsonl", [{"sentence": "a", "label": 5}]),
            },
            "the label 5 of",
        ),
    ):
        with pytest.raises(ConfigError, match=why):
            evaluate_model(**{"data": data, "task_type": "sequence-classification", **given})


@pytest.mark.parametrize("name", ["classes", "numbers", "decoder"])
def test_merge(runs: Runs, tmp_path: Path, name: str) -> None:
    """One folder, as transformers' own would be, with the logits of base, adapter and head."""
    run, out, more = runs[name], tmp_path / "merged", ()
    if name == "numbers":  # BERT's: of several files, with a pooler that is replaced
        base: Any = AutoModel.from_pretrained(run.parent / "bert")
        shutil.copytree(run.parent / "bert", sharded := tmp_path / "sharded")
        (sharded / "model.safetensors").unlink()
        base.save_pretrained(sharded, max_shard_size="20KB")
        more = ("--model", str(sharded))
    run_worker("merge", str(run), "--out", str(out), *more, worker="adapters", world_size=None)
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    content = json.loads((run / "run.json").read_text())
    rows = pairs(8) if name == "numbers" else opinions(8)
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = [[row[n] for n in ("sentence", "sentence1", "sentence2") if n in row] for row in rows]
    inputs = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(**inputs).logits
    torch.testing.assert_close(found, logits_by_peft(run, rows), atol=1e-4, rtol=1e-3)
    assert [*model.config.id2label.values()] == (content["labels"] or ["LABEL_0"])
    assert not (out / "chat_template.jinja").exists() or name == "decoder"


@pytest.mark.slow
def test_4_bits(runs: Runs, tmp_path: Path) -> None:
    """Layers are quantized, and the head is not; eval holds the base as the run did."""
    run = runs["4bit"]
    rows = [json.loads(line) for line in Path(f"{run}.jsonl").read_text().splitlines()]
    data = write_jsonl(tmp_path / "held_out.jsonl", rows_held_out(run, rows))
    trained = next(row for row in metrics(run) if row.get("stage") == "trained")
    found = evaluate_model(adapter=str(run), data=data)
    assert found.loss == pytest.approx(trained["eval_loss"], rel=0.02)
    assert evaluate_model(adapter=str(run), data=data, load_in_4bit=False).loss != found.loss


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_families(family: str, tmp_path: Path) -> None:
    """Base, adapter and head by our loss, and merged by transformers'."""
    base, run, out = other_base(family, tmp_path / "base"), tmp_path / "run", tmp_path / "merged"
    data = write_jsonl(tmp_path / "rows.jsonl", opinions(24))
    held_out = opinions(12, 24)
    eval_data = write_jsonl(tmp_path / "held_out.jsonl", held_out)
    options = f"--task-type sequence-classification --model {base} --data {data} --dtype fp32"
    options += f" --eval-data {eval_data} --r 4 --max-steps 2 --init-samples 8 --output-dir {run}"
    status = 2 if family == "xlnet" else 0  # it pools the last token, padding or not
    output = run_worker(*options.split(), world_size=2, status=status)
    if status:
        assert "the logits of a XLNetForSequenceClassification depend on padding" in output
        return
    assert "classification head: " in output
    run_worker("merge", str(run), "--out", str(out), worker="adapters", world_size=None)
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = [tokenizer(row["sentence"], return_tensors="pt")["input_ids"] for row in held_out]
    with torch.no_grad():
        logits = torch.cat([model.eval()(input_ids=ids).logits for ids in inputs])
    labels = torch.tensor([row["label"] for row in held_out])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    trained = next(row for row in metrics(run) if row.get("stage") == "trained")
    assert trained["eval_loss"] == pytest.approx(loss, abs=1e-4)


def test_what_is_not_done_with_a_classifier(runs: Runs) -> None:
    with pytest.raises(ConfigError, match="is a classifier's"):
        read_adapter(str(runs["classes"]))


def test_preview(runs: Runs) -> None:
    given = {"model": str(runs["numbers"].parent / "bert"), "data": f"{runs['numbers']}.jsonl"}
    config = load_run_config(given | {"task_type": "sequence-classification"})
    lines = list(preview(config, 1, None, color=False))
    assert "labels are numbers: a regression" in lines[0]
    row = pairs(1)[0]
    assert f"label {row['label']}; from sentence1/sentence2/label" in lines[1]
    assert lines[2] == f"[CLS] {row['sentence1']} [SEP] {row['sentence2']} [SEP]"
