"""Evaluation on held-out rows while a run trains: their loss, and answers to a few of them."""

from __future__ import annotations

from typing import Literal

from lorasb_ds.data.dataset import TokenizedRows
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.sequence_parallel import whole_rows
from lorasb_ds.models.classification import predict
from lorasb_ds.models.generation import generate, stop_tokens
from lorasb_ds.models.loss import eval_mode, held_out_loss
from lorasb_ds.models.row_scores import score
from lorasb_ds.runs.history import OF_STEPS, PERPLEXITY, as_logged, perplexity
from lorasb_ds.runs.output_dir import say
from lorasb_ds.runs.run_log import RunLog
from lorasb_ds.training.table_check import SAMPLE_TOKENS
from lorasb_ds.training.training_run import TrainingRun

Stage = Literal["base", "init", "step", "rebase", "trained"]


def evaluate(training: TrainingRun, stage: Stage) -> bool:
    """Measure the loss on the held-out rows, of a classifier its scores, too; log it. Collective.

    Returns:
        Whether training has reached a new best loss; False without held-out rows.
    """
    run, state = training.run, training.state
    state.evaluated_at = state.step
    if run.data.held_out is None:
        return False
    loss, beside = _measure(training, run.data.held_out)
    shown = ", ".join(
        f"{name} {value:.2f}" if name == PERPLEXITY else f"{name} {value:.4f}"
        for name, value in beside.items()
    )
    say(f"step {state.step}: held-out loss {loss:.4f}, {shown} ({stage})")
    row = {"step": state.step, "stage": stage, "eval_loss": loss, **as_logged(beside)}
    training.to_log(lambda log: log.write(row))
    if run.config.generate_samples:
        write_samples(training, stage)
    training.end_if_failed()
    if stage not in OF_STEPS:
        return False
    return state.take_loss(loss, run.config.early_stopping_threshold)


def _measure(training: TrainingRun, rows: TokenizedRows) -> tuple[float, dict[str, float]]:
    """Return the rows' loss, and by name what is told beside it. Collective."""
    model, device = training.engine.module, accelerator.device()
    batches = training.run.batches(rows, range(len(rows.examples)))
    if rows.classes is None:
        loss = held_out_loss(model, batches, device)
        return loss, {PERPLEXITY: perplexity(loss)}
    with eval_mode(model):
        found = predict(model, batches, device)
    return found.loss, score(found.logits, found.targets)


def write_samples(training: TrainingRun, stage: Stage) -> None:
    """Write greedy answers to the first held-out rows to ``samples.jsonl``. Collective.

    Every rank generates the same answers, so that all take part in the same gathers of ZeRO-3.
    """
    run, model, rows = training.run, training.engine.module, training.run.data.held_out
    assert rows is not None
    examples = rows.examples[: run.config.generate_samples]
    prompts = [example.input_ids[: max(1, example.first_label)] for example in examples]
    with eval_mode(model), whole_rows():
        answers = generate(
            model,
            run.base.tokenizer,
            prompts,
            SAMPLE_TOKENS,
            accelerator.device(),
            stop=stop_tokens(run.base.tokenizer),
        )

    def log_samples(log: RunLog) -> None:
        for i, (example, prompt, answer) in enumerate(zip(examples, prompts, answers, strict=True)):
            log.write_sample(
                {
                    "step": training.state.step,
                    "stage": stage,
                    "row": rows.row_id(i),
                    "prompt": run.base.tokenizer.decode(prompt),
                    "expected": run.base.tokenizer.decode(example.input_ids[len(prompt) :]),
                    "generated": answer.text,
                }
            )

    training.to_log(log_samples)
