"""Tokenized once: the cache, its key, and what happens to it; several sources; held-out rows."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data import cache as data_cache
from lorasb_ds.data.cache import tokenize_sources
from lorasb_ds.data.dataset import TokenizedRows, tokenize_rows
from lorasb_ds.data.run_rows import load_data, split_rows
from lorasb_ds.data.template import fix_date
from lorasb_ds.errors import ConfigError
from tests.runs import run_ranks, word_rows, write_jsonl


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """The folder of tokenized rows, empty."""
    before = os.environ["LORASB_CACHE"]
    os.environ["LORASB_CACHE"] = str(tmp_path / "cache")
    yield tmp_path / "cache" / "tokenized"
    # Not by monkeypatch: datasets puts a copy in the place of os.environ, and it restores the old.
    os.environ["LORASB_CACHE"] = before


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of tables as they are made."""
    keys: list[str] = []
    make = data_cache._make

    def recorded(folder: Path, **more: Any) -> None:
        keys.append(more["key"])
        make(folder, **more)

    monkeypatch.setattr(data_cache, "_make", recorded)
    return keys


def tokenized(source: str, tokenizer: Any, **options: Any) -> TokenizedRows:
    rows, notes = tokenize_sources((source,), tokenizer, RunConfig(**options))
    assert notes == []
    return rows


def same(a: TokenizedRows, b: TokenizedRows) -> bool:
    return list(a.examples) == list(b.examples) and (a.digest, a.counts) == (b.digest, b.counts)


ROWS = [*word_rows(5), {"question": "none"}, {"text": "a b c"}, {"title": 1}, *word_rows(2)]


