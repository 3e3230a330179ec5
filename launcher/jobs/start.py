"""Starts a job, on this host or on several, and starts it again where that was asked for."""

from __future__ import annotations

import hashlib
import secrets
import shlex
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from launcher.hosts.checks import report
from launcher.hosts.environment import deepspeed_env, hosts_environment
from launcher.hosts.host import resolve, route_from
from launcher.hosts.hostfile import write_hostfile
from launcher.hosts.preflight import Findings, examine
from launcher.jobs import channel
from launcher.jobs.command import Hosts, hosts_command, local_command
from launcher.jobs.job import (
    Job,
    job_environment_of,
    make_job,
    question_of,
    resolved_on,
    variables_of_hosts,
)
from launcher.jobs.launch_options import LaunchOptions
from launcher.jobs.ranks import free_port, remove_shared_memory
from launcher.jobs.supervisor import Supervisor, listen_for_agents
from launcher.jobs.verdict import EXIT_REFUSED
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_layout import DEEPSPEED_FILES, HOSTFILE, LAUNCH, LOGS, launcher_files
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.signals import EXIT_INTERRUPTED, EXIT_STOPPED


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
        ConfigError: what cannot be done.
    """
    job = make_job(launch, worker_flags, run_json, given)
    if launch.dry_run:
        click.echo(_dry_run(job))
        return 0
    asked: list[int] = []
    for attempt in range(launch.max_restarts + 1):
        if attempt:
            click.echo(f"lorasb: restart {attempt} of {launch.max_restarts}", err=True)
            try:
                job = again(job)
            except ConfigError as error:
                click.echo(f"lorasb: error: {error}", err=True)
                break
        status = _run_once(job, asked)
        over = status in (0, EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED)
        if over or asked:
            break
    return status


def again(job: Job) -> Job:
    """The same run, from its last checkpoint, on the hosts that are there.

    Raises:
        ConfigError: if a host does not answer that is needed.
    """
    given = {**job.given, "resume": "auto", "overwrite": None, "output_dir": str(job.folder)}
    slots = job.slots
    if slots is not None and job.launch.launcher == "pdsh":
        limit = min(20.0, job.launch.failure_timeout)
        findings = examine(question_of(job, timeout=limit))
        # Whatever else is red there: the next start says it.
        lost = {check.host: check for check in findings.problems if check.what == "ssh"}
        if lost and not job.launch.allow_fewer_hosts:
            raise ConfigError(
                f"No restart: {_told(lost.values())}. --allow-fewer-hosts goes on without."
            )
        slots = {host: ids for host, ids in slots.items() if host not in lost}
        if not slots:
            raise ConfigError(f"No restart: no host is left. {_told(lost.values())}.")
        if lost:
            click.echo(f"lorasb: goes on without {_told(lost.values())}", err=True)
            # The order of the rows goes by the global batch, which must stay.
            given |= {"train_batch_size": job.config.train_batch_size}
            given |= {"gradient_accumulation_steps": None}
    config = load_run_config(given, job.run_json)
    if slots is not None:
        config = resolved_on(config, slots)
    return replace(job, given=given, config=config, slots=slots)


def _told(checks: Any) -> str:
    return "; ".join(f"{check.host} ({check.what}: {check.found})" for check in checks)


def _dry_run(job: Job) -> str:
    """The command, and what is written for it."""
    port = job.launch.master_port or free_port()
    if job.slots is None:
        return shlex.join(_local(job, job_environment_of(job), port))
    hosts = _hosts(job, job.launch.master_addr or "MASTER_ADDR")
    lines = [shlex.join(hosts_command(job.arguments, hosts, master_port=port))]
    if hosts.node_rank is None:
        variables = variables_of_hosts(job, job_environment_of(job))
        deepspeed_env(variables, hosts.launcher)
        if job.launch.master_addr is None:
            lines.append("# MASTER_ADDR is found out at the start, unless --master-addr says it.")
        lines += [f"# {hosts.hostfile}:", *_commented(_hostfile(job))]
        lines += [f"# {job.folder / LAUNCH / 'deepspeed_env'}: {' '.join(sorted(variables))}"]
    return "\n".join(lines)


def _commented(text: str) -> list[str]:
    return [f"#   {line}" for line in text.splitlines()]


def _run_once(job: Job, asked: list[int]) -> int:
    """One attempt, from the look at the hosts to the end of all ranks."""
    launch, environment = job.launch, job_environment_of(job)
    port = launch.master_port or free_port()
    findings = Findings()
    if not launch.skip_preflight and not launch.no_ssh:
        findings = examine(question_of(job, port), local=job.slots is None)
        if findings.problems:
            click.echo(report(findings.problems), err=True)
            click.echo("lorasb: error: this job cannot start (--skip-preflight tries)", err=True)
            return EXIT_REFUSED
    launch_folder, logs = job.folder / LAUNCH, job.folder / LOGS
    try:
        if job.config.resume is None and not launch.no_ssh:  # other hosts' ranks may have begun
            for old in launcher_files(job.folder):
                old.unlink()
        launch_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-dir {job.folder} cannot be written: {error}.") from error
    environment |= {
        channel.SESSION: secrets.token_hex(16),
        channel.FAILURE_TIMEOUT: str(launch.failure_timeout),
        channel.START_TIMEOUT: str(launch.start_timeout),
        channel.LOGS: str(logs.absolute()),
    }
    if launch.network_interface is not None:
        environment |= dict.fromkeys(channel.INTERFACE_VARIABLES, launch.network_interface)
    if job.slots is None:
        listener: socket.socket | None
        listener, here = listen_for_agents("127.0.0.1")
        environment[channel.SUPERVISOR] = here
        command, names = _local(job, environment, port), None
    else:
        listener, command, environment = _several(job, environment, port, findings.master_addr)
        names = [host for host, ids in job.slots.items() for _ in ids]
    supervisor = Supervisor(
        listener=listener,
        session=environment[channel.SESSION],
        failure_timeout=launch.failure_timeout,
        start_timeout=launch.start_timeout,
        launcher_log=launch_folder / f"{DEEPSPEED_FILES}{launch.node_rank or ''}.log",
        hosts=names if launch.launcher == "pdsh" else None,
        by_hand=launch.no_ssh,
        asked=asked,
    )
    if launch.launcher == "pdsh" and job.slots is not None and not launch.no_ssh:
        # A launcher that is suspended (Ctrl-Z) is one that the hosts do not hear of.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        return supervisor.run(command, environment)
    finally:
        if listener is not None:
            listener.close()
        remove_shared_memory(port)


def _local(job: Job, environment: Mapping[str, str], port: int) -> list[str]:
    # With CUDA_VISIBLE_DEVICES DeepSpeed takes what it names, and must not get a count.
    named = job.num_procs is None and "CUDA_VISIBLE_DEVICES" in environment
    count = None if named else job.num_procs or job.num_gpus
    return local_command(job.arguments, count=count, master_port=port)


def _hosts(job: Job, master_addr: str) -> Hosts:
    assert job.slots is not None
    launch = job.launch
    return Hosts(
        slots=job.slots,
        hostfile=str((job.folder / LAUNCH / HOSTFILE).absolute()),
        master_addr=master_addr,
        launcher=launch.launcher,
        launcher_args=launch.launcher_args,
        ssh_port=launch.ssh_port,
        node_rank=launch.node_rank,
    )


def _hostfile(job: Job) -> str:
    """Of the hosts that were chosen: every backend of DeepSpeed's reads it the same way."""
    assert job.slots is not None
    return write_hostfile({host: max(ids) + 1 for host, ids in job.slots.items()})


