"""`lorasb doctor`: what was found on the hosts, as a table of green and red, or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from launcher.hosts.checks import Check, report
from launcher.hosts.environment import deepspeed_env
from launcher.hosts.preflight import Findings, examine
from launcher.jobs.job import Job, job_environment_of, make_job, question_of, variables_of_hosts
from launcher.jobs.launch_options import LaunchOptions
from lorasb_ds.errors import ConfigError


def doctor(launch: LaunchOptions, given: dict[str, object], timeout: float, as_json: bool) -> int:
    """Look at this host, or at every host of the hostfile; 1 if anything is red.

    Raises:
        ConfigError: if the job itself cannot be.
    """
    run_json = given.pop("run_json")
    job = make_job(launch, [], run_json if isinstance(run_json, str) else None, given)
    remote = job.slots is not None and not launch.no_ssh
    question = question_of(job, timeout=timeout, thorough=True)
    findings = examine(question, local=not remote)
    if remote:
        findings.checks.append(_check_variables(job))
    if as_json:
        click.echo(json.dumps(_as_json(findings), indent=2))
    else:
        click.echo(report(findings.checks, color=sys.stdout.isatty()))
        red = len(findings.problems)
        click.echo(f"\n{len(findings.checks)} checks, {red} red")
    return 1 if findings.problems else 0


def _check_variables(job: Job) -> Check:
    """Whether DeepSpeed will read what is handed on to the hosts."""
    try:
        variables = variables_of_hosts(job, job_environment_of(job))
        deepspeed_env(variables, job.launch.launcher)
    except ConfigError as error:
        return Check("here", ".deepspeed_env", False, error.problems[0], "Mend it, or use --env.")
    return Check("here", ".deepspeed_env", True, f"{len(variables)} variables")


def _as_json(findings: Findings) -> dict[str, object]:
    return {
        "ok": not findings.problems,
        "master_addr": findings.master_addr,
        "checks": [asdict(check) for check in findings.checks],
    }
