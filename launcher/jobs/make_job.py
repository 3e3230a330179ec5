"""Options, hostfile and ds_config become a job: the place that chooses its kind."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.hosts.host import interfaces, resolve
from launcher.hosts.hostfile import read_hostfile, select
from launcher.jobs.by_hand_job import ByHandJob
from launcher.jobs.job import Job, resolved_on
from launcher.jobs.launch_options import LaunchOptions
from launcher.jobs.local_job import LocalJob
from launcher.jobs.ranks import EVAL
from launcher.jobs.ssh_job import SshJob
from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.paths import read_json
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_layout import (
    LOCK,
    RUN_JSON,
    check_output_dir,
    default_output_dir,
    resumed_run,
)
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.folder_lock import check_not_in_use


def make_job(
    launch: LaunchOptions,
    worker_flags: Sequence[str],
    run_json: str | None,
    given: Mapping[str, Any],
) -> Job:
    """Check options, hostfile and ds_config against each other, and make a job of them.

    Args:
        worker_flags: of the worker, before the run's options.
        run_json: an earlier run to replay.
        given: options of the run, fields of RunConfig; what is None was not given.
    Raises:
        ConfigError: with what does not go together.
    """
    launch.check()
    given = dict(given)
    if given.get("resume") not in (None, "auto"):
        # A restart goes on in the folder, and with the options that it has.
        run_json = run_json or str(resumed_run(given["resume"]) / RUN_JSON)
    num_procs, num_gpus, slots = launch.num_procs, launch.num_gpus, _slots(launch)
    if slots is not None:
        on_cpu = num_procs is not None or os.environ.get("DS_ACCELERATOR") == "cpu"
        most = max(len(ids) for ids in slots.values())
        num_procs, num_gpus = (most, None) if on_cpu else (None, most)
        if _is_this_host_alone(launch, slots):
            slots = None
    elif run_json is not None and num_procs is None and num_gpus is None:
        num_procs, num_gpus = replayed_processes(run_json)
    config = load_run_config(given, run_json)
    given["template_date"] = config.template_date  # at midnight, hosts may have different ones
    if slots is not None:
        config = resolved_on(config, slots)
    elif count := num_procs or num_gpus:
        _, config = resolve_ds_config(config, count)
    else:  # DeepSpeed counts the GPUs; the workers check the rest before they join
        read_json(config.ds_config, "--ds-config")
    if launch.no_ssh and config.output_dir is None:
        raise ConfigError(
            "--no-ssh needs --output-dir: every host is started by itself, and all must mean the "
            "same folder. Give it."
        )
    if not launch.node_rank:  # the first host's ranks may have begun to write
        check_output_dir(config, config.init_from, evaluation=EVAL in worker_flags)
        if config.output_dir is not None and config.resume is None:  # else its ranks may wait
            check_not_in_use(Path(config.output_dir) / LOCK)
    if config.output_dir is None:
        given["output_dir"] = str(default_output_dir(config.model))
        config = config.model_copy(update={"output_dir": given["output_dir"]})
    if slots is None:
        return LocalJob(launch, worker_flags, given, run_json, config, num_procs, num_gpus)
    kind = ByHandJob if launch.no_ssh else SshJob
    return kind(launch, worker_flags, given, run_json, config, num_procs, num_gpus, slots)


def replayed_processes(run_json: str) -> tuple[int | None, int | None]:
    """Return --num-procs and --num-gpus of an earlier run; None if unknown, or the other kind.

    Raises:
        ConfigError: if it was a run of several hosts, which have to be named.
    """
    description = read_json(run_json, "--config")
    count, accelerator = description.get("world_size"), description.get("accelerator")
    if not isinstance(count, int):
        return None, None
    here = description.get("processes_per_host")
    if isinstance(here, int) and here < count:
        raise ConfigError(
            f"{run_json} is of a run of {count} processes, {here} on each host. Name hosts by "
            "--hostfile, or the processes of this host alone by --num-gpus or --num-procs."
        )
    return (count, None) if accelerator == "cpu" else (None, count)


def _slots(launch: LaunchOptions) -> dict[str, list[int]] | None:
    """Return the slots of every host that is named; None where none is."""
    option = "--num-procs" if launch.num_procs is not None else "--num-gpus"
    count = launch.num_procs or launch.num_gpus
    if launch.hostfile is not None:
        hosts = read_hostfile(launch.hostfile)
        filters = (launch.include, launch.exclude, launch.num_nodes)
        slots = select(hosts, *filters, count, slots_option=option)
    elif launch.no_ssh:
        assert launch.num_nodes is not None
        assert count is not None
        slots = {f"node-{i}": list(range(count)) for i in range(launch.num_nodes)}
    else:
        return None
    if launch.node_rank is not None and launch.node_rank >= len(slots):
        raise ConfigError(
            f"--node-rank {launch.node_rank} is not one of the {len(slots)} hosts: they count "
            "from 0. Lower it."
        )
    return slots


def _is_this_host_alone(launch: LaunchOptions, slots: Mapping[str, Sequence[int]]) -> bool:
    """Return whether a hostfile names this host only, which needs no ssh to itself."""
    (host, *others), (ids, *_) = slots, slots.values()
    if others or launch.no_ssh or launch.launcher != "pdsh" or list(ids) != list(range(len(ids))):
        return False
    address = resolve(host) or ""
    names = ("localhost", socket.gethostname(), socket.getfqdn())
    return host in names or address.startswith("127.") or address in interfaces().values()
