"""What every process of a run imports before it does anything."""

from __future__ import annotations

import sys

from tests.runs import run_command

SLOW = (
    "bitsandbytes",
    "datasets",
    "lm_eval",
    "matplotlib",
    "peft",
    "tensorboard",
)  # a second or more


def test_what_a_run_may_not_need_is_not_imported() -> None:
    """Nor by what it does with the name of a family that is no mixture of experts."""
    script = (
        "import sys, lorasb_ds.training.trainer, lorasb_ds.evaluation.model\n"
        "from lorasb_ds.adapters.peft_targets import target_fields\n"
        "print(target_fields('llama', ['up_proj']))\n"
        f"print([name for name in {SLOW} if name in sys.modules])"
    )
    printed = run_command(sys.executable, "-c", script).splitlines()
    assert printed[-2:] == ["{'target_modules': ['up_proj']}", "[]"]
