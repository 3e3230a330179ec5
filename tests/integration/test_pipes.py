"""Commands whose reader has gone end in silence: `lorasb plan … | head -1`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.runs import made_up_run

COMMANDS = [
    "lorasb plan --model llama-3.2-3b",
    "lorasb report RUN",
    "lorasb report RUN --json",
    "lorasb train --help",
    "lorasb train --print-config",
    "lorasb train --num-procs 1 --dry-run",
    "lorasb hostfile check HOSTS",
]
WITH_TORCH = pytest.param("lorasb data preview --num-rows 1", marks=pytest.mark.slow)


@pytest.mark.parametrize("line", [*COMMANDS, WITH_TORCH])
def test_nobody_reads(line: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    run = made_up_run(tmp_path / "run")
    words = line.replace("RUN", str(run)).replace("HOSTS", str(tmp_path / "hosts")).split()
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run(words, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(theirs)
    said = [text for text in done.stderr.splitlines() if not text.startswith("lorasb: --")]
    assert said == [], "but for what a dry run has looked at"
    assert done.returncode == 1


@pytest.mark.parametrize("line", COMMANDS[:2])
def test_one_line_is_read(line: str, tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    shell = f"{line.replace('RUN', str(run))} | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
