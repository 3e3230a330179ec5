"""Compare whole evaluations with transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lorasb_ds
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.batch import collate
from lorasb_ds.data.chat import RENDERED
from lorasb_ds.data.template import render
from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.evaluator import EvalResult, evaluate, evaluate_model, write_results
from lorasb_ds.evaluation.model import prepare_model, start_model
from lorasb_ds.evaluation.rows import EvalRows, load_eval_rows
from lorasb_ds.models.tables import Tables
from tests.references import own_loss, with_own_code, write_random_lora
from tests.runs import ROOT, word_rows, write_jsonl
from tests.unit.data.test_chat import CALLING, TOOL, WITH_TOOLS, with_template


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    write_random_lora(tiny_model, folder, r=4, lora_alpha=12, target_modules="all-linear")
    return folder


def by_peft(tiny_model: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def test_losses_and_answers_are_those_of_peft(
    tiny_model: Path, adapter: Path, tokenizer: Any, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [*word_rows(5), {"text": "asks for nothing"}])
    found = evaluate_model(
        adapter=str(adapter), data=data, dtype="fp32", max_new_tokens=6, batch_size=2
    )
    base = evaluate_model(str(tiny_model), data=data, dtype="fp32", max_new_tokens=6)
    assert found.loss != pytest.approx(base.loss, abs=1e-2), "the adapter changes the model"
    reference = by_peft(tiny_model, adapter)
    config = load_run_config({"model": str(tiny_model), "data": data})
    rows = load_eval_rows(config.data[0], config, tokenizer)
    assert rows.examples is not None
    batches = [collate([example], 2) for example in rows.examples.examples]
    with torch.no_grad():
        losses = [own_loss(reference, batch).item() * batch.num_label_tokens for batch in batches]
    expected = sum(losses) / sum(batch.num_label_tokens for batch in batches)
    assert found.loss == pytest.approx(expected, abs=1e-5)  # fp32, in another order
    assert [answer["row"] for answer in found.answers] == [1, 2, 3, 4, 5]
    for question, answer in zip(rows.questions, found.answers, strict=True):
        ids = torch.tensor([question.ids])
        output = reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0, ids.shape[1] :]
        assert answer["generated"] == tokenizer.decode(output, skip_special_tokens=True).strip()
        assert answer["expected"] == question.expected
    assert found.scores["exact_match"].rows == 5
    assert found.num_rows == 5


MULTIPLE = [
    {"question": f"Which comes after {a}?", "choices": ["red", "very dark blue", "7"], "answer": k}
    for k, a in enumerate(("one", "two", "three"))
]


def test_choices_are_the_likeliest(
    tiny_model: Path, adapter: Path, tokenizer: Any, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [*MULTIPLE, {"question": "no choices"}])
    found = evaluate_model(adapter=str(adapter), data=data, dtype="fp32", batch_size=4)
    assert found.task == "multiple-choice"
    reference = by_peft(tiny_model, adapter)
    right = normed = 0
    losses, tokens = 0.0, 0
    for row, answer in zip(MULTIPLE, found.answers, strict=True):
        turns = [{"role": "user", "content": row["question"]}]
        prompt = render(tokenizer, turns, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        expected = []
        for j, choice in enumerate(row["choices"]):
            ids = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
            log_p = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
            if j == row["answer"]:
                losses, tokens = losses - expected[-1], tokens + len(ids) - start
        assert answer["log_likelihoods"] == pytest.approx(expected, rel=1e-5)  # fp32
        by_length = [p / len(choice) for p, choice in zip(expected, row["choices"], strict=True)]
        right += expected.index(max(expected)) == row["answer"]
        normed += by_length.index(max(by_length)) == row["answer"]
    assert found.scores["accuracy"].right == right
    assert found.scores["accuracy_norm"].right == normed
    assert found.loss == pytest.approx(losses / tokens, rel=1e-5)


def test_what_rows_are_no_use(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [*MULTIPLE, {"question": "no choices"}]
    config = load_run_config(
        {"model": str(tiny_model), "data": write_jsonl(tmp_path / "a.jsonl", rows)}
    )
    assert load_eval_rows(config.data[0], config, tokenizer).skipped == 1
    assert load_eval_rows(config.data[0], config, tokenizer, num_samples=2).skipped == 0
    none = config.model_copy(update={"max_skipped_rows": "20%"})
    with pytest.raises(ConfigError, match=r"1 of the 4 rows .*first: row 4\), .*-rows 1 goes on"):
        load_eval_rows(none.data[0], none, tokenizer)
    torn = write_jsonl(tmp_path / "torn.jsonl", [*word_rows(3), *[{"question": "a"}] * 21])
    with pytest.raises(
        ConfigError, match=r"torn\.jsonl: 21 of 24 rows .*no known columns.* 20 for"
    ):
        load_eval_rows(torn, config, tokenizer)
    assert load_eval_rows(torn, config, tokenizer, num_samples=23).skipped == 20
    plain = write_jsonl(tmp_path / "b.jsonl", word_rows(2))
    config = load_run_config({"model": str(tiny_model), "data": plain})
    with pytest.raises(ConfigError, match=r"no row of .* has choices"):
        load_eval_rows(config.data[0], config, tokenizer, task="multiple-choice")
    with pytest.raises(ConfigError, match="reasoning-gym has no task"):
        load_eval_rows(config.data[0], config, tokenizer, task="reasoning-gym")


FORMS = {
    "gsm8k": ({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, "It is 2."),
    "metamath": ({"query": "1 + 1?", "response": "So.\nThe answer is: 2"}, "The answer is: 2.0"),
    "math": (
        {"problem": "Half of 1?", "solution": r"It is $\boxed{\frac{1}{2}}$."},
        r"\boxed{0.5}",
    ),
    "exact": ({"question": "a?", "answer": "b"}, " b\n"),
    "reasoning-gym": (None, None),
}


@pytest.mark.parametrize("task", FORMS)
def test_a_task_is_found_and_judges(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, task: str
) -> None:
    row, right = FORMS[task]
    source = "reasoning-gym:chain_sum?size=3&seed=1"
    if row is not None:
        source = write_jsonl(tmp_path / "rows.jsonl", [row] * 3)
    config = load_run_config({"model": str(tiny_model), "data": source})
    rows = load_eval_rows(config.data[0], config, tokenizer)
    assert rows.task == task
    assert rows.max_new_tokens == (512 if task in ("gsm8k", "metamath", "math") else 128)
    asked = rows.questions[1]
    right = asked.content["answer"] if right is None else right
    assert rows.score(right, asked.content, asked.expected)
    assert not rows.score("no idea", asked.content, asked.expected)


def test_an_adapter_of_another_base(demo_model: Path, adapter: Path) -> None:
    config = load_run_config({"model": str(demo_model), "data": "x.jsonl"})
    message = r"does not fit --model .* of shape \(48, 80\), where the model has one of \(576, 1536"
    with pytest.raises(ConfigError, match=message):
        prepare_model(config, str(adapter))


def test_a_base_with_code_of_its_own(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    given = {"model": str(with_own_code(tiny_model, tmp_path / "model"))}
    with pytest.raises(ConfigError, match="give --trust-remote-code"):
        prepare_model(load_run_config(given), str(adapter))
    run = prepare_model(load_run_config(given | {"trust_remote_code": True}), str(adapter))
    assert type(start_model(run)).__name__ == "OwnForCausalLM"


def test_no_shards_without_a_job(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # other tests have one
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(1))
    with pytest.raises(ConfigError, match="this is one process"):
        evaluate_model(str(tiny_model), data=data, ds_config=str(ROOT / "ds_configs/zero3.json"))


def test_more_than_the_model_has_positions(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Those of a table are refused; a rotary model is only warned of."""
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(3))
    config = load_run_config({"model": str(tiny_model), "data": data})

    def load(tables: Tables, max_new_tokens: int = 2040) -> EvalRows:
        return load_eval_rows(data, config, tokenizer, max_new_tokens=max_new_tokens, tables=tables)

    assert (
        "3 of 3 rows are longer than the 2048 tokens" in load(Tables(49152, None, 2048)).warnings[0]
    )
    with pytest.raises(ConfigError, match=r"row \d may need \d+ tokens, .* has 2048 positions"):
        load(Tables(49152, 2048, 2048))
    assert load(Tables(49152, 2048, 2048), 16).warnings == []
    with pytest.raises(ConfigError, match=r"row \d has the token .* ends at id 99; 3 of 3 rows"):
        load(Tables(100, None, None))


