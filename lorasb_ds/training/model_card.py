"""The README.md beside an adapter: what it is, how it was made, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lorasb_ds.config.adapter_options import UNIFORM
from lorasb_ds.config.data_options import REASONING_GYM
from lorasb_ds.config.paths import DEMO_MODEL
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.classification import Classes
from lorasb_ds.export.to_peft import max_lora_rank
from lorasb_ds.models.classification import NUMBER_NAME
from lorasb_ds.runs.history import OF_STEPS, evaluations, saved_evaluation
from lorasb_ds.training.report import held_out_table

DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Shown where they are not the default's.
SHOWN = (
    "task_type",
    *("method", "r", "rank_allocation", "expert_r", "target_modules", "lr", "lr_scheduler"),
    *("optimizer", "epochs"),
    *("train_batch_size", "max_length", "packing", "loss_on", "dtype", "load_in_4bit"),
    *("load_in_8bit", "seed"),
)
PEFT_LOADS = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
PEFT_CLASSIFIES = """\
```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

labels = {labels}
base = AutoModelForSequenceClassification.from_pretrained(
    "{base}", dtype="auto", num_labels=len(labels), id2label=dict(enumerate(labels))
)
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER", pad_token={pad_token})
model.config.pad_token_id = tokenizer.pad_token_id  # a decoder classifies by the token before
```

As one model: `lorasb merge RUN --out merged` with the run's folder, or `model.merge_and_unload()`.
"""
OTHERS_LOAD = """\
- vLLM: `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine=FOLDER`
- llama.cpp: `python convert_lora_to_gguf.py FOLDER --base path/to/base`
- as one model: `lorasb merge FOLDER --model {base} --out merged`
"""


def model_card(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], rank: int | None) -> str:
    """Return a model card in the hub's form. It has no paths: folders may have private names.

    Args:
        run: content of ``run.json``, of a run that is trained.
        rows: of ``metrics.jsonl``.
        rank: of the LoRA in the files, the largest; None: PEFT has made the layers.
    """
    config = run["config"]
    kind, is_file, file = config["method"].partition(":")
    config = config | {"method": f"PEFT's, by {Path(file).name}" if is_file else kind}
    base, sources = _public(config["model"]), [_public(source) for source in config["data"]]
    hub_sources = [s for s, given in zip(sources, config["data"], strict=True) if s == given]
    datasets = [s.partition("@")[0].partition(":")[0] for s in hub_sources if "/" in s]
    classifies = "labels" in run
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-classification" if classifies else "text-generation",
        "tags": ["lora", "transformers", kind, "lorasb-ds"],
        **({"datasets": datasets} if datasets else {}),
    }
    default = RunConfig.model_validate({}).model_dump()
    options = [(name, config.get(name)) for name in SHOWN]
    saved = saved_evaluation(run, rows)
    steps = f"{run['steps_done']} steps"
    if saved["step"] < run["steps_done"]:
        steps = f"step {saved['step']} of {run['steps_done']}, the best evaluation's"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {config['method']} on {base}",
        "",
        f"An adapter for `{base}`, trained on {', '.join(f'`{source}`' for source in sources)} by "
        f"lorasb-ds {run['versions']['lorasb-ds']}: {run['trainable_parameters']:,} trained "
        f"parameters, {steps}.",
        "",
    ]
    if "eval_loss" in saved:
        before = [row for row in evaluations(rows) if row["stage"] not in OF_STEPS]
        table = [row for row in before if row["step"] < saved["step"]]
        table.append(saved | {"stage": "trained"})
        lines += ["Loss of held-out rows:", "", *held_out_table(table), ""]
    lines += ["| option | |", "|---|---|"]
    lines += [
        f"| {name} | {value} |"
        for name, value in options
        if name in ("method", "r", "lr") or value != default[name]
    ]
    chosen = config["chat_template"]
    template = Path(chosen).name if chosen is not None else run["chat_template"]
    of_rank = "rank" if config["rank_allocation"] == UNIFORM else "ranks up to"
    form = "an adapter of one of PEFT's methods"
    if rank is not None:
        form = f"a plain LoRA of {of_rank} {rank}"
    if classifies:
        return "\n".join([*lines, "", *_of_classifier(run, base, form)])
    lines += [
        "",
        f"The files hold {form}, in PEFT's format and fp32. Beside it are the tokenizer, and the "
        f"chat template that it was trained with ({template}).",
        "",
        PEFT_LOADS.format(base=base),
    ]
    if rank is not None:
        lines.append(OTHERS_LOAD.format(base=base, rank=max_lora_rank(rank) or rank))
    return "\n".join(lines)


def _of_classifier(run: Mapping[str, Any], base: str, form: str) -> list[str]:
    """Return what a card says of the files of a classifier, and how to load them."""
    names = Classes(tuple(run["labels"])).names or [NUMBER_NAME]
    return [
        f"The files hold {form} and the classification head (modules_to_save), in PEFT's format "
        "and fp32. Beside it is the tokenizer.",
        "",
        PEFT_CLASSIFIES.format(base=base, labels=names, pad_token=repr(run["pad_token"])),
    ]


def _public(name: str) -> str:
    """Return a hub name as it is, and of a path its last part."""
    if name == DEMO_MODEL:
        return DEMO_BASE
    is_path = Path(name).is_absolute() and not name.startswith(REASONING_GYM)
    return Path(name).name if is_path else name
