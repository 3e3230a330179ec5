"""What to run: the argument list and environment of a job. Pure."""

from __future__ import annotations

import os
import re
import shlex
import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.ranks import WORKERS
from lorasb_ds.errors import ConfigError

# Tells the workers that the CPU, which DeepSpeed falls back to, is not what was asked for.
GPUS_ASKED_FOR = "LORASB_NUM_GPUS"
BACKENDS = ("pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich")
# No password is asked for, and a connection that broke is noticed.
SSH_OPTIONS = ("-oBatchMode=yes", "-oServerAliveInterval=5", "-oServerAliveCountMax=3")
PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)  # read by no shell, and not by pdsh

VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # a name

# Variables of the launcher's environment that the ranks of other hosts get, too. DeepSpeed's own
# list: PYTHON*, MLFLOW*, MV2*, UCX*, and the accelerator's (NCCL*).
EXPORTED = re.compile(
    r"(HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|DATASETS|TORCH|PYTORCH|OMP|MKL|KMP|GOMP|GLOO|NCCL|"
    r"FI|UCX|DS|DEEPSPEED|LORASB|WANDB|TRACKIO|TRITON|BNB|CUDA|ROCM|HIP|HSA|XDG_CACHE)_\w+"
    r"|PATH|LD_LIBRARY_PATH|PYTHONHASHSEED"
)
# Which of a host's devices a process has is for DeepSpeed to say on each host.
NOT_EXPORTED = re.compile(r"(CUDA|HIP|ROCR?)_VISIBLE_DEVICES|DS_ENV_FILE|LORASB_NODE_RANK")
SECRET = re.compile(r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.I)


@dataclass(frozen=True)
class Hosts:
    """The hosts of a job as DeepSpeed is told of them.

    Args:
        slots: host -> its slots' numbers, in the order of the ranks.
        hostfile: path of a hostfile that names all of them (``hostfile.write_hostfile``).
        node_rank: this host's place, where every host is started by hand or by a scheduler
            (``--no-ssh``); None where DeepSpeed starts them all from here.
    """

    slots: Mapping[str, Sequence[int]]
    hostfile: str
    master_addr: str
    launcher: str = "pdsh"
    launcher_args: str = ""
    ssh_port: int | None = None
    node_rank: int | None = None


def local_command(
    worker_arguments: Sequence[str],
    *,
    count: int | None,
    master_port: int,
    python: str = sys.executable,
) -> list[str]:
    """The argument list of `deepspeed` for a job on this host.

    Args:
        count: processes. None: one for each GPU that DeepSpeed finds, or that
            CUDA_VISIBLE_DEVICES names (DeepSpeed ignores that variable when it gets a count).
    """
    # This host only: without a hostfile of its own, DeepSpeed would read /job/hostfile.
    command = [*_runner(python), "--hostfile", os.devnull]
    if count is not None:
        command += ["--num_accelerators", str(count)]
    return [*command, "--master_port", str(master_port), _agent(), *worker_arguments]


def hosts_command(
    worker_arguments: Sequence[str],
    hosts: Hosts,
    *,
    master_port: int,
    python: str = sys.executable,
) -> list[str]:
    """The argument list of `deepspeed` for a job on the hosts of a hostfile.

    Raises:
        ConfigError: for an argument that would be read by a shell on the way and cannot be quoted.
    """
    command = [*_runner(python), "--hostfile", hosts.hostfile]
    command += ["--master_addr", hosts.master_addr, "--master_port", str(master_port)]
    selected = [slots for slots in hosts.slots.values() if list(slots) != list(range(len(slots)))]
    if selected:
        if hosts.launcher != "pdsh":
            raise ConfigError(
                f"--launcher {hosts.launcher} starts processes by their number and cannot choose "
                "slots. Choose whole hosts by --include or --exclude, or use --launcher pdsh."
            )
        named = (f"{host}:{','.join(map(str, slots))}" for host, slots in hosts.slots.items())
        command += ["--include", "@".join(named)]
    if hosts.node_rank is not None:
        return [
            *(*command, "--no_ssh", "--node_rank", str(hosts.node_rank)),
            *(_agent(), *worker_arguments),
        ]
    # A single host is remote, too: without this DeepSpeed would start it here.
    command += ["--force_multi", "--launcher", hosts.launcher]
    if hosts.launcher_args:
        command.append(f"--launcher_args={hosts.launcher_args}")
    if hosts.ssh_port is not None:
        command += ["--ssh_port", str(hosts.ssh_port)]
    if hosts.launcher != "pdsh":  # these start a program, without a shell
        return [*command, _agent(), *worker_arguments]
    for what, path in (
        ("The interpreter", python),
        ("The working directory", str(Path.cwd())),
        ("The project's folder", _agent()),
    ):
        if not PLAIN.fullmatch(path):
            raise ConfigError(
                f"{what} is {path!r}, which DeepSpeed's launcher hands unquoted to a shell on the "
                "hosts. Use a path of letters, digits and any of _@+=:,./-"
            )
    return [*command, _agent(), *map(pdsh_word, worker_arguments)]