def _several(
    job: Job, environment: dict[str, str], port: int, master_addr: str | None
) -> tuple[socket.socket | None, list[str], dict[str, str]]:
    """The supervisor's socket, the command, and its environment, for several hosts."""
    assert job.slots is not None
    launch = job.launch
    master_addr = launch.master_addr or master_addr or resolve(next(iter(job.slots)))
    if master_addr is None or (master_addr.startswith("127.") and not launch.no_ssh):
        raise ConfigError(
            f"The address of the first host, {next(iter(job.slots))}, is not known here (its name "
            f"means {master_addr}). Give --master-addr."
        )
    hosts = _hosts(job, master_addr)
    hostfile = Path(hosts.hostfile)
    if launch.no_ssh:
        # Nothing was agreed on beforehand but the options: they are the word, and the next port.
        hostfile = hostfile.with_name(f"{HOSTFILE}-{launch.node_rank}")
        hosts = replace(hosts, hostfile=str(hostfile))
        hostfile.write_text(_hostfile(job))
        meaning = [*job.arguments, master_addr, str(port), *job.slots]
        environment[channel.SESSION] = hashlib.sha256("\0".join(meaning).encode()).hexdigest()
        environment[channel.SUPERVISOR] = f"{master_addr}:{port + 1}"
        environment[channel.NODE_RANK] = str(launch.node_rank)
        listener = None
        if launch.node_rank == 0:
            try:
                listener, _ = listen_for_agents("", port + 1)
            except OSError as error:
                raise ConfigError(
                    f"--master-port {port}: the next port, {port + 1}, is needed, too, and is not "
                    f"to be had here ({error.strerror}). Choose another one, on all hosts."
                ) from error
        command = hosts_command(job.arguments, hosts, master_port=port)
        return listener, command, environment
    hostfile.write_text(_hostfile(job))
    # Where this host is seen from the others.
    listener, here = listen_for_agents("", seen_as=route_from(master_addr) or master_addr)
    environment[channel.SUPERVISOR] = here
    variables = variables_of_hosts(job, environment)
    if launch.launcher != "pdsh":
        variables |= {"MASTER_ADDR": master_addr, "MASTER_PORT": str(port)}
    env_file = hostfile.with_name(f"{DEEPSPEED_FILES}_env")
    env_file.unlink(missing_ok=True)
    env_file.touch(mode=0o600)  # before anything is in it
    env_file.write_text(deepspeed_env(variables, launch.launcher))
    command = hosts_command(job.arguments, hosts, master_port=port)
    return listener, command, hosts_environment(environment, str(env_file.absolute()))
