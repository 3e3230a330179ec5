"""The names of the files in a run's folder, and which folder a run gets.

Standard library only at run time: the agent beside every rank imports it.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorasb_ds.config.overwriting import check_replaceable, names_in, read_object
from lorasb_ds.config.paths import expand_home
from lorasb_ds.errors import ConfigError

if TYPE_CHECKING:
    from lorasb_ds.config.output_options import OutputOptions

RUN_JSON = "run.json"  # configuration and provenance: the mark of a run's folder; see `is_run`
LOCK = "run.lock"  # held while a job writes here; stays when it ends
LAUNCHER_LOCK = "launcher.lock"  # held while a launcher is at work, from before its job begins
REPORT = "report.md"  # written last: a run that has it is finished
DS_CONFIG_COPY = "ds_config.json"  # DeepSpeed's configuration, as the run was given it
PEFT_COPY = "peft.json"  # the file of --method peft:FILE.json
TEMPLATE_COPY = "chat_template.jinja"  # the template of --chat-template
GIVEN_ROWS = "rows-{}"  # DIGEST.jsonl, of rows that a program gave; NUMBER.tmp as it is written

METRICS, SAMPLES, LOSS_PICTURE = "metrics.jsonl", "samples.jsonl", "loss.png"
ALIGNMENT, ALIGNMENT_PICTURE = "alignment.jsonl", "alignment.png"
PROFILE, PROFILE_ASIDE = "profile.json.gz", "profile.tmp.json.gz"
TENSORBOARD = "tensorboard"
TRACKING = "tracking.json"  # the name and id of the run at its experiment tracker
WANDB = "wandb"  # what wandb stores beside it

BASIS_FILE, INIT_REPORT, INIT_PICTURE = "basis.safetensors", "init.json", "init.png"

# rebased/step-00000100/ of a basis as above, for each time that --rebase-every has made one.
REBASED = "rebased"

# checkpoints/step-00000100/ of two files, and their checksums.
CHECKPOINTS, CHECKPOINT_PREFIX, CHECKPOINT_INDEX = "checkpoints", "step-", "index.json"
STATE_FILE, TRAINER_FILE = "state.safetensors", "trainer.json"
CHECKPOINT_FILES = (STATE_FILE, TRAINER_FILE)

ADAPTER = "adapter"  # a folder in PEFT's format: the two files, and the tokenizer's
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CARD = "README.md"  # in it
INSPECT_PICTURE = "inspect.png"  # of `lorasb inspect`
EXPORTED = "exported"  # where `lorasb export` writes by default, in the same format

LAUNCH, LOGS = "launch", "logs"  # folders of the launcher
HOSTFILE, DEEPSPEED_FILES = "hostfile", "deepspeed"  # in launch/: beginnings of names
SESSION = "session"  # in launch/: the secret word of the job that has begun last
RANK_LOG = "rank-{}.log"  # in logs/
EVAL_RESULT, EVAL_ANSWERS = "eval.json", "answers.jsonl"  # of `lorasb eval --output-dir`


def resumed_run(resume: str) -> Path:
    """Return the run's folder for ``--resume PATH``, which names it or one of its checkpoints.

    Raises:
        ConfigError: if PATH is neither.
    """
    path = Path(expand_home(resume))
    for folder in (path, path.parent.parent):
        if (folder / RUN_JSON).is_file():
            return folder
    raise ConfigError(
        f"--resume {resume}: neither a run's folder (with a run.json) nor a checkpoint in one. "
        "Name such a folder, or give --resume auto and --output-dir."
    )


def rebasing_steps(every: int | None, num_steps: int) -> range:
    """Return the steps after which a run of ``num_steps`` is re-based (``--rebase-every``)."""
    return range(every, num_steps, every) if every is not None else range(0)


def rebased_folder(run: Path, step: int) -> Path:
    """Return the folder of the basis that a run has made after a step."""
    return run / REBASED / f"{CHECKPOINT_PREFIX}{step:08d}"


def default_output_dir(model: str, prefix: str = "") -> Path:
    """Return the folder of a run that names none: runs/MODEL-DATE-TIME."""
    return Path("runs") / f"{prefix}{Path(model).name}-{datetime.now():%Y%m%d-%H%M%S}"


def launcher_files(folder: Path) -> list[Path]:
    """Return the files that a launcher has written into a run's folder, logs of ranks included."""
    names = (
        f"{LOGS}/{RANK_LOG.format('*')}",
        f"{LAUNCH}/{DEEPSPEED_FILES}*",
        f"{LAUNCH}/{HOSTFILE}*",
        f"{LAUNCH}/{SESSION}",
    )
    return [path for name in names for path in folder.glob(name)]


def given_rows(folder: Path) -> list[Path]:
    """Return the files of rows that programs have given, half-written ones included."""
    names = ("[0-9a-f]" * 16 + ".jsonl", "[0-9]*.tmp")
    return [path for name in names for path in folder.glob(GIVEN_ROWS.format(name))]


def is_run(folder: Path) -> bool:
    """Return whether a folder has the run.json of a run of ours."""
    config = read_object(folder / RUN_JSON).get("config")
    return isinstance(config, dict) and {"model", "data", "r"} <= config.keys()


def foreign_to_run(folder: Path) -> list[str]:
    """Return the names in a folder that no run of ours has left there; [] in a run's folder."""
    if is_run(folder):
        return []
    # A run that was killed early has left a file that it was writing, and the launcher's own.
    own = launcher_files(folder)
    early = [name for name in (LAUNCH, LOGS) if {*(folder / name).glob("*")} <= {*own}]
    early += [LOCK, LAUNCHER_LOCK, *(path.name for path in given_rows(folder))]
    return [n for n in names_in(folder) if not n.endswith(".tmp") and n not in early]


def _foreign_to_evaluation(folder: Path) -> list[str]:
    if {"model", "adapter", "world_size"} <= read_object(folder / EVAL_RESULT).keys():
        return []
    return foreign_to_run(folder)


def check_output_dir(
    options: OutputOptions, init_from: str | None = None, evaluation: bool = False
) -> None:
    """Refuse to write into a folder that holds something, unless it is a run's to overwrite.

    Args:
        init_from: ``--init-from``, a folder that is not to be overwritten.
        evaluation: `lorasb eval` asks, which may also replace an earlier evaluation.
    Raises:
        ConfigError: if the folder may not be written.
    """
    if options.resume is not None and options.output_dir is None:
        raise ConfigError("--resume auto goes on in --output-dir. Name the run's folder by it.")
    if options.resume is not None and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other. Give one of them.")
    if options.output_dir is None:
        return
    folder = Path(options.output_dir)
    if init_from is not None and folder.resolve() == Path(init_from).resolve():
        raise ConfigError(
            f"--output-dir {folder} is the folder of --init-from, and would be overwritten. Name "
            "another one."
        )
    if folder.is_dir() and is_run(folder):
        if options.resume is not None:
            return
    elif folder.is_dir() and not foreign_to_run(folder):
        return  # an early end's
    foreign = _foreign_to_evaluation if evaluation else foreign_to_run
    kind = "a run's or an evaluation's folder" if evaluation else "a run's folder"
    check_replaceable("--output-dir", folder, options.overwrite, foreign, kind)
