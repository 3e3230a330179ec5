"""A script for sbatch. Pure, torch-free."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from launcher.hosts.job_script import SECONDS_TO_SAVE, inner_command, variable_problems
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.signals import EXIT_STOPPED

_DIRECTIVE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,+-]*")
_TIME = re.compile(r"[0-9]+(-[0-9]+)?(:[0-9]+){0,2}")


def slurm_script(
    worker_arguments: Sequence[str],
    *,
    verb: str,
    nodes: int,
    gpus_per_node: int,
    job_name: str,
    output_dir: str,
    time_limit: str | None,
    partition: str | None,
    account: str | None,
    python: str,
    cwd: str,
    master_port: int | None,
    environment: Mapping[str, str],
) -> str:
    """Return a script for sbatch: one task per node, and a job that requeues itself in time.

    Args:
        master_port: None derives it from the job's number.
    Raises:
        ConfigError: if Slurm does not take a name, or ``environment`` holds a secret.
    """
    named = {"--job-name": job_name, "--partition": partition, "--account": account}
    problems = [
        f"{option} {value!r} is not letters, digits and . _ - , + only. Fix it: it becomes a line "
        "of the script."
        for option, value in named.items()
        if value is not None and not _DIRECTIVE.fullmatch(value)
    ]
    if time_limit is not None and not _TIME.fullmatch(time_limit):
        problems.append(
            f"--time-limit {time_limit!r} is not a time as Slurm writes it. Give minutes, "
            "HH:MM:SS or DAYS-HH:MM:SS."
        )
    problems += variable_problems(environment, "export it in the shell that calls sbatch")
    if problems:
        raise ConfigError(*problems)
    directives = [
        f"--job-name={job_name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={gpus_per_node}",
        *([f"--time={time_limit}"] if time_limit is not None else []),
        *([f"--partition={partition}"] if partition is not None else []),
        *([f"--account={account}"] if account is not None else []),
        f"--signal=B:USR1@{SECONDS_TO_SAVE}",
        "--requeue",
        "--open-mode=append",
        "--output=slurm-%j.out",
    ]
    command = inner_command(
        worker_arguments,
        verb=verb,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        output_dir=output_dir,
        master_port='"$MASTER_PORT"',
        python=python,
    )
    return _SLURM.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        exports="".join(f"export {k}={shlex.quote(v)}\n" for k, v in environment.items()),
        cwd=shlex.quote(cwd),
        command=" ".join(command),
        # Jobs that share a node must not meet; each takes two ports.
        master_port=master_port or "$((20000 + SLURM_JOB_ID % 5000 * 2))",
        seconds=SECONDS_TO_SAVE,
        stopped=EXIT_STOPPED,
    )


_SLURM = """\
#!/bin/bash
# Submit by `sbatch FILE`; its output goes to slurm-JOBID.out where sbatch was called (a folder that
# the run makes itself would not be there yet). {seconds} s before the time limit the run saves a
# checkpoint, and the job queues itself again and goes on from there. `scancel JOBID` ends it.
# Where the partition gives a GPU no CPUs, add --cpus-per-task=N here and to srun below.
{directives}

set -euo pipefail
cd -- {cwd}
{exports}
# The first host is the master.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{hosts%%$'\\n'*}}
export MASTER_PORT={master_port}

run_node() {{  # on every node: only there is SLURM_NODEID known
  exec {command}
}}

# `--signal=B:` tells this shell only, and srun hands on to the tasks what it gets.
signalled=0
trap 'signalled=1; kill -USR1 $(jobs -p) 2>/dev/null || true' USR1

# A node that has ended must not end the others while they save. When one fails, the launcher on
# the first node ends them all.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \\
  bash -c "$(declare -f run_node); run_node" &
step=$!
while true; do
  signalled=0
  status=0
  wait "$step" || status=$?
  # A signal ends `wait`, not the step.
  ((signalled)) || break
done

if ((status == {stopped})); then  # asked to end, and can go on
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