def test_the_second_time_it_is_read(
    tokenizer: Any, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first = tokenized(path, tokenizer)
    assert same(first, tokenize_rows(ROWS, tokenizer, RunConfig()))
    assert first.row_numbers.tolist() == [1, 2, 3, 4, 5, 7, 9, 10]
    assert first.row_id(6) == "rows.jsonl:9"
    assert [f.name for f in cache.iterdir() if f.is_dir()] == made
    second = tokenized(path, tokenizer)
    assert same(first, second)
    assert first.describe() == second.describe()
    elsewhere = shutil.copy(path, tmp_path / "copy.jsonl")
    assert same(first, tokenized(str(elsewhere), tokenizer))
    assert len(made) == 1


def test_what_matters_changes_the_key(
    tokenizer: Any, tmp_path: Path, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    other_template = copy.deepcopy(tokenizer)
    other_template.chat_template += "{# other #}"
    other_eos = copy.deepcopy(tokenizer)
    other_eos.eos_token = "<|endoftext|>"  # noqa: S105
    tokenized(path, tokenizer)
    for options in (
        {"max_length": 512},
        {"loss_on": "last"},
        {"truncation": "left"},
        {"prompt_column": "question"},
        {"response_column": "answer"},
    ):
        tokenized(path, tokenizer, **options)
    tokenized(path, other_template)
    tokenized(path, other_eos)
    task = "reasoning-gym:chain_sum?size=3"
    tokenized(task, tokenizer)
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    tokenized(task, tokenizer)
    write_jsonl(tmp_path / "rows.jsonl", ROWS[1:])
    tokenized(path, tokenizer)
    for count in (2, 3):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        datasets.Dataset.from_list(word_rows(count)).save_to_disk(tmp_path / "saved")
        tokenized(str(tmp_path / "saved"), tokenizer)
    assert len(set(made)) == len(made) == 13
    tokenized(path, tokenizer, r=8, seed=7, dataset_num_proc=2)
    assert len(made) == 13, "what does not matter leaves it"


def damage_nothing_left(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def damage_cut_off(folder: Path) -> None:
    (file,) = folder.glob("*.arrow")
    os.truncate(file, file.stat().st_size // 2)


def damage_at_the_same_size(folder: Path) -> None:
    (file,) = folder.glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def damage_cut_off_with_its_meta_data(folder: Path) -> None:
    """Only Arrow can tell."""
    damage_cut_off(folder)
    believe_digests(folder)


def damage_rows_missing(folder: Path) -> None:
    """As a file that is cut off between two batches."""
    meta = (folder / "lorasb.json").read_text()
    datasets.load_from_disk(folder).select(range(5)).save_to_disk(folder.with_suffix(".less"))
    shutil.rmtree(folder)
    folder.with_suffix(".less").rename(folder)
    (folder / "lorasb.json").write_text(meta)
    believe_digests(folder)


def believe_digests(folder: Path) -> None:
    meta = json.loads((folder / "lorasb.json").read_text())
    meta["digests"] = data_cache._digests(folder)
    (folder / "lorasb.json").write_text(json.dumps(meta))


def damage_meta_data(folder: Path) -> None:
    (folder / "lorasb.json").write_text('{"key": ')


def damage_foreign(folder: Path) -> None:
    shutil.rmtree(folder)
    datasets.Dataset.from_list(word_rows(3)).save_to_disk(folder)
    (folder / "lorasb.json").write_text("[]")


def damage_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def damage_half_written(folder: Path) -> None:
    """As a process leaves it that is killed while it writes."""
    folder.rename(folder.with_suffix(".tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_left,
        damage_cut_off,
        damage_at_the_same_size,
        damage_cut_off_with_its_meta_data,
        damage_rows_missing,
        damage_meta_data,
        damage_foreign,
        damage_a_file,
        damage_half_written,
    ],
)
def test_a_torn_entry_is_made_again(
    tokenizer: Any, tmp_path: Path, cache: Path, made: list[str], damage: Any
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = tokenize_rows(ROWS, tokenizer, RunConfig())
    tokenized(path, tokenizer)
    damage(cache / made[0])
    assert same(tokenized(path, tokenizer), expected)
    assert len(made) == 2
    assert same(tokenized(path, tokenizer), expected)
    assert len(made) == 2, "and then it is whole"


def test_a_cache_that_cannot_be_written(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path / "file"))
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    rows, notes = tokenize_sources((path, path), tokenizer, RunConfig())
    assert len(notes) == 1
    assert "cannot be written (Not a directory)" in notes[0]
    expected = tokenize_rows([*ROWS, *ROWS], tokenizer, RunConfig())
    assert same(rows, expected)


def test_another_users_cache_is_read(
    tokenizer: Any, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    """Its files are everybody's to read, and its lock, which is not, is left alone."""
    source = write_jsonl(tmp_path / "rows.jsonl", word_rows(5))
    before = os.umask(0o022)
    first = tokenized(source, tokenizer)
    os.umask(before)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    (lock,) = (path for path in files if path.suffix == ".lock")
    lock.unlink()
    lock.mkdir()  # cannot be opened, not even by root
    assert same(tokenized(source, tokenizer), first)
    assert len(made) == 1


def test_a_lock_that_is_held(
    tokenizer: Any,
    tmp_path: Path,
    cache: Path,
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a process that was suspended, for example: the wait is said, and has an end."""
    source = write_jsonl(tmp_path / "rows.jsonl", word_rows(5))
    first = tokenized(source, tokenizer)
    (table,) = (path for path in cache.iterdir() if path.is_dir())
    shutil.rmtree(table)
    monkeypatch.setattr(data_cache, "WORTH_SAYING_S", 0.1)
    monkeypatch.setattr(data_cache, "LONGEST_WAIT_S", 0.2)
    with FileLock(table.with_suffix(".lock")):
        rows, notes = tokenize_sources((source,), tokenizer, RunConfig())
    assert same(rows, first)
    assert f"lorasb: waiting for {table}.lock" in capsys.readouterr().out
    assert "is locked by a process that has not tokenized these rows" in notes[0]
    assert len(made) == 2
    assert not table.exists()
    assert same(tokenized(source, tokenizer), first)
    assert table.exists(), "the lock was released, not held by the one that waited"


def test_all_rows_skipped_is_an_error_every_time(
    tokenizer: Any, tmp_path: Path, cache: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": None}] * 3)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"--eval-data .*no row is left.*3 skipped: no resp"):
            tokenize_sources((path,), tokenizer, RunConfig(), "--eval-data")
    assert not [f for f in cache.iterdir() if f.is_dir()]


def test_a_full_disk_leaves_nothing_behind(
    tokenizer: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it writes, that is; the cache is passed over then."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_json = data_cache.write_json

    def full(file: Path, content: object) -> None:
        if file.is_relative_to(cache):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(file, content)

    monkeypatch.setattr(data_cache, "write_json", full)
    rows, notes = tokenize_sources((path,), tokenizer, RunConfig())
    assert "cannot be written (No space left on device)" in notes[0]
    assert same(rows, tokenize_rows(ROWS, tokenizer, RunConfig()))
    assert not [f for f in cache.iterdir() if f.is_dir()]


def test_of_two_processes_one_does_the_work(
    demo_model: Path, tokenizer: Any, tmp_path: Path, cache: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    run_ranks("tokenize_at_once", 2, model=str(demo_model), data=path, out=str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    expected = tokenize_rows(ROWS, tokenizer, RunConfig())
    assert sorted(told["made"] for told in found) == [0, 1]
    assert all(told["rows"] == [expected.digest, len(expected.examples), []] for told in found)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
def test_worker_processes_give_the_same(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    rows = [*word_rows(250), {"question": "none"}, *word_rows(150)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = tokenized(path, tokenizer, dataset_num_proc=2)
    assert same(found, tokenize_rows(rows, tokenizer, RunConfig()))
    assert found.row_numbers.tolist() == [*range(1, 251), *range(252, 402)]


def test_long_work_is_announced_and_shared(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    rows = word_rows(50)
    assert data_cache._num_proc(rows, tokenizer, RunConfig(), "--data x") == 1
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(data_cache, "WORTH_A_WORKER_S", 1e-9)
    monkeypatch.setattr(data_cache, "WORTH_SAYING_S", 0)
    assert data_cache._num_proc(rows, tokenizer, RunConfig(), "--data x") == 4
    assert "tokenizing 50 rows of --data x in 4 process(es)" in capsys.readouterr().out
    assert data_cache._num_proc(rows, tokenizer, RunConfig(dataset_num_proc=3), "--data x") == 3


def test_several_sources(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    table = datasets.Dataset.from_list(word_rows(3))
    table.to_csv(tmp_path / "rows.csv")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    sources = (
        write_jsonl(tmp_path / "a" / "rows.jsonl", ROWS),
        str(tmp_path / "rows.csv"),
        str(tmp_path / "saved"),
        "reasoning-gym:chain_sum?size=2",
        write_jsonl(tmp_path / "b" / "rows.jsonl", word_rows(1)),
    )
    rows, _ = tokenize_sources(sources, tokenizer, RunConfig())
    assert rows.source_sizes == (8, 3, 3, 2, 1)
    one_by_one = [tokenized(source, tokenizer) for source in sources]
    assert list(rows.examples) == [e for one in one_by_one for e in one.examples]
    assert rows.counts == sum((one.counts for one in one_by_one), start=type(rows.counts)())
    assert [rows.row_id(i) for i in (7, 8, 13, 15, 16)] == [
        f"{sources[0]}:10",
        "rows.csv:1",
        f"{sources[2]}:3",
        "reasoning-gym:chain_sum?size=2:2",
        f"{sources[4]}:1",
    ]
    part = rows.select([16, 3, 8, 9])
    assert part.source_sizes == (1, 2, 0, 0, 1)
    assert part.row_id(1) == f"{sources[0]}:4"


@given(
    num_rows=st.integers(2, 300),
    val_set_size=st.floats(0.001, 0.9) | st.integers(1, 200).map(float),
    seed=st.integers(0, 2**40),
)
def test_every_row_is_trained_on_or_held_out(num_rows: int, val_set_size: float, seed: int) -> None:
    wanted = val_set_size if val_set_size >= 1 else max(1, round(val_set_size * num_rows))
    if wanted >= num_rows:
        with pytest.raises(ConfigError, match="leave none to train on"):
            split_rows(num_rows, val_set_size, seed)
        return
    train, held_out = split_rows(num_rows, val_set_size, seed)
    assert len(held_out) == wanted
    assert sorted([*train, *held_out]) == list(range(num_rows))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    again = split_rows(num_rows, val_set_size, seed)
    assert (again[0] == train).all()


def test_the_seed_decides_what_is_held_out() -> None:
    splits = {tuple(split_rows(1000, 0.01, seed)[1]) for seed in range(5)}
    assert len(splits) == 5


def test_data_of_a_run(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    whole = tokenized(path, tokenizer)
    train, held_out, init, notes = load_data(load_run_config({"data": path}), tokenizer)
    assert (held_out, notes) == (None, [])
    assert same(train, whole)
    assert init is train
    config = load_run_config({"data": path, "val_set_size": 3})
    train, held_out, init, notes = load_data(config, tokenizer)
    assert held_out is not None
    assert init is train, "what is held out is not in the init's sample either"
    assert (len(train.examples), len(held_out.examples)) == (5, 3)
    examples = [*train.examples, *held_out.examples]
    assert sorted(map(str, examples)) == sorted(map(str, whole.examples))
    assert notes == [f"rows: {whole.describe()}; 3 of them held out (--val-set-size 3)"]
    assert "8 kept, 2 skipped: no known columns" in notes[0]
    eval_data = write_jsonl(tmp_path / "other.jsonl", word_rows(2))
    config = load_run_config({"data": path, "eval_data": eval_data})
    train, held_out, _, _ = load_data(config, tokenizer)
    assert held_out is not None
    assert (len(train.examples), len(held_out.examples)) == (8, 2)


def test_rows_for_the_init(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    """From several sources, by the options of --data's; what is held out stays out of them."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    others = [{"problem": f"{i} + {i}", "solution": str(2 * i)} for i in range(4)]
    other = write_jsonl(tmp_path / "other.jsonl", others)
    options = {"max_length": 32, "loss_on": "all"}
    given = {"data": path, "init_data": [other, path], "val_set_size": 3.0, **options}
    train, held_out, init, _ = load_data(load_run_config(given), tokenizer)
    assert held_out is not None
    apart = load_data(load_run_config(given | {"init_data": None}), tokenizer)
    assert same(train, apart.train)
    assert same(held_out, apart.held_out)
    seen = [str(example) for example in held_out.examples]
    expected = [
        *tokenized(other, tokenizer, **options).examples,
        *(e for e in tokenized(path, tokenizer, **options).examples if str(e) not in seen),
    ]
    assert list(init.examples) == expected
    assert len(init.examples) <= 4 + 8 - 3
    assert init.source_sizes[0] == 4
    left_out = [ROWS[number - 1] for number in held_out.row_numbers]
    gone = write_jsonl(tmp_path / "gone.jsonl", left_out)
    with pytest.raises(ConfigError, match=r"gone\.jsonl: all of its rows are held out by --val"):
        load_data(load_run_config(given | {"init_data": gone}), tokenizer)
    with pytest.raises(ConfigError, match=r"--init-data .*none\.jsonl"):
        load_data(load_run_config(given | {"init_data": "none.jsonl"}), tokenizer)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(demo_model: Path, tmp_path: Path, cache: Path) -> None:
    """25,000 more rows of 40 tokens would take some 70 MB as Python's lists of ids and labels."""

    def grown(num_rows: int) -> float:
        rows = ({"text": f"row {i} " + "violet indigo " * 10} for i in range(num_rows))
        large = write_jsonl(tmp_path / f"{num_rows}.jsonl", list(rows))
        out = tmp_path / f"{num_rows}.json"
        files = {"small": small, "large": large, "out": str(out)}
        run_ranks("memory_of_tokenizing", 1, model=str(demo_model), **files)
        found, mib = json.loads(out.read_text())
        assert found == num_rows
        return mib

    small = write_jsonl(tmp_path / "small.jsonl", [{"text": "b " * 30}] * 3000)
    assert grown(30_000) - grown(5_000) < 20


DATED = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"


def test_notes_are_kept_with_the_table(
    tokenizer: Any, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    rows = [{**row, "id": 7} for row in word_rows(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        _, notes = tokenize_sources((path, path), tokenizer, RunConfig())
        assert notes == [f"{path}: left out of the rows: id (3 rows)"]
    assert len(made) == 1


def test_a_table_is_of_its_date_where_the_template_writes_it(
    tokenizer: Any, tmp_path: Path, cache: Path, made: list[str]
) -> None:
    """A run that goes on the next day reads the rows that it began with."""
    path = write_jsonl(tmp_path / "rows.jsonl", word_rows(3))
    digests = []
    for day in ("2024-07-26", "2025-01-02", "2024-07-26"):
        dated = copy.deepcopy(tokenizer)
        dated.chat_template = DATED
        fix_date(dated, date.fromisoformat(day))
        digests.append(tokenize_sources((path,), dated, RunConfig())[0].digest)
        fix_date(tokenizer := copy.deepcopy(tokenizer), date.fromisoformat(day))
        tokenize_sources((path,), tokenizer, RunConfig())
    assert digests[0] == digests[2] != digests[1]
    assert len(made) == 3, "two of the template with a clock, one of that without"


def test_the_date_is_in_the_fingerprint_where_it_is_in_the_text(tokenizer: Any) -> None:
    prints = []
    plain = tokenizer.chat_template
    for template in (DATED, plain, {"default": plain, "tool_use": DATED}):
        dated = copy.deepcopy(tokenizer)
        dated.chat_template = template
        for day in (date(2024, 7, 26), date(2025, 1, 2)):
            fix_date(dated, day)
            prints.append(data_cache._tokenizer_fingerprint(dated))
    assert len(set(prints)) == 5
    assert prints[2] == prints[3], "a template without a clock: the same tables every day"
