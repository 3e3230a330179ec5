"""Variables that the hosts of a job get, over ssh and by DeepSpeed."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorasb_ds.errors import ConfigError

# No password is asked for, and a connection that broke is noticed.
SSH_OPTIONS = ("-oBatchMode=yes", "-oServerAliveInterval=5", "-oServerAliveCountMax=3")
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # a name
# Variables of the launcher's environment that the ranks of other hosts get, too. DeepSpeed's own
# list: PYTHON*, MLFLOW*, MV2*, UCX*, and the accelerator's (NCCL*).
EXPORTED = re.compile(
    r"(HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|DATASETS|TORCH|PYTORCH|OMP|MKL|KMP|GOMP|GLOO|NCCL|"
    r"FI|UCX|DS|DEEPSPEED|LORASB|WANDB|TRACKIO|TRITON|BNB|CUDA|ROCM|HIP|HSA|XDG_CACHE)_\w+"
    r"|PATH|LD_LIBRARY_PATH|PYTHONHASHSEED"
)
# DeepSpeed decides on each host which of its devices a process gets.
NOT_EXPORTED = re.compile(r"(CUDA|HIP|ROCR?)_VISIBLE_DEVICES|DS_ENV_FILE|LORASB_NODE_RANK")
SECRET = re.compile(r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.I)


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the launcher's variables that the ranks of all hosts get without being asked for."""
    return {
        name: value
        for name, value in environment.items()
        if EXPORTED.fullmatch(name) and not NOT_EXPORTED.fullmatch(name) and not is_secret(name)
    }


def asked_for(environment: Mapping[str, str], asked: Sequence[str]) -> dict[str, str]:
    """Return the variables of ``--env``: ``NAME=VALUE``, or ``NAME`` for the launcher's own value.

    Raises:
        ConfigError: if one has no name or no value.
    """
    result = {}
    for word in asked:
        name, given, value = word.partition("=")
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"--env {name}: not a variable's name. Give NAME=VALUE or NAME.")
        if not given and name not in environment:
            raise ConfigError(f"--env {name}: it is not set here. Set it, or give {name}=VALUE.")
        result[name] = value if given else environment[name]
    return result


def is_secret(variable: str) -> bool:
    """Return whether a name is a secret's: HF_TOKEN, WANDB_API_KEY; not TOKENIZERS_PARALLELISM."""
    return SECRET.search(variable) is not None


def deepspeed_env(variables: Mapping[str, str], launcher: str) -> str:
    """Return the text of a `.deepspeed_env`: the variables that DeepSpeed sets on every host.

    Raises:
        ConfigError: for values that would be changed on the way. DeepSpeed puts double quotes
            around those that hold more than plain characters; a shell on the hosts reads them
            (pdsh), or they would stay (the others, which use no shell). Slurm's srun splits at
            commas.
    """
    problems = []
    for name, value in variables.items():
        bad = re.findall(r"[\"$`\\\n\r\0]", value)
        if launcher != "pdsh":
            # DeepSpeed would put quotes around it, which nobody removes.
            bad = bad or re.findall(r"[^\w@%+=:,./-]", value, re.ASCII)
        if launcher == "slurm":
            bad += re.findall(",", value)
        if bad:
            # Its value is not shown: it may be a secret that was asked for.
            problems.append(
                f"The variable {name} holds {bad[0]!r}, which does not come through --launcher "
                f"{launcher} to the hosts. Change it by --env {name}=VALUE, or unset it."
            )
    if problems:
        raise ConfigError(*problems)
    if launcher == "pdsh":  # which reads %, as in `pdsh_word`
        variables = {name: value.replace("%", "%%") for name, value in variables.items()}
    return "".join(f"{name}={value}\n" for name, value in sorted(variables.items()))


def read_deepspeed_env(path: Path) -> dict[str, str]:
    """Read the variables of a user's own `.deepspeed_env`: lines of NAME=VALUE.

    Raises:
        ConfigError: for another line. DeepSpeed ends with a traceback at a comment or a blank one.
    """
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, given, value = line.partition("=")
        if not given or not VARIABLE.fullmatch(name.strip(string.whitespace)):
            raise ConfigError(
                f"{path}, line {number}: {line!a} is not NAME=VALUE, and DeepSpeed takes no "
                "comment and no blank line there. Remove it."
            )
        found[name.strip()] = value.strip()
    return found


def hosts_environment(environment: Mapping[str, str], env_file: str) -> dict[str, str]:
    """Return the environment of `deepspeed` itself, where it starts other hosts."""
    result = {name: value for name, value in environment.items() if not _leaks(name)}
    result["DS_ENV_FILE"] = env_file
    given = result.get("PDSH_SSH_ARGS_APPEND", "")
    result["PDSH_SSH_ARGS_APPEND"] = f"{given} {' '.join(SSH_OPTIONS)}".strip()
    return result


def _leaks(name: str) -> bool:
    """Return whether DeepSpeed would export a secret, as MLFLOW_TRACKING_PASSWORD."""
    return is_secret(name) and name.startswith(("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL"))
