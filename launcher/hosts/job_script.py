"""What a job file for Slurm and one for Kubernetes have in common. Pure, torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

from launcher.hosts.environment import VARIABLE, is_secret

SECONDS_TO_SAVE = 120  # between the signal that asks a run to end and its end


def inner_command(
    worker_arguments: Sequence[str],
    *,
    verb: str,
    nodes: int,
    gpus_per_node: int,
    output_dir: str,
    master_port: int | str,
    python: str = "python",
    node_rank: str = '"$SLURM_NODEID"',
    master_addr: str = '"$MASTER_ADDR"',
    quote: Callable[[str], str] = shlex.quote,
) -> list[str]:
    """Return what runs once on every node, as words of a shell; joined by spaces, its line.

    It goes on from the newest checkpoint of ``output_dir``, so that a job can be queued again,
    unless ``worker_arguments`` say what to resume.

    Args:
        node_rank: written as it is, as are ``master_addr`` and ``master_port``; the other words go
            through ``quote``. The defaults are expanded on the node.
        quote: writes a word for its reader; ``str`` gives an argument list.
    """
    given = {word.partition("=")[0].replace("_", "-") for word in worker_arguments}
    # Nothing in the working directory is imported (from Python 3.11 on).
    words = ["env", "PYTHONSAFEPATH=1", python, "-m", "launcher.cli", verb, "--no-ssh"]
    words += ["--num-nodes", str(nodes), "--num-gpus", str(gpus_per_node)]
    rest: list[str] = []
    if "--resume" not in given:
        rest += ["--resume", "auto"]
    if "--output-dir" not in given:
        rest += ["--output-dir", output_dir]
    return [
        *map(quote, words),
        *("--node-rank", node_rank, "--master-addr", master_addr),
        *("--master-port", str(master_port)),
        *map(quote, [*rest, *worker_arguments]),
    ]


def variable_problems(environment: Mapping[str, str], remedy: str) -> list[str]:
    """Return a sentence for each variable that must not be written into a job file.

    Args:
        remedy: what to do with a secret instead.
    """
    problems = [
        f"{name!r} is not a name of an environment variable. Use letters, digits and _."
        for name in environment
        if not VARIABLE.fullmatch(name)
    ]
    return problems + [
        f"{name} looks like a secret, and would stand in the file for all to read. Leave it out, "
        f"and {remedy}."
        for name in environment
        if is_secret(name)
    ]
