"""`lorasb doctor`: checks of the hosts, as a table of green and red, or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from launcher.hosts.checks import Check, report
from launcher.hosts.environment import deepspeed_env
from launcher.hosts.preflight import Findings
from launcher.jobs.launch_options import LaunchOptions
from launcher.jobs.make_job import make_job
from launcher.jobs.ssh_job import SshJob
from lorasb_ds.errors import ConfigError


def doctor(launch: LaunchOptions, given: dict[str, object], timeout: float, as_json: bool) -> int:
    """Check this host, or every host of the hostfile; return 1 if anything is red.

    Raises:
        ConfigError: if the job itself is not possible.
    """
    run_json = given.pop("run_json")
    job = make_job(launch, [], run_json if isinstance(run_json, str) else None, given)
    findings = job.examine(job.question(timeout=timeout, thorough=True))
    if isinstance(job, SshJob):
        findings.checks.append(_check_variables(job))
    if as_json:
        click.echo(json.dumps(_as_json(findings), indent=2))
    else:
        click.echo(report(findings.checks, color=sys.stdout.isatty()))
        red = len(findings.problems)
        click.echo(f"\n{len(findings.checks)} checks, {red} red")
    return 1 if findings.problems else 0


def _check_variables(job: SshJob) -> Check:
    """Check that DeepSpeed will read the variables that the hosts get."""
    try:
        variables = job.exported_variables(job.environment())
        deepspeed_env(variables, job.launch.launcher)
    except ConfigError as error:
        return Check("here", ".deepspeed_env", False, error.problems[0], "Fix it, or use --env.")
    return Check("here", ".deepspeed_env", True, f"{len(variables)} variables")


def _as_json(findings: Findings) -> dict[str, object]:
    return {
        "ok": not findings.problems,
        "master_addr": findings.master_addr,
        "checks": [asdict(check) for check in findings.checks],
    }
