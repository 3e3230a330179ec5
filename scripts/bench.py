#!/usr/bin/env python
"""Benchmarks. Each prints a table of ratios taken in one run, and writes its numbers as JSON."""

from __future__ import annotations

import click
from bench_init import init, scale
from bench_load import main as load
from bench_plan import plan
from bench_svd import svd
from bench_wide import main as wide


@click.group(help=__doc__)
def main() -> None:
    pass


for command in (svd, init, scale, load, wide, plan):
    main.add_command(command)

if __name__ == "__main__":
    main()
