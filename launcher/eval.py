"""`lorasb eval`: held-out loss and exact match of a model, with or without a PEFT adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from launcher.options import CONTEXT
from launcher.quiet import quiet_libraries
from lorasb_ds.config import ALL_LINEAR, ConfigError
from lorasb_ds.request import load_run_config


@click.command(context_settings=CONTEXT)
@click.option("--model", default="demo", show_default=True, help="Base model, as in `train`.")
@click.option("--adapter", type=click.Path(exists=True, file_okay=False), help="PEFT LoRA folder.")
@click.option("--data", "data", help="Rows, as in `train`. [default: the demo's held-out rows]")
@click.option("--prompt-column", help="As in `train`.")
@click.option("--response-column", help="As in `train`.")
@click.option("--num-samples", type=click.IntRange(min=1), help="First rows only. [default: all]")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--max-length", type=click.IntRange(min=8), default=1024, show_default=True)
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False), help="JSON file with every answer.")
def main(output: str | None, **options: Any) -> None:
    """Held-out loss and exact match of a model, with or without an adapter, in one process.

    The adapter is loaded by PEFT. Answers are generated greedily; tasks of reasoning-gym are judged
    by their own scorer, other rows by equality with the response.
    """
    quiet_libraries()
    try:
        if output is not None and not Path(output).resolve().parent.is_dir():
            raise ConfigError(f"--output {output}: there is no such folder.")
        result = evaluate(**options)
    except ConfigError as error:
        click.echo(f"lorasb: error: {error}", err=True)
        sys.exit(2)
    match = ""
    if result["interval"] is not None:
        low, high = result["interval"]
        match = f"exact match {result['exact_match']:.1%} (95 %: {low:.1%} to {high:.1%})   "
    click.echo(
        f"held-out loss {result['loss']:.4f}   {match}{result['num_rows']} rows   "
        f"{result['seconds']:.0f} s"
    )
    if output is not None:
        Path(output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def evaluate(
    model: str,
    adapter: str | None,
    data: str | None,
    prompt_column: str | None,
    response_column: str | None,
    num_samples: int | None,
    batch_size: int,
    max_new_tokens: int,
    max_length: int,
    dtype: str,
) -> dict[str, Any]:
    from dataclasses import asdict

    from lorasb_ds import evaluate as evaluation
    from lorasb_ds.config import DEMO_EVAL_DATA
    from lorasb_ds.data import tokenize_rows
    from lorasb_ds.loading import load_config, load_plain
    from lorasb_ds.rows import load_rows
    from lorasb_ds.tokenizer import load_tokenizer

    given = {"prompt_column": prompt_column, "response_column": response_column}
    config = load_run_config(
        {"model": model, "max_length": max_length, "target_modules": ALL_LINEAR, **given}
    )
    load_config(model)
    source = data or DEMO_EVAL_DATA
    rows = load_rows(source, held_out=True)
    rows = [rows[i] for i in range(min(num_samples or len(rows), len(rows)))]
    tokenizer = load_tokenizer(model)
    tokenized = tokenize_rows(rows, tokenizer, config)
    click.echo(f"rows: {tokenized.describe()}")
    base, device = load_plain(model, dtype, adapter)
    result = evaluation.evaluate_model(
        base,
        tokenizer,
        rows,
        tokenized.examples,
        evaluation.scorer(source),
        (prompt_column, response_column),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
    )
    return {"model": model, "adapter": adapter, "data": source, **asdict(result)}


if __name__ == "__main__":
    main(prog_name="lorasb eval")
