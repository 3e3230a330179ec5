"""Scripts for schedulers: run by bash with stand-ins for Slurm's commands, read as YAML."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.hosts.job_script import inner_command
from launcher.hosts.k8s_manifest import _literal, k8s_manifest
from launcher.hosts.slurm_script import slurm_script
from lorasb_ds.errors import ConfigError

HOSTILE = ["--model", "a b", "--data", 'it\'s $HOME `x` "q" \\', "--eval-data", "*\n$(touch no)\n"]
JOB: dict[str, Any] = {
    "verb": "train",
    "nodes": 2,
    "gpus_per_node": 8,
    "output_dir": "/data/runs/a b",
    "master_port": 29500,
}
SLURM = JOB | {
    "job_name": "lorasb",
    "time_limit": "1-00:00:00",
    "partition": "gpu,long",
    "account": "me",
    "cwd": "/",
    "environment": {},
}
K8S = JOB | {
    "job_name": "my-run",
    "image": "registry.example/lorasb:1.0",
    "claim": "runs",
    "mount": "/data",
    "environment": {"NCCL_DEBUG": "1", "A": "$(B) $$ $"},
}
FAKE_PYTHON = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
seen = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "variable": os.environ.get("VARIABLE")}}
(here / "seen.part").write_text(json.dumps(seen))
(here / "seen.part").rename(here / "seen.json")
while len(asked) < int(os.environ.get("SIGNALS", "0")):
    time.sleep(0.01)
    (here / f"asked-{{len(asked)}}").touch()
time.sleep(0.3 if asked else 0)  # it saves a checkpoint
sys.exit(int(os.environ.get("STATUS", "0")))
"""
STAND_INS = {
    "srun": """#!/bin/bash
    here=$(dirname "$0"); printf '%s\\n' "$@" > "$here/srun.txt"
    while [[ $1 == --* ]]; do shift; done
    SLURM_NODEID=1 exec "$@"
    """,
    "scontrol": """#!/bin/bash
    echo "$*" >> "$(dirname "$0")/scontrol.txt"
    if [[ "$*" == "show hostnames gpu[1-2]" ]]; then echo gpu1; echo gpu2; fi
    """,
    "fake python": FAKE_PYTHON,
}


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


SAFE = ("env", "PYTHONSAFEPATH=1")  # nothing in the working directory is imported


def expected(node_rank: str, master_addr: str, *more: str) -> list[str]:
    words = f"-m launcher.cli train --no-ssh --num-nodes 2 --num-gpus 8 --node-rank {node_rank}"
    words += f" --master-addr {master_addr} --master-port 29500"
    return [*words.split(), *more]


def test_inner_command_in_a_shell(bin_dir: Path) -> None:
    line = " ".join(inner_command(HOSTILE, python=str(bin_dir / "fake python"), **JOB))
    environment = {"SLURM_NODEID": "1", "MASTER_ADDR": "gpu1", "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-c", line], env=environment, cwd=bin_dir, check=True, timeout=60)
    more = ("--resume", "auto", "--output-dir", "/data/runs/a b", *HOSTILE)
    assert json.loads((bin_dir / "seen.json").read_text())["argv"] == expected("1", "gpu1", *more)
    assert not (bin_dir / "no").exists()


def test_inner_command_of_given_values() -> None:
    words = inner_command(HOSTILE, node_rank="0", master_addr="h", quote=str, python="py", **JOB)
    more = ("--resume", "auto", "--output-dir", "/data/runs/a b", *HOSTILE)
    assert words == [*SAFE, "py", *expected("0", "h", *more)]


@pytest.mark.parametrize(
    "own",
    [
        ["--resume", "x", "--output-dir", "y"],
        ["--resume=x", "--output-dir=y"],
        ["--r", "8", "--output_dir=y", "--resume", "x"],
    ],
)
def test_what_the_arguments_say_is_not_said_again(own: list[str]) -> None:
    words = inner_command(own, node_rank="0", master_addr="h", quote=str, python="py", **JOB)
    assert words == [*SAFE, "py", *expected("0", "h", *own)]


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
def test_a_shell_reads_what_was_quoted(arguments: list[str]) -> None:
    line = " ".join(inner_command(arguments, python="printf", **JOB)[-len(arguments) :])
    if arguments:
        done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], stdout=-1, check=True)
        assert done.stdout.decode().split("\0")[:-1] == arguments


