"""--config with a file of settings, --print-config, and the names that other trainers have."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import aliases
from launcher.cli import main
from launcher.options import SECTIONS
from launcher.sections import FIRST_DAY_OPTIONS
from launcher.settings import MOST_BYTES, NOT_BY_FILE
from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.run_config import RunConfig
from tests.runs import ROOT, word_rows, write_jsonl

OF_LAUNCHER = ["--num-procs", "2"]


@pytest.fixture(autouse=True)
def _rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that the tests name are in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "x", 'b "c"', "train"):
        write_jsonl(tmp_path / f"{name}.jsonl", word_rows(1))


def invoke(*arguments: str, verb: str = "train", status: int = 0) -> str:
    result = CliRunner().invoke(main, [verb, *arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def worker_words(*arguments: str, verb: str = "train") -> list[str]:
    """What the worker would be given, without a date and a default folder."""
    words = invoke(*arguments, "--dry-run", verb=verb).split()
    at = words.index("--template-date") if "--template-date" in words else None
    words = words[:at] + words[at + 2 :] if at is not None else words
    first = next(
        i for i, word in enumerate(words) if word.endswith(("agent.py", "eval.py", "eval"))
    )
    return words[first + 1 :]


def write(tmp_path: Path, text: str, name: str = "settings.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


SETTINGS = """
# What people write.
model: demo
data:            # several sources
  - a.jsonl
  - b.jsonl
