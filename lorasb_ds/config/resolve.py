"""Make a run's configuration: flags, then an earlier run's options, then defaults. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorasb_ds.config.adapter_options import UNIFORM
from lorasb_ds.config.chat_templates import TEMPLATES
from lorasb_ds.config.classification import classification_problems
from lorasb_ds.config.methods import DEFAULT_METHOD, METHODS, PEFT_PREFIX, default_lr
from lorasb_ds.config.paths import expand_home, read_json
from lorasb_ds.config.run_config import RunConfig, problems_of
from lorasb_ds.config.run_layout import (
    ADAPTER_CONFIG,
    DS_CONFIG_COPY,
    PEFT_COPY,
    RUN_JSON,
    TEMPLATE_COPY,
    resumed_run,
)
from lorasb_ds.config.sequence_parallel import sequence_problems
from lorasb_ds.config.stored_paths import check_no_folder_has_the_name
from lorasb_ds.errors import ConfigError, option_name


def load_run_config(given: Mapping[str, Any], run_json: str | None = None) -> RunConfig:
    """Return the configuration of a run.

    Flags win over a replayed ``run.json``, which wins over the defaults.

    Args:
        given: fields that were asked for; a value of None means not given.
        run_json: path of an earlier run's ``run.json``, or None.
    Raises:
        ConfigError: with one paragraph for every problem.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if asked.get("resume", "auto") != "auto":
        folder = resumed_run(asked["resume"])
        run_json = run_json or str(folder / RUN_JSON)
        asked.setdefault("output_dir", str(folder))
    values = {**(_replayed(run_json, asked) if run_json is not None else {}), **asked}
    if "template_date" not in values:
        values |= _date_of_earlier(values)
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        raise ConfigError(*problems_of(error)) from None
    problems = [*_data_problems(config), *_partner_problems(config)]
    problems += sequence_problems(config)
    problems += classification_problems(config, asked)
    if problems := [*problems, *_method_problems(config, asked)]:
        raise ConfigError(*problems)
    # What was replayed is a default here: a ds_config's numbers may win over it.
    return RunConfig.model_construct(_fields_set=set(asked), **dict(config))


def _partner_problems(config: RunConfig) -> list[str]:
    """Return problems of options that need others."""
    problems = [
        f"{option_name(field)} needs --eval-every N: it looks at these evaluations."
        for field in ("early_stopping_patience", "load_best_model_at_end", "generate_samples")
        if getattr(config, field) and config.eval_every is None
    ]
    if config.early_stopping_threshold and config.early_stopping_patience is None:
        problems.append(
            "--early-stopping-threshold needs --early-stopping-patience N: it says which losses "
            "that one waits for."
        )
    if config.eval_every is not None and not (config.eval_data or config.val_set_size):
        problems.append(
            "--eval-every needs held-out rows. Name them by --eval-data, or give --val-set-size."
        )
    if config.rank_allocation != UNIFORM and config.init_from is None:
        problems.append(
            "--rank-allocation energy needs --init-from a basis with more than r directions of "
            f"every layer. `lorasb init --r {2 * config.r} --output-dir runs/basis`, with the "
            "other options of this run, makes it; then add --init-from runs/basis."
        )
    if config.activation_offload and not config.gradient_checkpointing:
        problems.append(
            "--activation-offload moves the inputs of blocks that --gradient-checkpointing "
            "recomputes. Add --gradient-checkpointing, or leave it out."
        )
    return problems


# How the init's gradients are computed.
WORK_OF_INIT = ("init_memory_gib", "init_offload")


def _method_problems(config: RunConfig, asked: Mapping[str, Any]) -> list[str]:
    """Return problems of options that the method does not use."""
    method = METHODS.get(config.method)
    if method is None:
        return _peft_problems(config, asked)
    useless = {
        "lora_alpha": method.scaling == "1" and "it has no scaling",
        "gamma": method.gamma == 1 and "only lora-ga and lora-one have it",
        "precondition": method.trains_r and "it is for methods that train A and B",
        "init_update": method.matrix != "update" and f"what it decomposes is: {method.matrix}",
        "init_lr": not method.takes_step and "it takes no step in its init",
        "rebase_every": not (method.trains_r and method.needs_gradient)
        and "it is for methods that train R in a basis of the gradient",
        "rank_allocation": (not method.trains_r or method.decomposes == "nothing")
        and "it is for methods that train R in a basis with a spectrum",
    }
    if not method.needs_gradient:
        why = "its init looks at no gradient"
        useless["init_data"] = why
        if config.track_alignment is None:  # which does
            useless |= dict.fromkeys(WORK_OF_INIT, why)
    return [
        f"{option_name(field)} means nothing to --method {config.method}: {why}. Leave it out."
        for field, why in useless.items()
        if field in asked and why
    ]


