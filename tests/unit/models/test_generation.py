"""Intervals, scorers, generation and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from lorasb_ds.adapters.peft_writer import peft_target_modules, peft_tensors, save_peft_adapter
from lorasb_ds.data.batch import collate
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example
from lorasb_ds.evaluation.proportions import Proportion, wilson_interval
from lorasb_ds.models import generation
from lorasb_ds.models.generation import generate, rounds, stop_tokens
from lorasb_ds.models.loss import log_likelihoods
from lorasb_ds.system.files import write_text


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20, without continuity correction.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_a_share_says_how_sure_it_is() -> None:
    assert str(Proportion(81, 263)) == "30.8% (95 %: 25.5% to 36.6%)"


def test_a_batch_generates_what_single_prompts_do(tiny_model: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16]]
    device = torch.device("cpu")
    together = generate(model, tokenizer, prompts, 6, device, stop=[2])
    alone = [generate(model, tokenizer, [prompt], 6, device, stop=[2])[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in together}) == 3
    assert all(answer.cut_off for answer in together), "a random model hardly ends by itself"


def test_an_answer_that_ends_is_not_cut_off(tiny_model: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    prompt = torch.tensor([[5, 6, 7]])
    last = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)[0, -1].item()
    (answer,) = generate(model, tokenizer, prompt.tolist(), 4, torch.device("cpu"), stop=[last])
    assert not answer.cut_off
    (answer,) = generate(model, tokenizer, prompt.tolist(), 4, torch.device("cpu"), stop=[2])
    assert answer.cut_off


def test_an_answer_ends_with_the_turn(tokenizer: Any) -> None:
    """As training teaches it; whatever the tokenizer calls its end."""
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"  # noqa: S105, no password
    assert stop_tokens(other) == sorted({other.eos_token_id, mark})
    assert stop_tokens(tokenizer, [7, 5]) == sorted({5, 7, mark})
    assert stop_tokens(tokenizer, 9) == sorted({9, mark})
    other.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"  # without marks
    assert stop_tokens(other) == [other.eos_token_id]


def test_an_invented_question_is_no_answer(tiny_model: Path, tokenizer: Any) -> None:
    """A base without turns goes on with the next question, which would be scored as well."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    ids = tokenizer("It is 7.\n\n### Question: 1 + 1?\n\n### Answer: 2")["input_ids"]
    said = iter(ids)

    def say_it(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[:, -1] = 0.0
        output.logits[:, -1, next(said)] = 1.0
        return output

    forward = model.forward
    model.forward = say_it
    (answer,) = generate(model, plain, [[5, 6]], len(ids), torch.device("cpu"), stop=[2])
    assert answer == generation.Generated("It is 7.", cut_off=False)
    assert len(list(said)) > 3, "it has stopped there"


def test_log_likelihoods_are_those_of_whole_logits(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    examples = [
        Example([5, 6, 7, 8], [IGNORE_INDEX] * 2 + [7, 8]),
        Example([9, 10], [IGNORE_INDEX, 10]),
        Example([3, 4, 5, 6, 7, 8, 9], [IGNORE_INDEX] * 6 + [9]),
    ]
    expected = []
    for example in examples:
        log_p = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        known = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
        expected.append(sum(log_p[i - 1, example.labels[i]].item() for i in known))
    # fp32: products of other shapes are rounded in another order.
    assert log_likelihoods(model, collate(examples, 2)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 23])
def test_ranks_share_all_rows(
    world_size: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [(7 * i) % 11 + 1 for i in range(num_rows)]
    of_ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(generation, "rank_and_size", lambda _, r=rank: (r, world_size))
        of_ranks.append(list(rounds(lengths, 4)))
    assert len({len(found) for found in of_ranks}) == 1, "every rank takes part in every round"
    counted = [i for found in of_ranks for batch, counts in found if counts for i in batch]
    assert sorted(counted) == list(range(num_rows))
    assert all(1 <= len(batch) <= 4 for found in of_ranks for batch, _ in found)


def test_writing_leaves_no_part_behind(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "1")
    write_text(tmp_path / "a.json", "2")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"a.json": "2"}


def test_the_adapter_config_is_peft_s(tmp_path: Path) -> None:
    tensors = peft_tensors("m.q_proj", torch.ones(2, 4), torch.ones(4, 2))
    targets, layers = {"m.q_proj": (4, 4)}, {"m.q_proj": (4, 4), "m.k_proj": (4, 4)}
    for _ in range(2):  # the second replaces the first
        save_peft_adapter(
            tmp_path / "adapter",
            tensors,
            r=2,
            target_modules=peft_target_modules(targets, layers),
            base_model="base",
        )
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 2, {"q_proj"})
    assert config.inference_mode
    written = {f.name for f in (tmp_path / "adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bias"] == "none"
