"""Where runs go side by side: hosts of a hostfile, or parts of this one. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping

from launcher.hosts.hostfile import read_hostfile, select
from launcher.jobs.launch_options import LaunchOptions
from launcher.sweeps.pool import Allocation
from lorasb_ds.errors import ConfigError


def find_allocations(launch: LaunchOptions, parallel: int, has_batch: bool) -> list[Allocation]:
    """Return an allocation for each of the runs that may go on at a time.

    Args:
        parallel: runs at a time on this host.
        has_batch: whether --train-batch-size is given, so that hosts of different sizes take the
            same steps.
    Raises:
        ConfigError: for options that several runs cannot have.
    """
    launch.check()
    unfit = {"--no-ssh": launch.no_ssh, "--allow-fewer-hosts": launch.allow_fewer_hosts}
    if given := [name for name, value in unfit.items() if value]:
        raise ConfigError(
            f"{given[0]} is about one run on several hosts, and a sweep gives each run "
            "one host. Leave it out."
        )
    if launch.hostfile is None:
        allocations = _parts_of_this_host(
            launch, parallel, os.environ, len(os.sched_getaffinity(0))
        )
    elif parallel > 1:
        raise ConfigError(
            "--parallel is about this host, and --hostfile gives each run a host of its own. "
            "Leave one of them out."
        )
    else:
        allocations = _hosts(launch, launch.hostfile, has_batch)
    alone = {"--master-port": launch.master_port, "--master-addr": launch.master_addr}
    if len(allocations) > 1 and (
        given := [name for name, value in alone.items() if value is not None]
    ):
        raise ConfigError(
            f"{given[0]} cannot be that of {len(allocations)} runs at a time. Leave it out."
        )
    return allocations


def _hosts(launch: LaunchOptions, hostfile: str, has_batch: bool) -> list[Allocation]:
    hosts = read_hostfile(hostfile)
    option = "--num-procs" if launch.num_procs is not None else "--num-gpus"
    count = launch.num_procs or launch.num_gpus
    filters = (launch.include, launch.exclude, launch.num_nodes)
    slots = select(hosts, *filters, count, slots_option=option)
    sizes = {host: len(ids) for host, ids in slots.items()}
    if len(set(sizes.values())) > 1 and not has_batch:
        listed = ", ".join(f"{host}: {size}" for host, size in sizes.items())
        raise ConfigError(
            f"The hosts have different numbers of slots ({listed}), and so runs would take steps "
            "of different sizes. Give --train-batch-size, or the same --num-gpus for all."
        )
    whole = {host: ids == list(range(hosts[host])) for host, ids in slots.items()}
    return [
        Allocation(include=host if whole[host] else f"{host}:{','.join(map(str, ids))}")
        for host, ids in slots.items()
    ]


def _parts_of_this_host(
    launch: LaunchOptions, parallel: int, environment: Mapping[str, str], cores: int
) -> list[Allocation]:
    # Nothing else says so to an evaluation in one process.
    cpu = {} if launch.num_procs is None else {"DS_ACCELERATOR": "cpu"}
    if parallel == 1:
        return [Allocation(environment=cpu)]
    if launch.num_procs is not None:
        threads = max(1, cores // (parallel * launch.num_procs))
        own = {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": str(threads)}
        return [Allocation(environment=cpu | own)] * parallel
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if launch.num_gpus is None or len(gpus) != parallel * launch.num_gpus:
        wanted = f"{parallel} x --num-gpus"
        if launch.num_gpus is not None:
            wanted += f" = {parallel * launch.num_gpus}"
        raise ConfigError(
            f"--parallel {parallel} divides this host. On the CPU give --num-procs of each run; on "
            f"GPUs --num-gpus of each run, with CUDA_VISIBLE_DEVICES naming {wanted} of them (it "
            f"names {len(gpus)})."
        )
    n = launch.num_gpus
    return [
        Allocation(environment={"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * n : (i + 1) * n])})
        for i in range(parallel)
    ]
