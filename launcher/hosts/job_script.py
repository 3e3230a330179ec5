"""Text for a cluster's scheduler: an sbatch script, a Kubernetes manifest. Pure, torch-free."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from launcher.hosts.environment import VARIABLE, is_secret
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.signals import EXIT_STOPPED

SECONDS_TO_SAVE = 120  # between the signal that asks a run to end and its end

_DIRECTIVE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,+-]*")
_TIME = re.compile(r"[0-9]+(-[0-9]+)?(:[0-9]+){0,2}")
_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


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
    """What runs once on every node, as words of a shell: joined by spaces, they are its line.

    It goes on from the newest checkpoint of ``output_dir``, so that a job can be queued again,
    unless ``worker_arguments`` say what to resume.

    Args:
        node_rank: a word as it is to stand there, as are ``master_addr`` and ``master_port``; for
            the other words see ``quote``. The defaults are expanded on the node.
        quote: how to write a word for who reads it; ``str`` gives an argument list.
    """
    given = {word.partition("=")[0].replace("_", "-") for word in worker_arguments}
    words = [python, "-m", "launcher.cli", verb, "--no-ssh"]
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
    """A script for sbatch: one task per node, and a job that ends and queues itself in time.

    Args:
        master_port: None: by the job's number.
    Raises:
        ConfigError: if a name is none that Slurm takes, or ``environment`` holds a secret.
    """
    named = {"--job-name": job_name, "--partition": partition, "--account": account}
    problems = [
        f"{option} {value!r} is not letters, digits and . _ - , + only. Mend it: it becomes a line "
        "of the script."
        for option, value in named.items()
        if value is not None and not _DIRECTIVE.fullmatch(value)
    ]
    if time_limit is not None and not _TIME.fullmatch(time_limit):
        problems.append(
            f"--time-limit {time_limit!r} is no time of Slurm's. Write minutes, HH:MM:SS or "
            "DAYS-HH:MM:SS."
        )
    problems += _bad_variables(environment, "export it in the shell that calls sbatch")
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


def k8s_manifest(
    worker_arguments: Sequence[str],
    *,
    verb: str,
    nodes: int,
    gpus_per_node: int,
    job_name: str,
    image: str,
    output_dir: str,
    claim: str,
    mount: str,
    master_port: int,
    environment: Mapping[str, str],
) -> str:
    """A headless Service and an Indexed Job: a pod per node, and pod 0 is the master.

    Args:
        image: has the package installed for its `python`.
        claim: a PersistentVolumeClaim that all pods can mount (ReadWriteMany for several nodes).
        mount: where the pods see it; ``output_dir`` lies there.
    Raises:
        ConfigError: if a name is none that Kubernetes takes, ``output_dir`` would be lost with the
            pod, or ``environment`` holds a secret.
    """
    longest = 63 - len(f"-{nodes - 1}")  # the pods' host names are labels too
    problems = _bad_variables(environment, "put it into a Secret, as the manifest's head shows")
    if not _DNS_LABEL.fullmatch(job_name) or len(job_name) > longest:
        problems.append(
            f"--job-name {job_name!r} is no DNS label: a-z, 0-9 and '-' only, a letter first and "
            f"no '-' last, {longest} characters at most. Choose another."
        )
    if not _DNS_NAME.fullmatch(claim):
        problems.append(
            f"--claim {claim!r} is no name of a PersistentVolumeClaim: a-z, 0-9, '-' and '.' only. "
            "`kubectl get pvc` lists them."
        )
    root = posixpath.normpath(mount)
    if not mount.startswith("/") or ":" in mount or root in ("/", "//"):
        problems.append(f"--mount {mount!r} is no folder's absolute path. Give one, as /data.")
    elif not f"{posixpath.normpath(output_dir)}/".startswith(f"{root}/"):
        problems.append(
            f"--output-dir {output_dir} is not below --mount {mount}, and would be lost with the "
            f"pod. Put it there, as {root}/{job_name}."
        )
    if problems:
        raise ConfigError(*problems)
    command = inner_command(
        worker_arguments,
        verb=verb,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        output_dir=output_dir,
        master_port=master_port,
        node_rank="$(JOB_COMPLETION_INDEX)",
        master_addr=f"{job_name}-0.{job_name}",
        quote=_literal,
    )
    labels = {"app": job_name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job_name, "labels": labels},
        "spec": {
            "clusterIP": "None",
            # The nodes look for the master before it is ready.
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [
                {"name": "master", "port": master_port},
                {"name": "supervisor", "port": master_port + 1},
            ],
        },
    }
    variables = [{"name": k, "value": _literal(v)} for k, v in environment.items()]
    container = {
        "name": "lorasb",
        "image": image,
        "command": command[:3],
        "args": command[3:],
        "workingDir": mount,  # relative paths of the run lie there
        **({"env": variables} if variables else {}),
        "resources": {"limits": {"nvidia.com/gpu": gpus_per_node}},
        "volumeMounts": [
            {"name": "data", "mountPath": mount},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108, NCCL's: 64 MiB otherwise
        ],
    }
    pod = {
        "subdomain": job_name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "containers": [container],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name, "labels": labels},
        "spec": {
            "completions": nodes,
            "parallelism": nodes,
            "completionMode": "Indexed",
            "backoffLimit": 3 * nodes,  # when one pod fails, all do
            "podFailurePolicy": {
                "rules": [
                    _on_exit("Ignore", EXIT_STOPPED),  # asked to end: it goes on in a new pod
                    _on_exit("FailJob", 2),  # refused: it would be again
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    text: str = yaml.dump_all(
        [service, job], Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True
    )
    return _K8S_HEAD.format(name=job_name) + text


_K8S_HEAD = """\
# `kubectl apply -f FILE` starts the job; `kubectl logs -f job/{name}` shows one pod's output, and
# `kubectl delete -f FILE` ends it: the run saves a checkpoint first, and a new job goes on from it.
# A token does not belong into this file. Put it into a Secret (`kubectl create secret generic
# hugging-face --from-literal=token=...`), and this into `env` of the container:
#   - name: HF_TOKEN
#     valueFrom:
#       secretKeyRef: {{name: hugging-face, key: token}}
"""


def _on_exit(action: str, status: int) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"operator": "In", "values": [status]}}


def _literal(text: str) -> str:
    """As Kubernetes has to read it, which expands $(NAME) in arguments and values."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Quotes what some reader of YAML takes for no text: Go's has 1e-4 for a number, PyYAML not."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True  # the labels in full, each time


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]{2,}", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def _bad_variables(environment: Mapping[str, str], remedy: str) -> list[str]:
    problems = [
        f"{name!r} is no name of an environment variable. Use letters, digits and _."
        for name in environment
        if not VARIABLE.fullmatch(name)
    ]
    return problems + [
        f"{name} looks like a secret, and would stand in the file for all to read. Leave it out, "
        f"and {remedy}."
        for name in environment
        if is_secret(name)
    ]
