"""Options, the ds_config and how they agree. Torch-free code, so plain values are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.launch_options import OPTIONS, LaunchOptions
from launcher.jobs.make_job import make_job, replayed_processes
from lorasb_ds.config.data_options import DEMO_EVAL_DATA
from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.paths import SHIPPED_DS_CONFIGS
from lorasb_ds.config.resolve import load_run_config, with_adapter
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import check_output_dir
from lorasb_ds.errors import ConfigError

ZERO3 = str(SHIPPED_DS_CONFIGS / "zero3.json")


def ds_file(tmp_path: Path, **content: Any) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **content}))
    return str(path)


def problems(tmp_path: Path, given: dict[str, Any], world_size: int = 2, **content: Any) -> str:
    given = {**given, "ds_config": ds_file(tmp_path, **content)}
    with pytest.raises(ConfigError) as error:
        resolve_ds_config(load_run_config(given), world_size)
    return str(error.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config({"r": 0, "init_lr": -1.0, "lr_scheduler": "step"})
    assert len(error.value.problems) == 3
    assert "--r 0" in error.value.problems[0]
    assert "--init-lr -1.0" in error.value.problems[1]
    assert "--lr-scheduler 'step'" in error.value.problems[2]
    assert "'cosine', 'linear' or 'constant'" in error.value.problems[2]


def test_the_demo_is_evaluated_and_other_data_only_when_asked() -> None:
    assert load_run_config({}).eval_data == DEMO_EVAL_DATA
    assert load_run_config({"data": "rows.jsonl"}).eval_data is None


def test_data_is_one_source_or_several() -> None:
    assert load_run_config({"data": "a.jsonl"}).data == ("a.jsonl",)
    assert load_run_config({"data": ["a.jsonl", "b.csv"]}).data == ("a.jsonl", "b.csv")
    assert RunConfig(data="a.jsonl").data == ("a.jsonl",)
    for nothing in ("", (), ("a.jsonl", "")):
        with pytest.raises(ConfigError, match="--data"):
            load_run_config({"data": nothing})


def test_weights_of_the_sources() -> None:
    two = {"data": ("a.jsonl", "b.jsonl")}
    for given in ("2,0.5", " 2, 0.5", [2, 0.5], (2.0, 0.5)):
        assert load_run_config({**two, "data_weights": given}).data_weights == (2.0, 0.5)
    for wrong in ("2,0", "2,-1", "2,x", "2,", "2,inf"):
        with pytest.raises(ConfigError, match="--data-weights"):
            load_run_config({**two, "data_weights": wrong})
    with pytest.raises(ConfigError, match=r"--data-weights 2,0\.5 has 2 weights.*1 time\(s\)"):
        load_run_config({"data": "a.jsonl", "data_weights": "2,0.5"})


def test_rows_held_out_of_the_training_data() -> None:
    assert load_run_config({"val_set_size": 0.1}).eval_data is None, "the demo's rows, too"
    for wrong in (0, -0.1, 1.5):
        with pytest.raises(ConfigError, match="--val-set-size"):
            load_run_config({"val_set_size": wrong})
    with pytest.raises(ConfigError, match=r"--val-set-size .*--eval-data .*Give one"):
        load_run_config({"val_set_size": 5, "eval_data": "b.jsonl"})


def test_replay_of_data(tmp_path: Path) -> None:
    """Also of runs that had one source, as a string; what is asked for pushes out its opposite."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": {"data": "a.jsonl", "val_set_size": 0.1}}))
    assert load_run_config({}, str(path)).data == ("a.jsonl",)
    assert load_run_config({"eval_data": "b.jsonl"}, str(path)).val_set_size is None
    two = load_run_config({"data": ("a.jsonl", "b.jsonl"), "data_weights": "1,2"})
    path.write_text(json.dumps({"config": two.model_dump()}))
    assert load_run_config({}, str(path)) == two
    assert load_run_config({"data": "c.jsonl"}, str(path)).data_weights is None
    path.write_text(json.dumps({"config": {"data": "a.jsonl", "init_data": ["i.jsonl"]}}))
    assert load_run_config({"data": "c.jsonl"}, str(path)).init_data == ("i.jsonl",)
    assert load_run_config({"init_data": "j.jsonl"}, str(path)).init_data == ("j.jsonl",)
    path.write_text(json.dumps({"config": load_run_config({}).model_dump()}))
    assert load_run_config({"val_set_size": 9}, str(path)).eval_data is None


