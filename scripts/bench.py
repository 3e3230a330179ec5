#!/usr/bin/env python
"""Benchmarks. Each prints a table of ratios taken in one run, and writes its numbers as JSON."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
from bench_common import ROOT
from bench_init import init, scale
from bench_load import main as load
from bench_merge import main as merge
from bench_moe import main as moe
from bench_plan import plan
from bench_ranks import main as ranks
from bench_samples import main as samples
from bench_step import main as step
from bench_svd import svd
from bench_wide import main as wide

COMMANDS = (svd, init, ranks, scale, load, wide, plan, step, merge, moe, samples)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("all")
@click.option("--quick", is_flag=True, help="Smallest forms, which only show that all of them run.")
@click.pass_context
def run_all(context: click.Context, quick: bool) -> None:
    """Run all of them, one after the other. With --quick they write nothing into docs/."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if quick else ROOT / "docs/benchmarks"
        for command in COMMANDS:
            print(f"\n## {command.name}\n", flush=True)
            options: dict[str, Any] = {"quick": quick}
            if any(parameter.name == "out" for parameter in command.params):
                options["out"] = folder / f"{command.name}.json"
            start = time.perf_counter()
            context.invoke(command, **options)
            print(f"\n{command.name}: {time.perf_counter() - start:.0f} s", flush=True)


for command in COMMANDS:
    main.add_command(command)

if __name__ == "__main__":
    main()