def test_tasks_that_evaluate_answers_are_refused(
    tiny_model: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the model is loaded; other uses of the rows still work."""
    source = "reasoning-gym:countdown?size=2&seed=1"
    monkeypatch.setattr(
        "lorasb_ds.evaluation.evaluator.start_model", lambda run: pytest.fail("loaded")
    )
    message = r"--data reasoning-gym:countdown\?.* uses sympy, .* Give --task exact"
    with pytest.raises(ConfigError, match=message):
        evaluate_model(str(tiny_model), data=source)
    config = load_run_config({"model": str(tiny_model), "data": source})
    rows = load_eval_rows(source, config, tokenizer, task="exact")
    assert rows.examples is not None
    assert len(rows.examples.examples) == 2
    assert rows.score(rows.questions[0].expected, rows.questions[0].content, "") is False
    assert rows.score("a", rows.questions[0].content, "a")


def test_ranks_that_differ_and_exceed_a_layer(
    tiny_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    targets, ranks = ["q_proj", "k_proj"], {"k_proj": 30}
    folder = tmp_path / "adapter"
    tuned = write_random_lora(tiny_model, folder, r=2, target_modules=targets, rank_pattern=ranks)
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(2))
    found = evaluate_model(str(tiny_model), str(folder), data, dtype="fp32", max_new_tokens=1)
    rows = load_eval_rows(data, load_run_config({"data": data}), tokenizer)
    assert rows.examples is not None
    batch = collate(rows.examples.examples[:], 2)
    with torch.no_grad():
        expected = own_loss(tuned, batch).item()
    assert found.loss == pytest.approx(expected, rel=1e-5)  # fp32, in another order


def test_in_4_bits(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(3))
    losses = {}
    for bits in (None, "4bit", "8bit"):
        given = {} if bits is None else {f"load_in_{bits}": True}
        found = evaluate_model(adapter=str(adapter), data=data, max_new_tokens=2, **given)
        losses[bits] = found.loss
    assert len(set(losses.values())) == 3
    # NF4 of random weights has an error of some 8 %, int8 of 0.5 %.
    assert losses["4bit"] == pytest.approx(losses[None], rel=0.1)
    assert losses["8bit"] == pytest.approx(losses[None], rel=0.02)


def test_results_on_disk(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(3))
    config = load_run_config({"model": str(tiny_model), "data": data})
    run = prepare_model(config, str(adapter))
    rows = load_eval_rows(data, run.config, run.base.tokenizer, max_new_tokens=2)
    result = evaluate(run, rows, start_model(run))
    assert isinstance(result, EvalResult)
    write_results(tmp_path / "out", run, [(rows, result)])
    (summary,) = json.loads((tmp_path / "out" / "eval.json").read_text())["results"]
    score = summary["scores"]["exact_match"]
    assert score["rows"] == 3
    assert score["share"] == score["right"] / 3
    assert score["interval"][0] <= score["share"] <= score["interval"][1]
    assert summary["loss"] == result.loss
    assert summary["max_new_tokens"] == 2
    assert summary["cut_off"] == result.cut_off == 3
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"data": data, **a} for a in result.answers]


def test_the_names_of_the_package() -> None:
    for name in lorasb_ds.__all__:
        assert getattr(lorasb_ds, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lorasb_ds.nothing  # noqa: B018


def test_prompts_are_those_of_training(tokenizer: Any, tmp_path: Path) -> None:
    """System prompts, earlier turns, tools, and prompts that were rendered already."""
    knowing = with_template(tokenizer, WITH_TOOLS)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        {"system": "Be short.", "instruction": "Hi", "output": "Hello", "history": [["a", "b"]]},
        {"prompt": prompt, "completion": "Hello<|im_end|>"},
        {"tools": [TOOL], "messages": CALLING},
        {"tools": [TOOL], "messages": CALLING[:2]},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = load_eval_rows(data, RunConfig(loss_on="last"), knowing, task="exact")
    assert found.examples is not None
    assert len(found.examples.examples) == 4
    assert [q.row for q in found.questions] == [1, 2, 3], "a call is no answer to compare"
    for question, example in zip(found.questions, found.examples.examples, strict=False):
        assert question.ids == example.input_ids[: example.first_label]
    assert [q.expected for q in found.questions] == ["Hello", "Hello", "It is 1.1."]
    assert found.examples.notes == (f"{data}: 1 rows {RENDERED} (row 2, for example)",)
    skipped = load_eval_rows(data, RunConfig(), tokenizer, task="exact")
    assert (skipped.skipped, len(skipped.questions)) == (2, 2)