def test_replay_takes_the_run_and_flags_win(tmp_path: Path) -> None:
    first = load_run_config({"r": 16, "lr": 3e-3, "output_dir": "somewhere", "overwrite": True})
    (tmp_path / "run.json").write_text(json.dumps({"config": first.model_dump(), "versions": {}}))
    again = load_run_config({"lr": 1e-3, "seed": None}, str(tmp_path / "run.json"))
    assert (again.r, again.lr) == (16, 1e-3)
    assert again.output_dir is None, "a replay gets a folder of its own"
    assert not again.overwrite


def test_trust_in_code_is_not_replayed(tmp_path: Path) -> None:
    """The run may be somebody else's: only the flag itself lets a model's code run."""
    path = tmp_path / "run.json"
    trusted = RunConfig(trust_remote_code=True, r=3).model_dump()
    path.write_text(json.dumps({"config": trusted}))
    for given, run_json in (({}, str(path)), ({"resume": str(tmp_path)}, None)):
        config = load_run_config(given, run_json)
        assert (config.trust_remote_code, config.r) == (False, 3)
        given = {**given, "trust_remote_code": True}
        assert load_run_config(given, run_json).trust_remote_code
        given |= {} if "resume" in given else {"output_dir": str(tmp_path / "new")}
        launch = LaunchOptions(
            **{name: option.get("default") for name, option in OPTIONS.items()} | {"num_procs": 1}
        )
        job = make_job(launch, [], run_json, given).restarted(has_begun=True)
        assert job.config.trust_remote_code, "a restart has the flags of its job"
        assert "--trust-remote-code" in job.arguments
    assert "trust_remote_code" not in with_adapter({}, str(tmp_path))


def test_replay_drops_what_no_longer_fits(tmp_path: Path) -> None:
    first = load_run_config({"max_steps": 5, "prompt_column": "question"})
    assert first.eval_data == DEMO_EVAL_DATA
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": first.model_dump()}))
    assert load_run_config({"epochs": 2.0}, str(path)).max_steps is None
    other = load_run_config({"data": "mine.jsonl"}, str(path))
    assert (other.eval_data, other.prompt_column) == (None, None)