def start(bin_dir: Path, script: str, **environment: str) -> subprocess.Popen[bytes]:
    (bin_dir / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", "job.sh"], cwd=bin_dir, check=True)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    path = f"{bin_dir}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "job.sh"], cwd=bin_dir, env={"PATH": path, **job, **environment}
    )


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, f"{file} did not come"
        time.sleep(0.01)


def script_of(bin_dir: Path, arguments: list[str], **given: Any) -> str:
    return slurm_script(arguments, **{**SLURM, "python": str(bin_dir / "fake python"), **given})


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137])
def test_slurm_job_ends_with_the_steps_status(bin_dir: Path, status: int) -> None:
    cwd = bin_dir / "it's here"
    cwd.mkdir()
    environment = {"VARIABLE": "a'b $c\n{x}"}
    script = script_of(bin_dir, HOSTILE, cwd=str(cwd), environment=environment)
    assert start(bin_dir, script, STATUS=str(status)).wait(timeout=60) == status
    more = ("--resume", "auto", "--output-dir", "/data/runs/a b", *HOSTILE)
    assert json.loads((bin_dir / "seen.json").read_text()) == {
        "argv": expected("1", "gpu1", *more),
        "cwd": str(cwd),
        "variable": environment["VARIABLE"],
    }
    calls = (bin_dir / "scontrol.txt").read_text().splitlines()
    assert calls == ["show hostnames gpu[1-2]"] + ["requeue 7"] * (status == 75)
    options = (bin_dir / "srun.txt").read_text().splitlines()
    assert options[:3] == ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"]


@pytest.mark.parametrize(("signals", "status"), [(1, 75), (2, 75), (1, 0), (1, 3)])
def test_slurm_job_passes_the_signal_on_and_waits(bin_dir: Path, signals: int, status: int) -> None:
    script = script_of(bin_dir, [], cwd=str(bin_dir))
    job = start(bin_dir, script, STATUS=str(status), SIGNALS=str(signals))
    for count in range(signals):
        wait_for(bin_dir / f"asked-{count}")
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == status
    requeued = "requeue 7" in (bin_dir / "scontrol.txt").read_text().splitlines()
    assert requeued == (status == 75)


def test_slurm_job_without_hosts_does_not_start(bin_dir: Path) -> None:
    (bin_dir / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    assert start(bin_dir, script_of(bin_dir, [])).wait(timeout=60) == 1
    assert not (bin_dir / "seen.json").exists()


def test_slurm_directives(bin_dir: Path) -> None:
    script = script_of(bin_dir, [])
    assert script.startswith("#!/bin/bash\n# ")
    expected_directives = [
        "--job-name=lorasb",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--time=1-00:00:00",
        "--partition=gpu,long",
        "--account=me",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
        "--output=slurm-%j.out",
    ]
    assert re.findall(r"^#SBATCH (.*)", script, re.MULTILINE) == expected_directives
    assert script.index("#SBATCH --output") < script.index("\nset -euo pipefail\n")
    few = script_of(bin_dir, [], time_limit=None, partition=None, account=None)
    assert not re.search("#SBATCH --(time|partition|account)", few)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"job_name": "a\n#SBATCH --uid=0"}, "--job-name"),
        ({"job_name": "a b"}, "--job-name 'a b' is not letters"),
        ({"partition": "-x"}, "--partition '-x' is not letters"),
        ({"account": ""}, "--account '' is not letters"),
        ({"time_limit": "2h"}, "--time-limit '2h' is not a time as Slurm writes it. Give minutes"),
        ({"environment": {"A B": ""}}, "'A B' is not a name of an environment variable"),
        ({"environment": {"HF_TOKEN": "hf_x"}}, "HF_TOKEN looks like a secret"),
    ],
)
def test_slurm_refuses(bin_dir: Path, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        script_of(bin_dir, [], **given)
    assert "hf_x" not in str(caught.value)


def manifest(arguments: list[str], **given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all(k8s_manifest(arguments, **{**K8S, **given}))
    return service, job


def test_k8s_service() -> None:
    service, job = manifest([])
    labels = {"app": "my-run"}
    assert service == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "my-run", "labels": labels},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [
                {"name": "master", "port": 29500},
                {"name": "supervisor", "port": 29501},
            ],
        },
    }
    assert job["spec"]["template"]["metadata"]["labels"] == labels, "the pods that it selects"


