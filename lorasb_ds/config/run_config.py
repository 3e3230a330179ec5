"""What a run is: its options, their defaults and what is allowed. Torch-free: it starts at once."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorasb_ds.config.methods import DEFAULT_ALPHA, DEFAULT_METHOD, METHODS, PEFT_PREFIX
from lorasb_ds.config.paths import DEMO_MODEL, SHIPPED_DS_CONFIGS
from lorasb_ds.errors import option_name

DEMO_DATA = "reasoning-gym:word_sequence_reversal?max_words=6&size=1000&seed=1"
DEMO_EVAL_DATA = "reasoning-gym:word_sequence_reversal?max_words=6&size=64&seed=2"
ALL_LINEAR = "all-linear"
# What an optimizer does to the gradient in its first step, as --init-update has it.
FIRST_STEPS = {
    "adamw": "sign",
    "lion": "sign",
    "sgd": "raw",
    "adafactor": "adafactor",
    "muon": "muon",
}
MATRIX_OPTIMIZERS = ("adafactor", "muon")  # by matrices: all others go by elements


class RunConfig(BaseModel):
    """One run, resolved. ``model_fields_set`` tells what was asked for from what is a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(
        DEMO_MODEL,
        min_length=1,
        description="Base model: a local folder, a hub name, or 'demo' (SmolLM2-135M-Instruct, "
        "fetched by scripts/setup.sh).",
    )
    data: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (DEMO_DATA,),
        min_length=1,
        description="Training rows: a .json/.jsonl/.csv/.parquet file, a folder saved by "
        "`datasets`, a hub name (NAME[:CONFIG][@SPLIT], a split also as train[:1000]), or "
        "'reasoning-gym:NAME?size=N&seed=S'. May be given several times.",
    )
    data_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="How often an epoch sees the rows of each --data, in their order, separated "
        "by commas: 2,0.5. [default: once]",
    )
    eval_data: str | None = Field(
        None,
        description="Held-out rows, in any form --data takes; their loss is measured before the "
        "init, after it and at the end. [default: none; with the demo's data, 64 other rows]",
    )
    val_set_size: float | None = Field(
        None,
        gt=0,
        description="Hold out training rows in place of --eval-data, chosen by --seed: a share of "
        "them if below 1, else their number. [default: none]",
    )
    prompt_column: str | None = Field(
        None,
        description="Column with the prompt. [default: row by row, the first found of question, "
        "query, prompt, instruction(+input), messages, conversations, text]",
    )
    response_column: str | None = Field(
        None,
        description="Column with the response. [default: the prompt column's partner: answer, "
        "response, completion, output; messages and conversations bring theirs]",
    )
    loss_on: Literal["responses", "last", "all"] = Field(
        "responses",
        description="What is learned of a conversation: every turn of the assistant, its last "
        "one, or every token.",
    )
    truncation: Literal["right", "left", "skip"] = Field(
        "right",
        description="What is cut off a row that is longer than --max-length; or it is skipped.",
    )
    dataset_num_proc: int | None = Field(
        None,
        ge=1,
        description="Processes that tokenize new data, on one host. [default: by the amount of "
        "work, up to the number of cores]",
    )
    ds_config: str = Field(
        str(SHIPPED_DS_CONFIGS / "zero3.json"),
        description="DeepSpeed configuration (JSON). 'auto' values are filled from these options; "
        "its numbers win over options that are not given. [default: the shipped zero3.json; on one "
        "process zero2.json]",
    )
    output_dir: str | None = Field(
        None, description="Folder of the run. [default: runs/MODEL-DATE-TIME]"
    )
    overwrite: bool = Field(False, description="Write into an output folder that is not empty.")
    load_in_4bit: bool = Field(
        False, description="Quantize the base to 4 bits (NF4, double quantization, bf16 compute)."
    )
    load_in_8bit: bool = Field(
        False, description="Quantize the base to 8 bits (int8 rows, bf16 compute)."
    )
    trust_remote_code: bool = Field(
        False, description="Run model code that comes with the base. Only if you have read it."
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Compute dtype of base and adapter. R is trained in fp32 always."
    )
    attn_implementation: str | None = Field(
        None,
        min_length=1,
        description="transformers' attention: eager, sdpa, flash_attention_2, … [default: the "
        "model's, sdpa as a rule]",
    )
    r: int = Field(64, ge=1, description="Rank of the adapter; r x r numbers a layer are trained.")
    target_modules: str = Field(
        ALL_LINEAR,
        min_length=1,
        description="Layers with an adapter: 'all-linear' (all but the head), or names as "
        "PEFT takes them, separated by commas: q_proj,v_proj.",
    )
    method: str = Field(
        DEFAULT_METHOD,
        description=f"How the adapter is made: {', '.join(METHODS)} (docs/methods.md), or "
        "peft:FILE.json, a configuration of PEFT's.",
    )
    lora_alpha: float | None = Field(
        None,
        gt=0,
        description="Scaling of methods that have one: alpha/r, or alpha/sqrt(r). [default: "
        f"{DEFAULT_ALPHA:g}]",
    )
    gamma: float | None = Field(
        None,
        gt=0,
        description="How small lora-ga (out^(1/4)/sqrt(gamma)) and lora-one (1/sqrt(gamma)) fill A "
        "and B. [default: 16 and 128]",
    )
    precondition: float | None = Field(
        None,
        gt=0,
        description="Lambda of LoRA-One's preconditioned update, of methods that train A and B: "
        "gradients go through inverses of (B'B + lambda I) and (AA' + lambda I); where A or B is 0 "
        "they are divided by lambda. [default: none]",
    )
    max_length: int = Field(
        1024, ge=8, description="Longest row in tokens; see --truncation for what is beyond."
    )
    packing: bool = Field(
        False,
        description="Put several short rows into one of --max-length tokens (best-fit decreasing); "
        "none sees another. --micro-batch-size then counts packs.",
    )
    group_by_length: bool = Field(
        True,
        description="Batch rows of similar lengths (sorted among those of 50 steps), to pad less; "
        "the order of steps stays random.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; wins over --epochs. [default: by --epochs]"
    )
    optimizer: Literal["adamw", "sgd", "lion", "adafactor", "muon"] = Field(
        "adamw",
        description="What trains R (or A and B): torch's AdamW, SGD with momentum 0.9 or "
        "Adafactor or Muon, or bitsandbytes' Lion. Each wants another --lr.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of R.")
    lr: float = Field(
        2e-3,
        gt=0,
        description="Peak learning rate. [default: 2e-3 where R is trained, 2e-4 where A and B "
        "are, or what PEFT makes]",
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape of the learning rate after the warmup."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps that warm up.")
    micro_batch_size: int = Field(4, ge=1, description="Rows per process and micro-batch.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Micro-batches per process and optimizer step."
    )
    train_batch_size: int | None = Field(
        None,
        ge=1,
        description="Rows per optimizer step, of all processes. It need not be divisible by "
        "anything, and decides --gradient-accumulation-steps unless that is given. [default: "
        "micro-batch size x accumulation x processes]",
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm; 0 switches clipping off."
    )
    max_skipped_steps: int = Field(
        3,
        ge=0,
        description="Steps in a row that may be left out since their loss or gradient is not "
        "finite; one more ends the run with the rows of that step.",
    )
    eval_every: int | None = Field(
        None,
        ge=1,
        description="Measure the held-out loss every so many steps, and keep the best checkpoint. "
        "[default: only before training and at the end]",
    )
    track_alignment: int | None = Field(
        None,
        ge=1,
        description="Every so many steps, measure how much of the full gradient the adapter's "
        "subspace holds, and how the last step agrees with that of full fine-tuning: "
        "alignment.jsonl and alignment.png.",
    )
    generate_samples: int = Field(
        0, ge=0, description="Held-out rows that are answered at every such evaluation."
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="End after so many evaluations in a row without a new best held-out loss; the "
        "adapter is the best one's. Needs --eval-every.",
    )
    load_best_model_at_end: bool = Field(
        False, description="Save the adapter of the best evaluation, not of the last step."
    )
    save_every: int = Field(
        100, ge=1, description="Steps between two checkpoints; there is one at the end, too."
    )
    keep_last: int = Field(
        2, ge=1, description="Checkpoints that are kept, beside that of the best evaluation."
    )
    on_save_error: Literal["stop", "continue"] = Field(
        "stop",
        description="What to do when a checkpoint cannot be written (a full disk); the one before "
        "it is kept in any case.",
    )
    resume: str | None = Field(
        None,
        min_length=1,
        description="Go on from a checkpoint: 'auto' (the newest of --output-dir that is whole, or "
        "from the start if there is none), a run's folder, or one of its checkpoints; with a "
        "folder, that run's options hold.",
    )
    init_samples: int | None = Field(
        None,
        ge=1,
        description="Training rows in the init's sample, of which one in eight is held back to "
        "measure losses on. [default: 0.1 % of them, at least 64]",
    )
    init_data: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None,
        min_length=1,
        description="Rows for the init in place of --data's, in any form that --data takes: init "
        "on one task, train on another. May be given several times.",
    )
    init_seed: int | None = Field(
        None,
        ge=0,
        description="Seed of the init, and of the rows in its sample. [default: --seed]",
    )
    init_lr: Annotated[float, Field(gt=0)] | Literal["auto", "schedule"] | None = Field(
        None,
        description="Eta, the learning rate of the step that the init takes: a number, 'schedule' "
        "(the first step's of --lr and its warmup), or 'auto' (the best of a handful, measured "
        "on the held-back rows). [default: auto; with --init-from, that init's]",
    )
    init_update: Literal["sign", "adam", "raw", "adafactor", "muon"] | None = Field(
        None,
        description="The step that lora-sb's init imitates: sign of the gradient (the paper), "
        "g/(|g|+epsilon) (AdamW's first step), the gradient itself (SGD's), Adafactor's or Muon's "
        "first step. [default: the --optimizer's: sign for adamw and lion, raw for sgd]",
    )
    init_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of a process for the init's gradients and SVD, beside base and "
        "activations (host memory counts, too); layers are taken in groups, for the time of about "
        "one more forward pass, or a pass for each group in models that cannot be cut into "
        "segments. [default: no limit]",
    )
    init_offload: bool = Field(False, description="Keep the init's gradient shards in host memory.")
    init_from: str | None = Field(
        None,
        description="Folder of an earlier `lorasb init` or train run whose basis is taken instead "
        "of computing one; r may be smaller than its r.",
    )
    force: bool = Field(
        False, description="Start although the predicted memory is more than what is free."
    )
    seed: int = Field(
        42,
        ge=0,
        description="Seed of the rows' order, the samples, what is held out, and the init.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    profile: int | None = Field(
        None,
        ge=1,
        description="Profile so many steps after the first, with what is done between them: a "
        "trace in profile.json.gz for ui.perfetto.dev or chrome://tracing, and the ten dearest "
        "operations. Of rank 0.",
    )
    report_to: Literal["none", "wandb", "trackio"] = Field(
        "none",
        description="Experiment tracker that gets the numbers, too, by the account that it finds "
        "on rank 0's host. Its package must be installed.",
    )

    @property
    def update(self) -> str:
        """``init_update``, or the optimizer's first step."""
        return self.init_update or FIRST_STEPS[self.optimizer]

    @property
    def seed_of_init(self) -> int:
        """``init_seed``, or the run's."""
        return self.seed if self.init_seed is None else self.init_seed

    @field_validator("data", "init_data", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("output_dir", "init_from", "resume")
    @classmethod
    def _at_home(cls, value: str | None) -> str | None:
        """A shell leaves the ~ of --output-dir=~/runs as it is."""
        return None if value is None else os.path.expanduser(value)  # noqa: PTH111, no Path

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS and not value.startswith(PEFT_PREFIX):
            raise ValueError(f"Give one of {', '.join(METHODS)}, or {PEFT_PREFIX}FILE.json")
        return value

    @field_validator("data_weights", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("val_set_size")
    @classmethod
    def _share_or_number(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and not value.is_integer():
            raise ValueError("Give a share below 1, or a whole number of rows")
        return value


def problems_of(error: ValidationError) -> list[str]:
    """One sentence for each field that is wrong."""
    by_field: dict[str, list[dict[str, Any]]] = {}
    for found in error.errors():
        by_field.setdefault(str(found["loc"][0]) if found["loc"] else "?", []).append(dict(found))
    return [_problem(field, errors) for field, errors in by_field.items()]


def _problem(field: str, errors: list[dict[str, Any]]) -> str:
    if errors[0]["type"] == "extra_forbidden":
        known = ", ".join(RunConfig.model_fields)
        return f"'{field}' is not an option of this version. It knows: {known}."
    # A field of several types has a message for each of them.
    messages = " or ".join(e["msg"][0].lower() + e["msg"][1:] for e in errors)
    return f"{option_name(field)} {errors[0]['input']!r} is not allowed: {messages}."