def test_replay_reads_the_copy_of_the_ds_config(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "ds_config.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}})
    )
    first = RunConfig(ds_config="/gone/ds.json", micro_batch_size=2)
    (run / "run.json").write_text(
        json.dumps({"config": first.model_dump(), "world_size": 2, "accelerator": "cpu"})
    )
    config = load_run_config({}, str(run / "run.json"))
    assert resolve_ds_config(config, 2)[0]["train_batch_size"] == 4
    assert replayed_processes(str(run / "run.json")) == (2, None)
    content = {"config": first.model_dump(), "world_size": 16, "accelerator": "cuda"}
    for here, known in ((16, True), (8, False)):
        (tmp_path / "hosts.json").write_text(json.dumps({**content, "processes_per_host": here}))
        if known:
            assert replayed_processes(str(tmp_path / "hosts.json")) == (None, 16)
            continue
        with pytest.raises(ConfigError, match=r"16 processes, 8 on each host\. Name"):
            replayed_processes(str(tmp_path / "hosts.json"))
    # Another file's numbers win over what is only replayed, and not over what is asked for.
    other = ds_file(tmp_path, train_micro_batch_size_per_gpu=7)
    config = load_run_config({"ds_config": other}, str(run / "run.json"))
    assert resolve_ds_config(config, 1)[1].micro_batch_size == 7
    config = load_run_config({"ds_config": other, "micro_batch_size": 3}, str(run / "run.json"))
    with pytest.raises(ConfigError, match=r"--micro-batch-size 3 differs"):
        resolve_ds_config(config, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{not json", "not valid JSON"), ("[1]", "must hold a JSON object"), ("{}", "no 'config'")],
)
def test_bad_run_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_run_config({}, str(tmp_path / "run.json"))


def test_auto_is_filled_and_missing_keys_too(tmp_path: Path) -> None:
    path = ds_file(
        tmp_path,
        train_batch_size="auto",
        gradient_clipping="auto",
        zero_optimization={"stage": 3, "stage3_prefetch_bucket_size": "auto"},
    )
    config = load_run_config({"ds_config": path, "micro_batch_size": 3, "max_grad_norm": 0.5})
    resolved, _ = resolve_ds_config(config, 4)
    assert resolved["train_micro_batch_size_per_gpu"] == 3
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["train_batch_size"] == 12
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert resolved["timers"] == {"throughput": {"enabled": False}}
    assert "auto" not in json.dumps(resolved)


def test_a_number_wins_over_a_default(tmp_path: Path) -> None:
    path = ds_file(
        tmp_path,
        train_micro_batch_size_per_gpu=7,
        gradient_clipping=0.25,
        bf16={"enabled": False},
        optimizer={"type": "AdamW", "params": {"lr": 5e-4, "betas": "auto"}},
    )
    _, config = resolve_ds_config(load_run_config({"ds_config": path}), 1)
    assert (config.micro_batch_size, config.max_grad_norm) == (7, 0.25)
    assert (config.dtype, config.lr) == ("fp32", 5e-4)


def test_the_global_batch_decides_the_accumulation(tmp_path: Path) -> None:
    path = ds_file(tmp_path, train_batch_size=48)
    config = load_run_config({"ds_config": path, "micro_batch_size": 4})
    resolved, config = resolve_ds_config(config, 2)
    assert config.gradient_accumulation_steps == resolved["gradient_accumulation_steps"] == 6


@pytest.mark.parametrize(
    ("rows", "world_size", "accumulation", "places"),
    [(4, 1, 2, 4), (4, 2, 1, 4), (4, 3, 1, 6), (7, 3, 2, 12), (1, 1, 1, 2)],
)
def test_a_global_batch_need_not_divide(
    rows: int, world_size: int, accumulation: int, places: int
) -> None:
    given = {"train_batch_size": rows, "micro_batch_size": 2}
    resolved, config = resolve_ds_config(load_run_config(given), world_size)
    assert config.train_batch_size == rows
    assert config.gradient_accumulation_steps == accumulation
    assert resolved["train_batch_size"] == places, "DeepSpeed's is the product"
    without = resolve_ds_config(load_run_config({"micro_batch_size": 2}), world_size)[1]
    assert without.train_batch_size == 2 * world_size


@pytest.mark.parametrize(
    ("content", "given", "dtype"),
    [
        ({"fp16": {"enabled": True}}, {}, "fp16"),
        ({"bf16": {"enabled": False}}, {"dtype": "fp16"}, "fp16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, {}, "fp32"),
        ({"fp16": {"enabled": "auto", "initial_scale_power": 8}}, {"dtype": "fp16"}, "fp16"),
        ({"fp16": {"enabled": False}}, {}, "bf16"),
    ],
)
def test_dtypes(tmp_path: Path, content: Any, given: Any, dtype: str) -> None:
    path = ds_file(tmp_path, **content)
    resolved, config = resolve_ds_config(load_run_config({"ds_config": path, **given}), 1)
    assert config.dtype == dtype
    assert resolved["bf16"]["enabled"] == (dtype == "bf16")
    assert resolved.get("fp16", {}).get("enabled", False) == (dtype == "fp16")
    if "initial_scale_power" in content.get("fp16", {}):
        assert resolved["fp16"]["initial_scale_power"] == 8


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"early_stopping_patience": 2}, ["--early-stopping-patience needs --eval-every"]),
        ({"early_stopping_threshold": 0.1}, ["needs --early-stopping-patience N"]),
        ({"data": "a.jsonl", "eval_every": 5}, ["--eval-every needs held-out rows"]),
        ({"load_best_model_at_end": True, "generate_samples": 2}, ["--load-best", "--generate"]),
    ],
)
def test_options_that_ask_for_nothing_together(given: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(given)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("given", "content", "parts"),
    [
        ({"lr": 1e-3}, {"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}}, ["--lr", "0.002"]),
        (
            {"micro_batch_size": 2},
            {"train_micro_batch_size_per_gpu": 4},
            ["--micro-batch-size 2", "train_micro_batch_size_per_gpu 4"],
        ),
        ({"dtype": "fp32"}, {"bf16": {"enabled": True}}, ["--dtype fp32", "bf16.enabled is true"]),
        (
            {"gradient_accumulation_steps": 1},
            {"train_batch_size": 700},
            ["700 rows", "--micro-batch-size 4"],
        ),
        ({}, {"gradient_clipping": "much"}, ["gradient_clipping", "'much'"]),
        ({}, {"train_batch_size": "48"}, ["train_batch_size is '48'", "a number"]),
        (
            {},
            {"train_micro_batch_size_per_gpu": 0, "train_batch_size": 4},
            ["--micro-batch-size 0"],
        ),
        ({}, {"train_micro_batch_size_per_gpu": 2.5}, ["--micro-batch-size 2.5"]),
        ({"lr": float("inf")}, {}, ["--lr inf"]),
        ({"dtype": "bf16"}, {"fp16": {"enabled": True}}, ["--dtype bf16", "fp16.enabled true"]),
        ({}, {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["both enabled"]),
        ({"load_in_4bit": True}, {"fp16": {"enabled": True}}, ["--dtype fp16"]),
        ({}, {"zero_optimization": {"stage": 0}}, ["stage is 0", "fp32 master", "Stage 1"]),
        (
            {},
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
            ["mics_shard_size", "removed", "zero_hpz_partition_size"],
        ),
        (
            {},
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            ["zero_quantized_nontrainable_weights", "whole numbers", "--load-in-4bit"],
        ),
        (
            {},
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            ["zero_quantized_gradients", "Remove it"],
        ),
        *[
            (
                {},
                {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": group}},
                [f"zero_hpz_partition_size is {group!r}", "divide the number of processes, 2"],
            )
            for group in (0, 3, 4, "two", True)
        ],
        (
            {},
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["nvme_path is not set", "TMPDIR"],
        ),
        (
            {},
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "nvme", "nvme_path": "/no/such/folder"},
                }
            },
            ["nvme_path is /no/such/folder", "written to"],
        ),
        (
            {},
            {
                "zero_optimization": {
                    "stage": 3,
                    "zero_hpz_partition_size": 2,
                    "offload_param": {"device": "nvme", "nvme_path": "/tmp"},  # noqa: S108
                }
            },
            ["zero_hpz_partition_size is 2", "on NVMe"],
        ),
        ({}, {"optimizer": {"type": "Muon"}}, ["'Muon'", "AdamW"]),
        (
            {},
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            ["warmup_num_steps", "--lr-scheduler"],
        ),
        (
            {},
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer", "remove it"],
        ),
        (
            {"load_in_4bit": True},
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            ["zero_quantized_weights", "--load-in-4bit"],
        ),
        ({"load_in_4bit": True, "dtype": "fp32"}, {"zero_optimization": {"stage": 2}}, ["fp32"]),
    ],
)
def test_disagreements(
    tmp_path: Path, given: dict[str, Any], content: dict[str, Any], parts: list[str]
) -> None:
    message = problems(tmp_path, given, **content)
    for part in parts:
        assert part in message


def test_all_disagreements_are_reported_together(tmp_path: Path) -> None:
    config = load_run_config(
        {
            "ds_config": ds_file(tmp_path, gradient_clipping=2.0, fp16={"enabled": True}),
            "dtype": "bf16",
            "max_grad_norm": 1.0,
        }
    )
    with pytest.raises(ConfigError) as error:
        resolve_ds_config(config, 1)
    assert len(error.value.problems) == 2


@pytest.mark.parametrize("file", sorted(SHIPPED_DS_CONFIGS.glob("*.json")), ids=lambda f: f.name)
def test_shipped_configurations_say_auto(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    content = json.loads(file.read_text())
    filled = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert all(content[key] == "auto" for key in (*filled, "gradient_clipping"))
    config = load_run_config({"ds_config": str(file), "micro_batch_size": 5})
    assert resolve_ds_config(config, 3)[0]["train_batch_size"] == 15


def test_hpz_groups_are_hosts() -> None:
    config = load_run_config({"ds_config": str(SHIPPED_DS_CONFIGS / "zero3_hpz.json")})
    for world_size, local_size, expected in ((8, 4, 4), (8, None, 8), (1, 1, 1)):
        resolved, _ = resolve_ds_config(config, world_size, local_size)
        assert resolved["zero_optimization"]["zero_hpz_partition_size"] == expected
    with pytest.raises(ConfigError, match="is 3; it must divide the number of processes, 8"):
        resolve_ds_config(config, 8, 3)


def test_the_nvme_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offload = {"device": "nvme", "nvme_path": "auto"}
    content = {"zero_optimization": {"stage": 3, "offload_param": offload}}
    monkeypatch.delenv("TMPDIR", raising=False)
    assert "nvme_path is not set" in problems(tmp_path, {}, **content)
    elsewhere = load_run_config({"ds_config": ds_file(tmp_path, **content)})
    resolve_ds_config(elsewhere, world_size=2, here=False)  # on hosts that know their TMPDIR
    offload["nvme_path"] = "/a/drive/of/theirs"
    resolve_ds_config(
        load_run_config({"ds_config": ds_file(tmp_path, **content)}), world_size=2, here=False
    )
    offload["nvme_path"] = "auto"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    resolved, _ = resolve_ds_config(
        load_run_config({"ds_config": ds_file(tmp_path, **content)}), world_size=2
    )
    assert resolved["zero_optimization"]["offload_param"]["nvme_path"] == str(tmp_path)


def test_one_process_takes_zero2_unless_told_otherwise() -> None:
    """ZeRO-3 has nothing to shard there."""
    default = load_run_config({})
    for world_size, given, stage in ((1, {}, 2), (2, {}, 3), (1, {"ds_config": ZERO3}, 3)):
        resolved, config = resolve_ds_config(load_run_config(given), world_size)
        assert resolved["zero_optimization"]["stage"] == stage
        assert Path(config.ds_config).name == f"zero{stage}.json"
    assert Path(default.ds_config).name == "zero3.json"


def test_a_missing_ds_config_names_the_shipped_ones() -> None:
    config = load_run_config({"ds_config": "ds_configs/zero9.json"})
    with pytest.raises(ConfigError, match=r"no such file.*ds_configs/zero3\.json"):
        resolve_ds_config(config, 1)


def test_output_dir(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    check_output_dir(RunConfig(output_dir=str(tmp_path / "new")))
    check_output_dir(RunConfig(output_dir=str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match=r"is not empty.*--overwrite"):
        check_output_dir(RunConfig(output_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="is a file"):
        check_output_dir(RunConfig(output_dir=str(tmp_path / "file")))


def test_the_command_line_does_not_import_torch() -> None:
    code = (
        "import sys, launcher.cli; from lorasb_ds.config import ds_config; "
        "print({'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_runs_date_stays_its_own(tmp_path: Path) -> None:
    """Templates write it into the rows, which resume, --init-from and eval compare."""
    today = load_run_config({}).template_date
    assert today in {date.today().isoformat(), str(date.today() - timedelta(days=1))}
    earlier = {"template_date": "2024-07-26", "output_dir": str(tmp_path / "earlier")}
    (tmp_path / "earlier").mkdir()
    run_json = tmp_path / "earlier" / "run.json"
    run_json.write_text(json.dumps({"config": load_run_config(earlier).model_dump()}))
    folder = str(tmp_path / "earlier")
    for given in (
        {"resume": "auto", "output_dir": folder},
        {"resume": folder},
        {"init_from": folder, "output_dir": str(tmp_path / "new")},
    ):
        assert load_run_config(given).template_date == "2024-07-26"
        assert load_run_config({**given, "template_date": "2025-01-02"}).template_date[:4] == "2025"
    assert load_run_config({}, str(run_json)).template_date == "2024-07-26"
    assert with_adapter({}, folder)["template_date"] == "2024-07-26"
    again = {"output_dir": folder, "overwrite": True}
    assert load_run_config(again).template_date != "2024-07-26", "a run of its own"
    run_json.write_text(json.dumps({"config": {}}))  # of an earlier version
    assert load_run_config({"init_from": folder}).template_date != "2024-07-26"
    with pytest.raises(ConfigError, match=r"--template-date 'today' is not allowed: .*YYYY-MM-DD"):
        load_run_config({"template_date": "today"})


@pytest.mark.parametrize(
    "name", ["zero3", "zero3.json", "ds_configs/zero3.json", "ds_configs/zero3"]
)
def test_shipped_files_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_run_config({"ds_config": name}).ds_config == ZERO3
    elsewhere = f"own/{Path(name).name}"
    assert load_run_config({"ds_config": elsewhere}).ds_config == elsewhere
    (tmp_path / name).mkdir(parents=True)
    assert load_run_config({"ds_config": name}).ds_config == ZERO3, "a folder is no configuration"
    (tmp_path / name).rmdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert load_run_config({"ds_config": name}).ds_config == name, "one's own comes first"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"packing": True}, "--packing does not work"),
        ({"loss_on": "all"}, "--loss-on does not work"),
        ({"chat_template": "chatml"}, "--chat-template does not work"),
        ({"optimizer": "muon"}, "--optimizer muon does not work"),
        ({"generate_samples": 1, "eval_every": 1}, "--generate-samples does not work"),
    ],
)
def test_what_does_not_work_where_rows_are_classified(given: dict[str, Any], message: str) -> None:
    load_run_config(given)
    with pytest.raises(ConfigError, match=f"{message} with --task-type sequence-classification"):
        load_run_config({"task_type": "sequence-classification", **given})
