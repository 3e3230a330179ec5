"""A manifest for Kubernetes. Pure, torch-free."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from launcher.hosts.job_script import SECONDS_TO_SAVE, inner_command, variable_problems
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.signals import EXIT_STOPPED

_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


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
    """Return a headless Service and an Indexed Job: a pod per node, and pod 0 is the master.

    Args:
        image: has the package installed for its `python`.
        claim: a PersistentVolumeClaim that all pods can mount (ReadWriteMany for several nodes).
        mount: where the pods see it; ``output_dir`` is below it.
    Raises:
        ConfigError: if Kubernetes does not take a name, ``output_dir`` would be lost with the
            pod, or ``environment`` holds a secret.
    """
    longest = 63 - len(f"-{nodes - 1}")  # the pods' host names are labels too
    problems = variable_problems(environment, "put it into a Secret, as the manifest's head shows")
    if not _DNS_LABEL.fullmatch(job_name) or len(job_name) > longest:
        problems.append(
            f"--job-name {job_name!r} is not a DNS label: a-z, 0-9 and '-' only, a letter first "
            f"and no '-' last, {longest} characters at most. Choose another."
        )
    if not _DNS_NAME.fullmatch(claim):
        problems.append(
            f"--claim {claim!r} is not a name of a PersistentVolumeClaim: a-z, 0-9, '-' and '.' "
            "only. `kubectl get pvc` lists them."
        )
    root = posixpath.normpath(mount)
    if not mount.startswith("/") or ":" in mount or root in ("/", "//"):
        problems.append(
            f"--mount {mount!r} is not the absolute path of a folder. Give one, as /data."
        )
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
        "workingDir": mount,  # relative paths of the run are below it
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
# The image of lorasb-ds's own Dockerfile runs as user 10001. Where that user may not write to the
# claim, put this into the pod's `spec`, beside `containers`: securityContext: {{fsGroup: 10001}}
"""


def _on_exit(action: str, status: int) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"operator": "In", "values": [status]}}


def _literal(text: str) -> str:
    """Escape a text for Kubernetes, which expands $(NAME) in arguments and values."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Quotes what some reader of YAML takes for a number: 1e-4 is one to Go's, not to PyYAML."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True  # the labels in full, each time


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]{2,}", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