def pdsh_word(word: str) -> str:
    """A word of the worker's command line as it has to be, to come out of pdsh as it was.

    DeepSpeed puts a word that holds a space between double quotes (and escapes only those) and
    leaves others as they are; a shell on the host reads them. On the way pdsh puts hosts' names,
    numbers and users in place of %h, %n and %u, and % in place of %%.

    Raises:
        ConfigError: for what cannot come through.
    """
    word_has_space = " " in word
    if "\0" in word or (word_has_space and re.search(r"[$`\\!]", word)):
        raise ConfigError(
            f"{word!r} cannot be handed to the hosts: a shell there would read its $ ` \\ or ! "
            "between the double quotes that DeepSpeed gives to words with spaces. Put it into a "
            "file (--config RUN.JSON takes all options), or use another path."
        )
    return (word if word_has_space else shlex.quote(word)).replace("%", "%%")


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the launcher that the ranks of all hosts get without being asked for."""
    return {
        name: value
        for name, value in environment.items()
        if EXPORTED.fullmatch(name) and not NOT_EXPORTED.fullmatch(name) and not is_secret(name)
    }


def asked_for(environment: Mapping[str, str], asked: Sequence[str]) -> dict[str, str]:
    """The variables of ``--env``: ``NAME=VALUE``, or ``NAME`` for the launcher's own value.

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
    """Whether a variable's name says so: HF_TOKEN, WANDB_API_KEY; not TOKENIZERS_PARALLELISM."""
    return SECRET.search(variable) is not None


def deepspeed_env(variables: Mapping[str, str], launcher: str) -> str:
    """The text of a `.deepspeed_env`: what DeepSpeed sets on every host.

    Raises:
        ConfigError: for values that do not come through. DeepSpeed puts those that hold more than
            plain characters between double quotes; a shell on the hosts reads them (pdsh), or
            they would stay (the others, which use no shell). Slurm's srun cuts at commas.
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
    """The variables of a user's own `.deepspeed_env`: lines of NAME=VALUE.

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
    """The environment of `deepspeed` itself, where it starts other hosts."""
    result = {name: value for name, value in environment.items() if not _leaks(name)}
    result["DS_ENV_FILE"] = env_file
    given = result.get("PDSH_SSH_ARGS_APPEND", "")
    result["PDSH_SSH_ARGS_APPEND"] = f"{given} {' '.join(SSH_OPTIONS)}".strip()
    return result


def _leaks(name: str) -> bool:
    """DeepSpeed would export it, though it is a secret: MLFLOW_TRACKING_PASSWORD."""
    return is_secret(name) and name.startswith(("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL"))


def _runner(python: str) -> list[str]:
    # `python -m` and not the `deepspeed` script: it need not be on PATH, and is this environment's.
    return [python, "-m", "deepspeed.launcher.runner"]


def _agent() -> str:
    return str(WORKERS / "agent.py")


def visible_gpus(environment: Mapping[str, str], num_gpus: int | None) -> str | None:
    """CUDA_VISIBLE_DEVICES of a job: the first ``num_gpus`` of those that are visible now.

    Returns:
        None where the variable is not set; all GPUs are visible then.
    Raises:
        ConfigError: if fewer are visible.
    """
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not visible:
        return None
    if num_gpus is not None and num_gpus > len(visible):
        raise ConfigError(
            f"--num-gpus {num_gpus}, but CUDA_VISIBLE_DEVICES={','.join(visible)} shows "
            f"{len(visible)}. Lower it, or change the variable."
        )
    return ",".join(visible[:num_gpus])


def job_environment(
    environment: Mapping[str, str],
    num_procs: int | None,
    num_gpus: int | None,
    num_cores: int | None,
) -> dict[str, str]:
    """A job's environment: ninja is found, and on the CPU the ranks share the cores.

    Args:
        num_cores: of this host, where the job runs on it alone; None leaves the threads to the
            ranks, which count the cores of theirs.
    """
    result = dict(environment)
    # Some generated data depends on it, and all ranks must see the same rows.
    result.setdefault("PYTHONHASHSEED", "0")
    # ninja lies beside the interpreter, whose environment need not be active.
    bin_dir = str(Path(sys.executable).parent)
    result["PATH"] = os.pathsep.join([bin_dir, *filter(None, [result.get("PATH")])])
    if num_procs is not None:
        result["DS_ACCELERATOR"] = "cpu"
        if num_cores is not None:
            result.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_procs)))
    elif num_gpus is not None:
        result[GPUS_ASKED_FOR] = str(num_gpus)
        if num_cores is not None and (visible := visible_gpus(environment, num_gpus)) is not None:
            result["CUDA_VISIBLE_DEVICES"] = visible
    return result
