"""The worker of `lorasb eval`, by itself or on every rank of a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.commands.eval import eval_options
from launcher.options import CONTEXT, reports_problems
from launcher.workers.common import (
    answer_agent,
    check_device,
    end,
    end_when_asked,
    find_home,
    join,
    refuse,
    set_device_variables,
)
from launcher.workers.quiet import quiet_libraries
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_layout import check_output_dir
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.host_memory import ranks_of_host

if TYPE_CHECKING:
    from lorasb_ds.evaluation.evaluator import EvalResult
    from lorasb_ds.evaluation.rows import EvalRows


@click.command(context_settings=CONTEXT)
@click.option("--local-rank", type=int, hidden=True, expose_value=False)  # DeepSpeed gives it
@reports_problems
@eval_options
def main(own: dict[str, Any], given: dict[str, Any]) -> None:
    """Measure loss and scores of a model on held-out rows, with or without an adapter."""
    find_home()
    quiet_libraries()
    set_device_variables()
    end_when_asked()
    in_job = "RANK" in os.environ
    try:
        config = load_run_config(given)
        check_output_dir(config, evaluation=True)
        from lorasb_ds.data.template import template_note
        from lorasb_ds.evaluation.model import prepare_model
        from lorasb_ds.runs.output_dir import say, say_if_bf16_is_emulated

        if in_job:
            answer_agent()
            check_device()
        world_size = int(os.environ["WORLD_SIZE"]) if in_job else 1
        local_size = ranks_of_host(default=world_size) if in_job else 1
        run = prepare_model(config, own["adapter"], world_size, local_size)
        say_if_bf16_is_emulated(run.config)
        if not config.classifies and (note := template_note(run.base.tokenizer)) is not None:
            say(note)
        if own["lm_eval"] is not None:
            from lorasb_ds.evaluation.lm_eval import evaluate_by_harness

            click.echo(evaluate_by_harness(run, own["lm_eval"], own["num_samples"]))
            end()
        from lorasb_ds.distributed import zero
        from lorasb_ds.evaluation.evaluator import evaluate, write_results
        from lorasb_ds.evaluation.model import start_model
        from lorasb_ds.evaluation.rows import load_eval_rows

        chosen = {name: own[name] for name in ("task", "num_samples", "max_new_tokens")}
        chosen |= {"tables": run.tables, "classes": run.base.classes}
        sources = [load_eval_rows(s, run.config, run.base.tokenizer, **chosen) for s in config.data]
        for warning in (warning for rows in sources for warning in rows.warnings):
            say(warning)
        if in_job:
            join()
        model = start_model(run)
        results = []
        for rows in sources:
            results.append((rows, evaluate(run, rows, model)))
            if not in_job or zero.rank() == 0:
                click.echo(render(*results[-1], named=len(sources) > 1))
                if config.output_dir is not None:
                    write_results(Path(config.output_dir), run, results)
        if config.output_dir is not None and (not in_job or zero.rank() == 0):
            click.echo(f"results: {config.output_dir}")
        if in_job:
            zero.close_process_group()
    except ConfigError as error:
        refuse(error)
    except Exception as error:
        from lorasb_ds.training.out_of_memory import is_out_of_memory

        if is_out_of_memory(error):
            refuse(MemoryError(f"Out of memory: {error}\nLower --batch-size."), status=1)
        if isinstance(error, OSError):
            refuse(error, status=1)
        raise
    end()


def render(rows: EvalRows, result: EvalResult, named: bool) -> str:
    from lorasb_ds.evaluation.rows import CLASSIFICATION
    from lorasb_ds.runs.history import perplexity

    shown = {n: f"{s:.4f}" if isinstance(s, float) else s for n, s in result.scores.items()}
    scores = "".join(f"   {name.replace('_', ' ')} {s}" for name, s in shown.items())
    loss = f"held-out loss {result.loss:.4f}"
    if result.task != CLASSIFICATION:
        loss += f", perplexity {perplexity(result.loss):.4g}"
    lines = [rows.source] if named else []
    lines += [
        f"task {result.task}   {loss}{scores}   {result.num_rows} rows   {result.seconds:.0f} s"
    ]
    if rows.skipped:
        kept = rows.examples.describe() if rows.examples else f"{rows.skipped} without choices"
        lines.append(f"rows: {kept}")
    lines += rows.examples.notes if rows.examples else ()
    if result.cut_off:
        lines.append(
            f"{result.cut_off} answers were cut off at {rows.max_new_tokens} tokens; "
            "--max-new-tokens allows more"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="lorasb eval")
