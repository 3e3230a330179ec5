"""`lorasb eval --lm-eval`: run tasks of lm-evaluation-harness on a base with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasb_ds.config.run_layout import EVAL_RESULT
from lorasb_ds.errors import ConfigError
from lorasb_ds.evaluation.evaluator import describe_run
from lorasb_ds.evaluation.model import PreparedModel, start_model
from lorasb_ds.system.files import write_json


def evaluate_by_harness(run: PreparedModel, tasks: str, num_samples: int | None = None) -> str:
    """Run the tasks in one process, and write their results to ``eval.json``.

    Args:
        run: its output folder may be None: then nothing is written.
        tasks: names or YAML files, separated by commas.
        num_samples: rows of each task; None: all.
    Returns:
        The harness's own table.
    Raises:
        ConfigError: if lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate, utils
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval needs the package lm-eval: pip install 'lorasb-ds[lm-eval]' ({error})."
        ) from error
    names: list[Any] = []
    known = TaskManager()
    for task in tasks.split(","):
        if Path(task).is_file():
            names.append(str(Path(task).absolute()))
        elif found := known.match_tasks([task]):
            names += found
        else:
            raise ConfigError(
                f"--lm-eval {task}: neither a task of lm-eval (`lm-eval ls tasks`) nor a YAML file."
            )
    model = start_model(run)
    batch_size = run.config.micro_batch_size
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=run.base.tokenizer, batch_size=batch_size),
        tasks=names,
        limit=num_samples,
        task_manager=known,
        apply_chat_template=run.base.tokenizer.chat_template is not None,  # as it was trained
    )
    if run.config.output_dir is not None:
        folder = Path(run.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / EVAL_RESULT, {**describe_run(run), "lm_eval": found["results"]})
    return str(utils.make_table(found))
