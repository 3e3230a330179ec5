"""Compile what tests load, a minute's work: scripts/test.sh does it while another core lints."""

from __future__ import annotations

from deepspeed.comm.torch import build_shm_op

from tests.device import pretend


def main() -> None:
    build_shm_op()
    if not pretend.missing():  # else its tests skip, and say why
        pretend.load()


if __name__ == "__main__":
    main()