def read_peft_file(method: str) -> dict[str, Any]:
    """Return the object in the file of ``--method peft:FILE.json``.

    Raises:
        ConfigError: if there is no such file, or it has no peft_type.
    """
    content = read_json(method.removeprefix(PEFT_PREFIX), "--method peft:")
    if not isinstance(content.get("peft_type"), str):
        raise ConfigError(
            f'--method {method}: the file has no peft_type. Add one, such as "LORA" with '
            '"use_dora": true, or "LOHA"; an adapter_config.json of PEFT has it.'
        )
    return content


def _peft_problems(config: RunConfig, asked: Mapping[str, Any]) -> list[str]:
    """Return problems of options that do not work with PEFT's own methods."""
    read_peft_file(config.method)
    base = config.load_in_4bit or config.load_in_8bit
    refused = {
        "--load-in-4bit and --load-in-8bit": base
        and "PEFT's layers cannot read our packed weights",
        "--track-alignment": config.track_alignment and "it reads A and B of our own layers",
        "--init-from": config.init_from and "PEFT has its own init",
        "--init-data": config.init_data and "PEFT has its own init",
        "--rebase-every": config.rebase_every and "PEFT has its own init",
        "--rank-allocation": config.rank_allocation != UNIFORM and "the file decides about ranks",
        "--precondition": config.precondition and "PEFT's layers have their own gradients",
    }
    return (
        [
            f"{option} does not work with --method {config.method}: {why}. Leave it out, or choose "
            f"one of {', '.join(METHODS)}."
            for option, why in refused.items()
            if why
        ]
        + [
            f"{option_name(field)} means nothing to --method {config.method}: the file decides it. "
            "Leave it out."
            for field in ("lora_alpha", "gamma", "init_update", "init_lr", "target_modules", "r")
            if field in asked
        ]
        + [
            f"{option_name(field)} means nothing to --method {config.method}: PEFT has its own "
            "init. Leave it out."
            for field in WORK_OF_INIT
            if field in asked
        ]
    )


def _data_problems(config: RunConfig) -> list[str]:
    """Return problems of options of the data that exclude each other."""
    problems = []
    if config.val_set_size is not None and config.eval_data is not None:
        problems.append(
            "--val-set-size holds out rows of --data, --eval-data brings others. Give one of them."
        )
    weights = config.data_weights
    if weights is not None and len(weights) != len(config.data):
        problems.append(
            f"--data-weights {','.join(f'{weight:g}' for weight in weights)} has {len(weights)} "
            f"weights, but --data was given {len(config.data)} time(s). Give one for each."
        )
    return problems


def replaced_by(asked: Mapping[str, Any], earlier: Mapping[str, Any]) -> set[str]:
    """Return the fields of a file that options on the command line replace, beside their own.

    Args:
        asked: fields that were given on the command line.
        earlier: fields of the file.
    """
    replaced = set()
    method = earlier.get("method", DEFAULT_METHOD)
    if asked.get("method", method) != method:
        replaced |= {"lr", "lora_alpha", "gamma", "precondition", "init_update", "init_lr"}
        replaced |= {"rank_allocation", "rebase_every"}
    if "epochs" in asked:
        replaced.add("max_steps")
    if "gradient_accumulation_steps" in asked:
        replaced.add("train_batch_size")
    if "data" in asked:  # --init-data stays: one init may serve several tasks
        replaced |= {"eval_data", "prompt_column", "response_column", "data_weights"}
        replaced.add("max_skipped_rows")
    if "eval_data" in asked:
        replaced.add("val_set_size")
    if "val_set_size" in asked:
        replaced.add("eval_data")
    if "lm_eval" in asked:
        replaced.add("data")
    if asked.get("resume") is not None:
        replaced |= {"overwrite"} if asked["resume"] == "auto" else {"overwrite", "output_dir"}
    for one, other in (("load_in_4bit", "load_in_8bit"), ("load_in_8bit", "load_in_4bit")):
        if asked.get(one):
            replaced.add(other)
    if asked.get("overwrite"):
        replaced.add("resume")
    return replaced


