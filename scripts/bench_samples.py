"""How many rows the init of experts needs: a small mixture of experts, trained here, fine-tuned."""

from __future__ import annotations

import json
import statistics
import string
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import ROOT, machine, measure, print_table, run_as_rank, write_json

SHAPE = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "output_router_logits": True,  # pretraining balances the experts
}
# What the base learns, and what it is fine-tuned to do.
TASKS = ("chain_sum", "spell_backward", "basic_arithmetic", "simple_equations", "letter_counting")
NEW_TASK = "reasoning-gym:word_sequence_reversal?size=2500&seed=7&min_words=2&max_words=4"
STEPS, ROWS_OF_STEP = 600, 16
ROWS = (8, 16, 64, 256, 1024)
SEEDS = (1, 2, 3)
RUN = {
    "val_set_size": 200,
    "dtype": "fp32",
    "r": 32,
    "lr": 3e-3,
    "micro_batch_size": 16,
    "max_steps": 60,
    "ds_config": str(ROOT / "ds_configs/zero2.json"),
}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def character_tokenizer() -> Any:
    """Return a tokenizer of ASCII's characters: a random model learns them in minutes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *string.printable))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        chat_template=TEMPLATE,
    )


def pretrain(settings: dict[str, Any], out: str) -> None:
    """Train a random model on several tasks at once, by plain torch."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from lorasb_ds.data.sources import load_rows

    folder, steps = Path(settings["folder"]), settings["steps"]
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**ids, **SHAPE))
    size = steps * ROWS_OF_STEP // len(TASKS)
    sources = [load_rows(f"reasoning-gym:{task}?size={size}&seed=1") for task in TASKS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        numbers = range(step * ROWS_OF_STEP, (step + 1) * ROWS_OF_STEP)
        rows = [sources[n % len(TASKS)][n // len(TASKS)] for n in numbers]
        texts = [f"<s>{row['question']}</s><s>{row['answer']}</s>" for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    Path(out).write_text(json.dumps({"first": losses[0], "last": statistics.mean(losses[-20:])}))


def fine_tune(settings: dict[str, Any], out: str) -> None:
    """Fine-tune the base with some rows in the init's sample; losses on rows held out."""
    from safetensors import safe_open

    from launcher.workers.quiet import quiet_libraries
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.system.signals import StopRequest
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import run_training

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        prepared = prepare(load_run_config(RUN | settings | {"output_dir": str(run)}), 1)
        zero.init_process_group()
        start = time.perf_counter()
        assert run_training(prepared, StopRequest()) == "finished"
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        with safe_open(run / "basis.safetensors", "pt") as basis:
            names = [name for name in basis.keys() if name.endswith(".tokens")]  # noqa: SIM118
            tokens = torch.cat([basis.get_tensor(name) for name in names]).tolist()
    result = {
        "losses": [row["eval_loss"] for row in rows if "eval_loss" in row],
        "tokens": [min(tokens), statistics.median(tokens), max(tokens)],
        "unreached": sum(n == 0 for n in tokens) / len(tokens),
        "seconds": seconds,
    }
    Path(out).write_text(json.dumps(result))


@click.command("samples")
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/samples.json", show_default=True)
@click.option("--quick", is_flag=True, help="Hardly trained, one seed: whether it runs.")
def main(out: Path, quick: bool) -> None:
    """Rows in the init's sample of a mixture of experts: tokens of an expert, and the loss."""
    sizes, seeds = ((8, 16), (1,)) if quick else (ROWS, SEEDS)
    runs: dict[str, list[dict[str, Any]]] = {str(size): [] for size in sizes}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        base = measure(pretrain, {"folder": str(folder), "steps": 4 if quick else STEPS})
        click.echo(f"pretrained: loss {base['first']:.3f} -> {base['last']:.3f}", err=True)
        for seed in seeds:
            for size in sizes:
                chosen = {"init_samples": size, "seed": seed, "data": NEW_TASK}
                chosen |= {"model": str(folder)} | ({"max_steps": 2} if quick else {})
                runs[str(size)].append(found := measure(fine_tune, chosen))
                click.echo(f"{size} rows, seed {seed}: {found}", err=True)
    rows = {size: _cells(of) for size, of in runs.items()}
    columns = ("tokens of an expert: fewest", "median", "most", "without any")
    columns += ("loss before", "after the fill", "trained, mean", "smallest", "largest")
    print_table("rows in the sample", columns, rows)
    write_json(out, {"machine": machine(), "shape": SHAPE, "run": RUN, "base": base, "runs": runs})


def _cells(runs: list[dict[str, Any]]) -> list[str]:
    tokens = [statistics.median(run["tokens"][i] for run in runs) for i in range(3)]
    before, filled, trained = ([run["losses"][i] for run in runs] for i in (0, 1, -1))
    return [
        *(f"{number:.0f}" for number in tokens),
        f"{statistics.mean(run['unreached'] for run in runs):.1%}",
        *(f"{statistics.mean(losses):.4f}" for losses in (before, filled, trained)),
        *(f"{end:.4f}" for end in (min(trained), max(trained))),
    ]


if __name__ == "__main__":
    run_as_rank(pretrain, fine_tune)
