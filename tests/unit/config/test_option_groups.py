"""The groups of options: which there are, their defaults, and what --help shows of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.options import SECTIONS
from launcher.sections import SectionedOption
from lorasb_ds.config.data_options import DEMO_DATA, DEMO_EVAL_DATA
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.option_group import DEFAULT_TEXT
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import ConfigError, option_name

# Flags and keys of run.json: scripts of users and folders of old runs have them.
NAMES = [
    "activation_offload",
    "attn_implementation",
    "chat_template",
    "data",
    "data_weights",
    "dataset_num_proc",
    "ds_config",
    "dtype",
    "early_stopping_patience",
    "early_stopping_threshold",
    "epochs",
    "eval_data",
    "eval_every",
    "expert_r",
    "force",
    "gamma",
    "generate_samples",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "group_by_length",
    "init_data",
    "init_from",
    "init_lr",
    "init_memory_gib",
    "init_micro_batch_size",
    "init_offload",
    "init_samples",
    "init_seed",
    "init_update",
    "keep_last",
    "load_best_model_at_end",
    "load_in_4bit",
    "load_in_8bit",
    "lora_alpha",
    "loss_on",
    "lr",
    "lr_scheduler",
    "max_grad_norm",
    "max_length",
    "max_skipped_rows",
    "max_skipped_steps",
    "max_steps",
    "method",
    "micro_batch_size",
    "model",
    "on_save_error",
    "optimizer",
    "output_dir",
    "overwrite",
    "packing",
    "precondition",
    "profile",
    "prompt_column",
    "r",
    "rank_allocation",
    "rebase_every",
    "report_to",
    "response_column",
    "resume",
    "save_every",
    "seed",
    "sequence_parallel",
    "target_modules",
    "task_type",
    "template_date",
    "track_alignment",
    "train_batch_size",
    "truncation",
    "trust_remote_code",
    "val_set_size",
    "warmup_ratio",
    "weight_decay",
]
OPTIONS = {
    option.name: option
    for option in main.commands["train"].params
    if isinstance(option, SectionedOption) and option.section in SECTIONS
}


def test_names_of_options_and_of_keys_in_run_json_never_change() -> None:
    assert sorted(RunConfig().model_dump()) == NAMES
    assert sorted(OPTIONS) == NAMES  # type: ignore[type-var]
    for name, option in OPTIONS.items():
        assert option_name(str(name)) in option.opts


def test_a_field_is_in_one_group_and_the_sections_come_in_the_order_of_the_fields() -> None:
    grouped = [name for group in SECTIONS.values() for name in group.model_fields]
    assert grouped == list(RunConfig.model_fields)
    for name, option in OPTIONS.items():
        assert name in SECTIONS[option.section].model_fields


def test_help_has_the_sections() -> None:
    lines = CliRunner().invoke(main, ["train", "--help"]).output.splitlines()
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert [heading for heading in headings if heading in SECTIONS] == [*SECTIONS]
    assert "Hosts and processes" in headings


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_default(name: str) -> None:
    """A value of the field itself, or where it is a rule its text; prose has none."""
    field, option = RunConfig.model_fields[name], OPTIONS[name]
    assert "default" not in str(field.description)
    _, has_default, shown = str(option.help).partition(" [default: ")
    if isinstance(field.json_schema_extra, dict):
        assert shown == f"{field.json_schema_extra[DEFAULT_TEXT]}]"
    elif field.default is None:
        assert not has_default
    else:
        default = field.default
        expected = " ".join(default) if isinstance(default, tuple) else str(default)
        assert shown == f"{expected.lower() if isinstance(default, bool) else expected}]"


@pytest.mark.parametrize("method", [*METHODS, "peft:dora.json"])
def test_the_command_line_and_the_class_have_the_same_defaults(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dora.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    config = RunConfig(method=method)
    assert config == load_run_config({"method": method})
    of_r = 1.56e-3 if method.startswith(("lora-sb", "sb-")) else 2e-4
    assert config.lr == (4.69e-4 if method == "lora-xs" else of_r)
    assert config.eval_data == DEMO_EVAL_DATA
    assert config.model_fields_set == {"method"}


def test_rows_are_held_out_by_default_for_the_demo_alone() -> None:
    assert RunConfig(data=(DEMO_DATA,)).eval_data == DEMO_EVAL_DATA
    assert RunConfig(data=("rows.jsonl",)).eval_data is None
    assert RunConfig(data=(DEMO_DATA, "rows.jsonl")).eval_data is None
    assert RunConfig(val_set_size=0.1).eval_data is None
    assert RunConfig(eval_data=None).eval_data is None


def test_a_default_that_looks_at_other_fields_is_no_problem_of_its_own() -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config({"method": "no-such-method"})
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith("--method 'no-such-method'")


def test_what_was_asked_for_is_known(tmp_path: Path) -> None:
    """Defaults that depend on other fields are none of it, nor is what is replayed."""
    config = load_run_config({"method": "lora", "r": 8, "seed": None})
    assert config.model_fields_set == {"method", "r"}
    assert config.lr == 2e-4
    copy = config.model_copy(update={"micro_batch_size": 2})
    assert copy.model_fields_set == {"method", "r", "micro_batch_size"}
    assert (copy.lr, copy.eval_data) == (2e-4, DEMO_EVAL_DATA)
    made = RunConfig.model_construct(_fields_set={"method"}, method="lora")
    assert (made.model_fields_set, made.lr) == ({"method"}, 2e-4)
    (tmp_path / "run.json").write_text(json.dumps({"config": copy.model_dump()}))
    again = load_run_config({"seed": 1}, str(tmp_path / "run.json"))
    assert again.model_fields_set == {"seed"}
    assert again == copy.model_copy(update={"seed": 1})
    # Another method has another learning rate: what is replayed belongs to the old one.
    other = load_run_config({"method": "lora-sb"}, str(tmp_path / "run.json"))
    assert (other.lr, other.r) == (1.25e-2, 8)