data_weights: [1, 0.5]
lr: 1e-3         # YAML 1.1 would say that this is a text
packing: yes
load-in-4bit: false
target_modules: [q_proj, v_proj]
eval_data: ~
output-dir: out
num_procs: 2
"""
WORDS = [
    *("--model", "demo", "--no-load-in-4bit", "--data", "a.jsonl", "--data", "b.jsonl"),
    *("--data-weights", "1,0.5", "--packing", "--target-modules", "q_proj,v_proj"),
    *("--lr", "0.001", "--output-dir", "out"),
]


def test_a_file_is_as_if_its_options_were_given(tmp_path: Path) -> None:
    file = write(tmp_path, SETTINGS)
    assert worker_words("--config", file) == WORDS
    as_json = {"lr": 1e-3, "data": ["a.jsonl"], "num_procs": 2, "packing": True, "output_dir": "o"}
    file = write(tmp_path, json.dumps(as_json), "settings.json")
    assert worker_words("--config", file) == [
        *("--data", "a.jsonl", "--packing", "--lr", "0.001", "--output-dir", "o")
    ]
    assert worker_words("--config", write(tmp_path, ""), *OF_LAUNCHER, "--output-dir", "o") == [
        "--output-dir",
        "o",
    ]


def test_what_is_given_wins(tmp_path: Path) -> None:
    file = write(tmp_path, SETTINGS)
    words = worker_words("--config", file, "--lr", "0.5", "--no-packing", "--data", "c.jsonl")
    assert words[words.index("--lr") + 1] == "0.5"
    assert "--no-packing" in words
    assert [words[i + 1] for i, word in enumerate(words) if word == "--data"] == ["c.jsonl"]
    assert "--data-weights" not in words, "they were those of other sources"
    assert "--num_accelerators 3" in invoke("--config", file, "--num-procs", "3", "--dry-run")
    gpus = write(tmp_path, "num_gpus: 4\n", "gpus.yaml")
    assert "--num_accelerators 2" in invoke("--config", gpus, *OF_LAUNCHER, "--dry-run")


def test_options_that_give_way(tmp_path: Path) -> None:
    """Those that go with what the file has, and not with what is given; it is said."""
    file = write(tmp_path, "lr: 1e-3\nload_in_4bit: true\noverwrite: true\noutput_dir: o\n")
    words = worker_words("--config", file, *OF_LAUNCHER, "--method", "lora-sb")
    assert "--lr" in words, "it is the default's method"
    words = worker_words("--config", file, *OF_LAUNCHER, "--load-in-8bit", "--resume", "auto")
    assert {"--load-in-4bit", "--overwrite"}.isdisjoint(words)
    said = invoke("--config", file, *OF_LAUNCHER, "--load-in-8bit", "--dry-run")
    assert "lorasb: of the file, --load-in-4bit gives way to what is given" in said
    held_out = write(tmp_path, "val_set_size: 0.1\nmax_steps: 3\noutput_dir: o\n", "h.yaml")
    more = ["--config", held_out, "--eval-data", "x.jsonl", "--epochs", "1", "--dry-run"]
    said = invoke(*more, "--method", "lora", "--lr", "1e-3", *OF_LAUNCHER, verb="compare")
    assert "--eval-data x.jsonl" in said
    assert "--val-set-size" not in said.partition("is given")[2]
    printed = as_printed("--config", held_out, "--eval-data", "x.jsonl")
    assert printed == {"eval_data": "x.jsonl", "max_steps": 3, "output_dir": "o"}


def test_a_run_json_is_such_a_file_already(tmp_path: Path) -> None:
    run_json = write(tmp_path, json.dumps({"config": {"lr": 1}}), "run.json")
    said = invoke("--config", run_json, "--print-config", status=2)
    assert "is such a file already" in said


def test_an_epoch_given_replaces_the_steps_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "max_steps: 5\nlr: 1e-2\noutput_dir: o\nnum_procs: 2\n")
    words = worker_words("--config", file, "--epochs", "2")
    assert words == ["--epochs", "2.0", "--lr", "0.01", "--output-dir", "o"]
    words = worker_words("--config", file, "--method", "lora")
    assert "--lr" not in words, "it was for the other method"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nlearning_rat: 2\n", r"line 2: 'learning_rat' is not an option"),
        ("pakcing: true", "; packing is."),
        ("lr: 1\nLR: 2", "'LR' is not an option"),
        ("lr: 1\nlr: 2", "line 2: lr is there twice"),
        ("lr: {peak: 1}", "line 1: lr must be one value, or a list of them"),
        ("data: [[a]]", "line 1: data must be one value"),
        ("- lr", "it must hold options"),
        ("just words", "it must hold options"),
        ("lr: [1", "it is not valid YAML"),
        ("? [a, b]\n: c", "'?' is not an option"),
        ("lr: !!python/object/apply:os.system [exit]", "Invalid value for '--lr'"),
        ("trust_remote_code: true", "holds only where it is given: --trust-remote-code"),
        ("env: [LD_PRELOAD=x]", "env holds only where it is given: --env"),
        ("config: other.yaml", "'config' is not an option"),
        ("lr: often", "'often' is not a valid float"),
        ("packing: perhaps", "'perhaps' is not a valid boolean"),
        ("r: -1", "--r"),
        ("[" * 5000, "it is not valid YAML"),
        ("a: &a [x]\nb: *b", "it is not valid YAML"),
        ("lr: \x1b[31m1", "it is not valid YAML"),
        ("#" * (MOST_BYTES + 1), "more than 1 MiB"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    said = invoke("--config", write(tmp_path, text), *OF_LAUNCHER, "--dry-run", status=2)
    assert message in " ".join(said.split())
    assert "\x1b" not in said


def test_a_folder_and_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert "there is no such file" in invoke("--config", str(path), "--dry-run", status=2)
    said = invoke("--config", "long" * 100, "--dry-run", status=2)
    assert "File name too long" in said or "there is no such file" in said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.recursive(st.text() | st.none(), st.lists).map(yaml.safe_dump))
def test_any_text_ends_with_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "any.yaml").write_text(text, encoding="utf-8", errors="replace")
    arguments = ["train", "--config", str(tmp_path / "any.yaml"), "--dry-run", "--num-procs", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (0, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_other_commands_take_one(tmp_path: Path) -> None:
    file = write(tmp_path, "model: demo\nbatch_size: 3\ndata: a.jsonl\nnum_samples: 5\n")
    words = worker_words("--config", file, "--num-samples", "7", verb="eval")
    assert words[words.index("--micro-batch-size") + 1] == "3"
    assert words[words.index("--num-samples") + 1] == "7"
    unused = ("--env", "A=1", "--failure-timeout", "9", "--dry-run")
    assert "lorasb: --failure-timeout: not used, since" in invoke(*unused, verb="eval")
    run_json = write(tmp_path, json.dumps({"config": {"lr": 1}}), "run.json")
    assert "does not replay" in invoke("--config", run_json, verb="eval", status=2)
    wrong = write(tmp_path, "output_dir: x\nmethodes: lora\n")
    said = invoke("--config", wrong, verb="compare", status=2)
    assert "'methodes' is not an option of this command; method is." in " ".join(said.split())


def script(*arguments: str, kind: str = "slurm", status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["launch-script", kind, *arguments])
    assert result.exit_code == status, result.output
    return result


def test_a_job_file_takes_the_same_file_as_train(tmp_path: Path) -> None:
    """With its hosts and GPUs; what is for ssh is left out, and that is said."""
    settings = "num_gpus: 4\nnum_nodes: 3\nlr: 1e-3\nmax_restarts: 2\nfailure_timeout: 90\n"
    file = write(tmp_path, f"{settings}no_ssh: false\nnum_procs: ~\n")
    made = script("--config", file)
    assert "#SBATCH --nodes=3\n" in made.stdout
    assert "#SBATCH --gpus-per-node=4\n" in made.stdout
    assert "--num-nodes 3 --num-gpus 4 --node-rank" in made.stdout
    assert "--lr 0.001 --failure-timeout 90.0" in made.stdout
    assert "--max-restarts" not in made.stdout
    assert "lorasb: --max-restarts is left out: the scheduler starts the hosts" in made.stderr
    made = script("--config", file, "--nodes", "2", "--gpus-per-node", "8", "--lr", "1")
    assert "--num-nodes 2 --num-gpus 8 --node-rank" in made.stdout, "what is given wins"
    refused = script("--config", file, "--overwrite", status=2).stderr
    assert "--overwrite would remove the job's own checkpoints" in refused
    k8s = ("--image", "i", "--claim", "c", "--config", file)
    assert yaml.safe_load_all(script(*k8s, kind="k8s").stdout)
    assert (
        "'lrate' is not an option"
        in script("--config", write(tmp_path, "lrate: 1"), status=2).stderr
    )


def test_a_job_file_counts_the_hosts_of_a_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\nc slots=8\n")
    equal = write(tmp_path, "hostfile: hosts\nexclude: c\n")
    assert "--num-nodes 2 --num-gpus 4 --node-rank" in script("--config", equal).stdout
    different = write(tmp_path, "hostfile: hosts\n")
    assert (
        "hosts have 4, 8 slots, and must be equal" in script("--config", different, status=2).stderr
    )
    made = script("--config", different, "--gpus-per-node", "4").stdout
    assert "--num-nodes 3 --num-gpus 4 --node-rank" in made
    assert "Give --hostfile" in script("--include", "a", status=2).stderr


@pytest.mark.parametrize("name", ["one_24gb_gpu", "one_host_8_gpus", "mixture_of_experts"])
def test_a_job_file_has_the_words_of_train(name: str) -> None:
    options = ("--config", str(ROOT / f"docs/examples/{name}.yaml"), "--output-dir", "out")
    assert shlex.join(worker_words(*options)) in script(*options).stdout


def test_a_job_file_for_the_hosts_of_an_example(tmp_path: Path) -> None:
    (tmp_path / "hostfiles").symlink_to(ROOT / "hostfiles")
    made = script("--config", str(ROOT / "docs/examples/two_hosts.yaml"))
    assert "--num-nodes 2 --num-gpus 8 --node-rank" in made.stdout


def as_printed(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["train", *arguments, "--print-config"])
    return yaml.safe_load(result.stdout) or {}


def test_what_is_printed_is_the_same_run(tmp_path: Path) -> None:
    given = ["--data", "a.jsonl", "--data", 'b "c".jsonl', "--data-weights", "1,2", "--lr", "1e-05"]
    given += ["--no-group-by-length", "--load-in-4bit", "--r", "8", "--output-dir", "o: #x"]
    file = write(tmp_path, invoke(*given, *OF_LAUNCHER, "--print-config"))
    assert sorted(worker_words("--config", file)) == sorted(worker_words(*given, *OF_LAUNCHER))
    assert as_printed("--config", file) == as_printed(*given, *OF_LAUNCHER)


def test_what_is_printed_has_every_option_and_its_sentence() -> None:
    assert as_printed() == {}, "nothing was given"
    text = invoke("--print-config")
    for name, field in RunConfig.model_fields.items():
        assert (f"\n#{name}:\n" in text) == (name not in NOT_BY_FILE)
        if len(str(field.description)) < 80 and name not in NOT_BY_FILE:
            assert f"# {field.description}" in text
    headings = [line[5:] for line in text.splitlines() if line.startswith("# == ")]
    assert headings == ["The first day", *SECTIONS, "Hosts and processes"]


def test_the_help_begins_with_the_first_day() -> None:
    lines = invoke("--help").splitlines()
    start = lines.index("The first day:")
    assert not [line for line in lines[:start] if line.lstrip().startswith("--")]
    first = [line.split()[0] for line in lines[start : lines.index("Model:")] if "  --" in line]
    assert first == [
        f"--{'config' if n == 'run_json' else n.replace('_', '-')}" for n in FIRST_DAY_OPTIONS
    ]


def test_names_of_other_trainers(tmp_path: Path) -> None:
    aliases._say.cache_clear()
    said = invoke(
        "--learning_rate", "0.1", "--model_name_or_path", "demo", *OF_LAUNCHER, "--dry-run"
    )
    assert "lorasb: --learning-rate is --lr here" in said
    assert "--model demo" in said
    file = write(tmp_path, "num_train_epochs: 2\nlora_r: 8\noutput_dir: o\nnum_procs: 2\n")
    said = invoke("--config", file, "--dry-run")
    assert "--r 8 --epochs 2.0" in said
    twice = write(tmp_path, "r: 4\nlora_r: 8\n")
    assert "r is there twice" in invoke("--config", twice, "--dry-run", status=2)


def test_aliases_are_no_names_of_ours() -> None:
    ours = {name for command in main.commands.values() for p in command.params for name in p.opts}
    names = {f"--{alias}" for alias in aliases.ALIASES}
    assert not names & ours
    assert {f"--{name}" for name in aliases.ALIASES.values()} <= ours


EXAMPLES = sorted((ROOT / "docs/examples").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=[file.stem for file in EXAMPLES])
def test_examples(file: Path, tmp_path: Path) -> None:
    """Each would start, and fits on what its first line says."""
    (tmp_path / "hostfiles").symlink_to(ROOT / "hostfiles")
    words = worker_words("--config", str(file), "--output-dir", "out")
    assert "--model" in words
    first = file.read_text().splitlines()[0]
    assert f"lorasb train --config docs/examples/{file.name}" in file.read_text()
    content = yaml.load(file.read_text(), yaml.BaseLoader)  # noqa: S506  # texts only
    shape = SHAPES[content["model"]]
    gpus = content.get("num_gpus", 8)
    memory = re.search(r"with (\d+) GB", first)
    cluster = ["--gpus-per-node", str(gpus), "--gpu-memory-gib", memory[1] if memory else "80"]
    cluster += ["--nodes", "2"] if "hostfile" in content else []
    plan = json.loads(invoke("--model", shape, *cluster, *planned(content), "--json", verb="plan"))
    fitting = [found["options"] for found in plan["strategies"] if found["fits"]]
    in_4bit = content.get("load_in_4bit") == "true"
    assert [words for words in fitting if ("--load-in-4bit" in words) == in_4bit], plan


SHAPES = {
    "mistralai/Mistral-7B-v0.3": "mistral-7b",
    "meta-llama/Llama-3.1-70B": "llama-3-70b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
}


def planned(content: dict[str, Any]) -> list[str]:
    names = ("r", "expert_r", "max_length", "micro_batch_size", "init_memory_gib")
    words = to_arguments({name: content[name] for name in names if name in content})
    return [*words, "--gradient-checkpointing"]


def test_the_page_of_other_names_is_true() -> None:
    page = (ROOT / "docs/coming_from.md").read_text()
    bold = {name.replace("_", "-") for name in re.findall(r"\*\*`([a-z_]+)`\*\*", page)}
    assert bold <= set(aliases.ALIASES)
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    for theirs in rows:
        ours = re.findall(r"`([a-z_0-9]+)", theirs[3])
        assert set(ours) <= set(RunConfig.model_fields), theirs
        for name in re.findall(r"\*\*`([a-z_]+)`\*\*", " ".join(theirs[:3])):
            assert aliases.ALIASES[name.replace("_", "-")].replace("-", "_") in ours, theirs
