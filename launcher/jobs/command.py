"""What to run: the argument list and environment of a job. Pure."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.paths import WORKERS
from lorasb_ds.errors import ConfigError

# Tells the workers that the CPU, which DeepSpeed falls back to, is not what was asked for.
GPUS_ASKED_FOR = "LORASB_NUM_GPUS"
BACKENDS = ("pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich")
PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)  # read by no shell, and not by pdsh


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


def _runner(python: str) -> list[str]:
    # `python -m` and not the `deepspeed` script: it need not be on PATH, and is this environment's.
    return [python, "-m", "deepspeed.launcher.runner"]


def _agent() -> str:
    return str(WORKERS / "jobs" / "agent.py")


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
