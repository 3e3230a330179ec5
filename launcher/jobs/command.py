"""Argument lists and environment of a job. Pure."""

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

# Set where GPUs were asked for: the workers refuse the CPU, which DeepSpeed falls back to.
GPUS_ASKED_FOR = "LORASB_NUM_GPUS"
# The GPUs of a job on this host, where they have other names than numbers: see job_environment.
GPU_NAMES = "LORASB_GPU_NAMES"
BACKENDS = ("pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich")
PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)  # read by no shell, and not by pdsh


@dataclass(frozen=True)
class Hosts:
    """The hosts of a job, as DeepSpeed gets them.

    Args:
        slots: host -> its slots' numbers, in the order of the ranks.
        hostfile: path of a hostfile that names all of them (``hostfile.write_hostfile``).
        master_addr: address of the first host, where all ranks meet.
    """

    slots: Mapping[str, Sequence[int]]
    hostfile: str
    master_addr: str
    master_port: int


def local_command(
    worker_arguments: Sequence[str],
    *,
    count: int | None,
    master_port: int,
    python: str = sys.executable,
) -> list[str]:
    """Return the argument list of `deepspeed` for a job on this host.

    Args:
        count: processes. None: one for each GPU that DeepSpeed finds, or that
            CUDA_VISIBLE_DEVICES names (DeepSpeed ignores that variable when it gets a count).
    """
    # This host only: without a hostfile of its own, DeepSpeed would read /job/hostfile.
    command = [*_runner(python), "--hostfile", os.devnull]
    if count is not None:
        command += ["--num_accelerators", str(count)]
    return [*command, "--master_port", str(master_port), _agent(), *worker_arguments]


def by_hand_command(
    worker_arguments: Sequence[str],
    hosts: Hosts,
    *,
    node_rank: int,
    python: str = sys.executable,
) -> list[str]:
    """Return the argument list of `deepspeed` for one host of a job that is started host by host.

    Args:
        node_rank: of this host, among those of the hostfile.
    """
    return [
        *_on_hosts(python, hosts),
        *_include(hosts),
        *("--no_ssh", "--node_rank", str(node_rank)),
        *(_agent(), *worker_arguments),
    ]


def ssh_command(
    worker_arguments: Sequence[str],
    hosts: Hosts,
    *,
    launcher: str = "pdsh",
    launcher_args: str = "",
    ssh_port: int | None = None,
    python: str = sys.executable,
) -> list[str]:
    """Return the argument list of `deepspeed` for a job that starts all hosts from here.

    Args:
        launcher: one of ``BACKENDS``.
        launcher_args: more arguments for it, in one word.
    Raises:
        ConfigError: for an argument that would be read by a shell on the way and cannot be quoted.
    """
    include = _include(hosts)
    if include and launcher != "pdsh":
        raise ConfigError(
            f"--launcher {launcher} starts processes by their number and cannot choose slots. "
            "Choose whole hosts by --include or --exclude, or use --launcher pdsh."
        )
    # A single host is remote, too: without --force_multi DeepSpeed would start it here.
    command = [*_on_hosts(python, hosts), *include, "--force_multi", "--launcher", launcher]
    if launcher_args:
        command.append(f"--launcher_args={launcher_args}")
    if ssh_port is not None:
        command += ["--ssh_port", str(ssh_port)]
    if launcher != "pdsh":  # these start a program, without a shell
        return [*command, _agent(), *worker_arguments]
    for what, path in (
        ("The interpreter", python),
        ("The project's folder", _agent()),
    ):
        if not PLAIN.fullmatch(path):
            raise ConfigError(
                f"{what} is {path!r}, which DeepSpeed's launcher hands unquoted to a shell on the "
                "hosts. Use a path of letters, digits and any of _@+=:,./-"
            )
    return [*command, _agent(), *map(pdsh_word, worker_arguments)]


def pdsh_word(word: str) -> str:
    """Quote a word of the worker's command line so that it comes out of pdsh unchanged.

    DeepSpeed puts a word that holds a space between double quotes (and escapes only those) and
    leaves others as they are; a shell on the host reads them. On the way pdsh puts hosts' names,
    numbers and users in place of %h, %n and %u, and % in place of %%.

    Raises:
        ConfigError: for a word that would be changed.
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


def _on_hosts(python: str, hosts: Hosts) -> list[str]:
    command = [*_runner(python), "--hostfile", hosts.hostfile]
    return [*command, "--master_addr", hosts.master_addr, "--master_port", str(hosts.master_port)]


def _include(hosts: Hosts) -> list[str]:
    """Name the slots, where some host does not give its first ones."""
    if all(list(ids) == list(range(len(ids))) for ids in hosts.slots.values()):
        return []
    named = (f"{host}:{','.join(map(str, ids))}" for host, ids in hosts.slots.items())
    return ["--include", "@".join(named)]


def _agent() -> str:
    return str(WORKERS / "jobs" / "agent.py")


def visible_gpus(environment: Mapping[str, str], num_gpus: int | None) -> str | None:
    """Return CUDA_VISIBLE_DEVICES of a job: the first ``num_gpus`` of those visible now.

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
    """Return a job's environment: ninja is found, and on the CPU the ranks share the cores.

    Args:
        num_cores: of this host, where the job runs on it alone; with None every rank chooses its
            number of threads by the cores of its own host.
    """
    result = dict(environment)
    # Some generated data depends on it, and all ranks must see the same rows.
    result.setdefault("PYTHONHASHSEED", "0")
    # ninja is installed beside the interpreter, whose environment need not be active.
    bin_dir = str(Path(sys.executable).parent)
    result["PATH"] = os.pathsep.join([bin_dir, *filter(None, [result.get("PATH")])])
    if num_procs is not None:
        result["DS_ACCELERATOR"] = "cpu"
        if num_cores is not None:
            result.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_procs)))
        return result
    if num_gpus is not None:
        result[GPUS_ASKED_FOR] = str(num_gpus)
    if num_cores is not None and (visible := visible_gpus(environment, num_gpus)) is not None:
        # DeepSpeed's launcher knows numbers only, and numbers the GPUs from 0 where it is given a
        # count. The workers then take the names of `nvidia-smi -L`, such as GPU-… and MIG-….
        is_numbered = all(gpu.strip().isdecimal() for gpu in visible.split(","))
        del result["CUDA_VISIBLE_DEVICES"]
        result["CUDA_VISIBLE_DEVICES" if is_numbered else GPU_NAMES] = visible
    return result
