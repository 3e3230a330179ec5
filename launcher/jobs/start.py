"""Start a job, on this host or on several, and start it again where that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from launcher.hosts.checks import report
from launcher.hosts.preflight import Findings
from launcher.jobs import channel, session
from launcher.jobs.inputs import describe_inputs
from launcher.jobs.job import Job
from launcher.jobs.launch_options import LaunchOptions
from launcher.jobs.local_job import LocalJob
from launcher.jobs.make_job import make_job
from launcher.jobs.ranks import EVAL, free_port, remove_shared_memory
from launcher.jobs.supervisor import Supervisor
from launcher.jobs.verdict import EXIT_REFUSED
from lorasb_ds.config.run_layout import LAUNCH, LAUNCHER_LOCK, LOGS, RUN_JSON, SESSION
from lorasb_ds.errors import ConfigError, printable
from lorasb_ds.system.folder_lock import lock_folder
from lorasb_ds.system.signals import EXIT_INTERRUPTED, EXIT_STOPPED

NOT_RESTARTED = (0, EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED)


def start(
    launch: LaunchOptions,
    worker_flags: Sequence[str],
    run_json: str | None,
    given: Mapping[str, Any],
) -> int:
    """Check what can be checked without torch, and run the worker on every rank.

    Returns:
        The status for the shell.
    Raises:
        ConfigError: with what cannot be done.
    """
    job = make_job(launch, worker_flags, run_json, given)
    if launch.dry_run:
        if EVAL not in worker_flags:  # whose rows have other forms
            for line in describe_inputs(job.config, on_this_host=isinstance(job, LocalJob)):
                _say(printable(line))
        click.echo(job.dry_run())
        return 0
    stop_signals: list[int] = []
    found = _version(job.folder / RUN_JSON)
    for attempt in range(launch.max_restarts + 1):
        if attempt:
            click.echo(f"lorasb: restart {attempt} of {launch.max_restarts}", err=True)
            try:
                # Replaced by ranks that have overwritten the folder, or gone back in it.
                job = job.restarted(has_begun=_version(job.folder / RUN_JSON) != found)
            except ConfigError as error:
                click.echo(f"lorasb: error: {error}", err=True)
                break
        status = run_once(job, stop_signals, is_first=attempt == 0)
        if status in NOT_RESTARTED or stop_signals:
            break
    return status


def _version(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced; None if there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def run_once(job: Job, stop_signals: list[int], is_first: bool = True) -> int:
    """Make one attempt, from the preflight to the end of all ranks.

    Args:
        stop_signals: is extended by the signals that ask the job to end.
        is_first: not a restart, which keeps the logs of the attempts before it.
    Returns:
        The status for the shell.
    """
    launch, environment = job.launch, job.environment()
    port = launch.master_port or free_port()
    findings = Findings()
    if job.preflight_at_start and not launch.skip_preflight:
        findings = job.examine(job.question(port))
    if findings.problems:
        click.echo(report(findings.problems), err=True)
        click.echo("lorasb: error: this job cannot start (--skip-preflight tries)", err=True)
        return EXIT_REFUSED
    with _folder(job, is_first):
        return _supervised(job, environment, port, findings.master_addr, stop_signals)


@contextmanager
def _folder(job: Job, is_first: bool) -> Iterator[None]:
    """Make the launcher's folder, and keep other launchers from it: each removes earlier logs.

    The ranks lock the run's folder itself, some seconds later. With ``--no-ssh`` the first host's
    launcher does it for all.
    """
    lock = None
    try:
        (job.folder / LAUNCH).mkdir(parents=True, exist_ok=True)
        if not job.launch.node_rank:
            lock = lock_folder(job.folder / LAUNCHER_LOCK, job.config.resume is not None, _say)
        if is_first:
            job.remove_earlier_logs()
    except OSError as error:
        raise ConfigError(f"--output-dir {job.folder} cannot be written: {error}.") from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _say(text: str) -> None:
    click.echo(f"lorasb: {text}", err=True)


def _supervised(
    job: Job,
    environment: dict[str, str],
    port: int,
    master_addr: str | None,
    stop_signals: list[int],
) -> int:
    """Start the ranks, and watch them to their end; return the status for the shell."""
    launch, environment = job.launch, environment | _agent_variables(job)
    word = environment.pop(session.WORD, "")
    if job.started_by_hand and word:
        environment[session.WORD] = word
    elif not launch.node_rank:  # else the first host's launcher does it
        word = session.new_word(Path(environment[session.FILE]))
    call = job.prepare(environment, port, master_addr)
    supervisor = Supervisor(
        listener=call.listener,
        session=word,
        options=call.environment.get(channel.OPTIONS),
        failure_timeout=launch.failure_timeout,
        start_timeout=launch.start_timeout,
        launcher_log=job.launcher_log,
        hosts=job.rank_hosts,
        by_hand=job.started_by_hand,
        stop_signals=stop_signals,
    )
    try:
        return supervisor.run(call.command, call.environment)
    finally:
        if call.listener is not None:
            call.listener.close()
        remove_shared_memory(port)


def _agent_variables(job: Job) -> dict[str, str]:
    """Return what every agent is told through its environment."""
    launch = job.launch
    variables = {
        session.FILE: str((job.folder / LAUNCH / SESSION).absolute()),
        channel.FAILURE_TIMEOUT: str(launch.failure_timeout),
        channel.START_TIMEOUT: str(launch.start_timeout),
        channel.LOGS: str((job.folder / LOGS).absolute()),
        channel.WORKING_DIRECTORY: channel.as_plain_word(str(Path.cwd())),
    }
    if launch.network_interface is not None:
        variables |= dict.fromkeys(channel.INTERFACE_VARIABLES, launch.network_interface)
    return variables