def test_k8s_job() -> None:
    _, job = manifest([])
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["metadata"] == {"name": "my-run", "labels": {"app": "my-run"}}
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"]) == (2, 2)
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 6)
    rules = spec["podFailurePolicy"]["rules"]
    assert [(r["action"], r["onExitCodes"]["values"]) for r in rules] == [
        ("Ignore", [75]),
        ("FailJob", [2]),
    ]
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == "my-run", "with it pod 0 is my-run-0.my-run"
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 120)
    assert pod["volumes"] == [
        {"name": "data", "persistentVolumeClaim": {"claimName": "runs"}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    (container,) = pod["containers"]
    assert container["image"] == "registry.example/lorasb:1.0"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["volumeMounts"] == [
        {"name": "data", "mountPath": "/data"},
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]


def expand(text: str, environment: dict[str, str]) -> str:
    """As kubelet does: $$ is $, $(NAME) is its value where there is one."""

    def replaced(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)


def test_k8s_arguments_and_environment_as_kubelet_expands_them() -> None:
    hostile = [*HOSTILE, "--lr", "1e-4", "--x", "$(JOB_COMPLETION_INDEX) $$(A) $", "y", "on", "0x1"]
    _, job = manifest(hostile)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    index = {"JOB_COMPLETION_INDEX": "1"}
    words = [expand(word, index) for word in container["command"] + container["args"]]
    more = ("--resume", "auto", "--output-dir", "/data/runs/a b", *hostile)
    assert words == [*SAFE, "python", *expected("1", "my-run-0.my-run", *more)]
    environment = {one["name"]: expand(one["value"], index) for one in container["env"]}
    assert environment == K8S["environment"]


@given(st.text(), st.text("$()A", max_size=8))
def test_literal_text(text: str, dollars: str) -> None:
    for one in (text, dollars):
        assert expand(_literal(one), {"A": "expanded"}) == one


@pytest.mark.parametrize(
    "word", ["1e-4", "1_0", "y", "0o7", "on", "null", "~", "2001-01-01", "1:30"]
)
def test_k8s_quotes_what_go_takes_for_no_text(word: str) -> None:
    text = k8s_manifest(["--x", word], **K8S)
    assert f'"{word}"' in text or f"'{word}'" in text


def test_k8s_holds_no_secret() -> None:
    text = k8s_manifest([], **K8S)
    assert re.search(
        r"^#   - name: HF_TOKEN\n#     valueFrom:\n#       secretKeyRef: \{", text, re.M
    )
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"):
        with pytest.raises(ConfigError, match=f"{name} looks like a secret.*Secret") as caught:
            manifest([], environment={name: "hf_x"})
        assert "hf_x" not in str(caught.value)
    assert manifest([], environment={"TOKENIZERS_PARALLELISM": "false", "MONKEY": "1"})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        *(
            ({"job_name": name}, f"--job-name {name!r} is not a DNS label: a-z, 0-9 and '-' only")
            for name in ("", "A", "a_b", "a.b", "-a", "a-", "1a", "a\n", "ä", "a" * 62)
        ),
        ({"job_name": "a" * 61, "nodes": 11}, "60 characters at most. Choose another."),
        ({"claim": "My_Claim"}, "--claim 'My_Claim' is not a name"),
        ({"mount": "data"}, "--mount 'data' is not the absolute path of a folder"),
        ({"mount": "/"}, "--mount '/' is not the absolute path of a folder"),
        ({"output_dir": "runs/x"}, "--output-dir runs/x is not below --mount /data"),
        ({"output_dir": "/database/x"}, "Put it there, as /data/my-run."),
        ({"output_dir": "/data/../x"}, "is not below --mount /data"),
        ({"environment": {"1": ""}}, "'1' is not a name of an environment variable"),
    ],
)
def test_k8s_refuses(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        manifest([], **given)


def test_k8s_longest_names() -> None:
    service, _ = manifest([], job_name="a" * 61, output_dir="/data", mount="/data/")
    assert service["metadata"]["name"] == "a" * 61


def test_slurm_jobs_that_share_a_node_do_not_meet() -> None:
    text = slurm_script([], **{**SLURM, "python": "python", "master_port": None})
    (line,) = [line for line in text.splitlines() if line.startswith("export MASTER_PORT=")]
    ports = []
    for job in (4999, 5000, 1234567, 1234568):
        script = f"SLURM_JOB_ID={job}; {line}; echo $MASTER_PORT"
        ports.append(int(subprocess.run(["bash", "-c", script], capture_output=True).stdout))
    assert ports == [29998, 20000, 29134, 29136]