def _replayed(run_json: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return an earlier run's fields, without those that what was asked for replaces."""
    content = read_json(run_json, "--config")
    config = content.get("config")
    if not isinstance(config, dict):
        raise ConfigError(
            f"--config {run_json} has no 'config' entry. Give the run.json that an earlier run "
            "wrote into its output folder."
        )
    # A replay is a new run with a folder of its own. The file may be somebody else's: only the
    # command line decides whether code is trusted.
    dropped = {"output_dir", "overwrite", "resume", "trust_remote_code"} | replaced_by(
        asked, config
    )
    if "r" in asked and _has_default_lr(config):  # which is another one at another r
        dropped.add("lr")
    replayed = {name: value for name, value in config.items() if name not in dropped}
    taken = {name: value for name, value in replayed.items() if name not in asked}
    check_no_folder_has_the_name(content, taken)
    folder = Path(expand_home(run_json)).parent
    if (folder / DS_CONFIG_COPY).is_file():
        replayed["ds_config"] = str(folder / DS_CONFIG_COPY)
    if str(replayed.get("method")).startswith(PEFT_PREFIX) and (folder / PEFT_COPY).is_file():
        replayed["method"] = f"{PEFT_PREFIX}{folder / PEFT_COPY}"
    if replayed.get("chat_template") and (folder / TEMPLATE_COPY).is_file():
        replayed["chat_template"] = str(folder / TEMPLATE_COPY)
    return replayed


def _has_default_lr(config: Mapping[str, Any]) -> bool:
    method, r = str(config.get("method", DEFAULT_METHOD)), config.get("r")
    return isinstance(r, int) and r > 0 and config.get("lr") == default_lr(method, r)


def _date_of_earlier(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the date of the run that is continued, or whose init is taken: its rows have it."""
    continued = values.get("output_dir") if values.get("resume") is not None else None
    for folder in (continued, values.get("init_from")):
        file = Path(expand_home(folder or "")) / RUN_JSON
        if folder is not None and file.is_file():
            config = read_json(str(file), "run.json").get("config")
            earlier = config.get("template_date") if isinstance(config, dict) else None
            return {"template_date": earlier} if earlier else {}
    return {}


def with_adapter(given: Mapping[str, Any], adapter: str | None) -> dict[str, Any]:
    """Return options with the base model's filled from an adapter.

    Args:
        given: fields that were asked for; a value of None means not given.
        adapter: a run's folder, its adapter, a checkpoint, or a PEFT folder; its content is
            checked where it is read.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if adapter is None:
        return asked
    folder = Path(expand_home(adapter)).resolve()
    for run in (folder, folder.parent, folder.parent.parent):
        if (run / RUN_JSON).is_file():
            content = read_json(str(run / RUN_JSON), "--adapter")
            config = content.get("config")
            trained = config if isinstance(config, dict) else {}
            read: tuple[str, ...] = ("model", "dtype", "chat_template", "template_date")
            if trained.get("task_type") == "sequence-classification":
                read = ("task_type", "model", "dtype", "max_length")
            names = [name for name in read if name not in asked]
            if not {"load_in_4bit", "load_in_8bit"} & set(asked):
                names += ["load_in_4bit", "load_in_8bit"]
            taken = {name: trained[name] for name in names if trained.get(name)}
            if (run / TEMPLATE_COPY).is_file() and taken.get("chat_template"):
                taken["chat_template"] = str(run / TEMPLATE_COPY)
            elif taken.get("chat_template", "chatml") not in TEMPLATES:
                del taken["chat_template"]  # the file may be gone: the adapter has a copy
            check_no_folder_has_the_name(content, taken)
            return taken | asked
    file = folder / ADAPTER_CONFIG
    config = read_json(str(file), "--adapter") if file.is_file() else {}
    base = config.get("base_model_name_or_path")
    return {"model": base, **asked} if isinstance(base, str) else asked
