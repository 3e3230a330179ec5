"""Hostfiles, and what is chosen of them, as DeepSpeed reads them; Slurm's lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.runner import (
    apply_num_nodes_and_gpus,
    fetch_hostfile,
    parse_inclusion_exclusion,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher.hosts.hostfile import read_hostfile, select, write_hostfile
from launcher.hosts.slurm import expand_hostlist, from_slurm, slurm_slots
from lorasb_ds.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[3] / "hostfiles"
HOSTS = {"node-1": 4, "node-2": 2, "10.0.0.3": 4}


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A ConfigError that holds every part, and says what to do: it has a second sentence."""
    with pytest.raises(ConfigError) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)
    assert all(re.search(r"\. [A-Z]", problem) for problem in caught.value.problems)


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    return tmp_path / "hostfile"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a slots=1", {"a": 1}),
        ("b slots=2\na slots=1024\n", {"b": 2, "a": 1024}),
        (" a\t slots=08 # old\r\n\r\n# ü\r\n10.0.0.1 slots=2#c", {"a": 8, "10.0.0.1": 2}),
        ("n_1.x-y slots=1\rB slots=1\n  # slots=0\n", {"n_1.x-y": 1, "B": 1}),
    ],
)
def test_read(hostfile: Path, text: str, hosts: dict[str, int]) -> None:
    hostfile.write_bytes(text.encode())
    found = read_hostfile(str(hostfile))
    assert list(found.items()) == list(hosts.items()) == list(fetch_hostfile(hostfile).items())


@pytest.mark.parametrize(
    ("content", "line", "column", "problem"),
    [
        (b"a;reboot slots=1", 1, 2, "';' in a host's name. Names go through a remote shell"),
        (b"# \n a$(x) slots=1", 2, 3, "'$' in"),
        (b"`x` slots=1", 1, 1, "'`' in"),
        (b"a'b slots=1", 1, 2, '"\'" in'),
        (b'a"b slots=1', 1, 2, "'\"' in"),
        (b"root@a slots=1", 1, 5, "'@' in"),
        (b"a:22 slots=1", 1, 2, "':' in"),
        (b"-oProxyCommand=x slots=1", 1, 1, "'-' at the start in"),
        (b".a slots=1", 1, 1, "'.' at the start in"),
        ("ä slots=1".encode(), 1, 1, "'\\xe4' in"),
        ("a\u00a0slots=1".encode(), 1, 2, "'\\xa0' in"),
        ("\ufeffa slots=1".encode(), 1, 1, "'\\ufeff' in"),
        (b"a\x0b slots=1", 1, 2, "'\\x0b' in"),
        (b"a", 1, 2, "no slots after a. Add"),
        (b"a  # slots=8", 1, 2, "no slots after a"),
        (b"a slots=0", 1, 3, "'slots=0' is not from 1 to 1024"),
        (b"a slots=1025", 1, 3, "'slots=1025' is not from 1 to 1024"),
        (b"a slots=" + b"9" * 9999, 1, 3, "99…' is not from 1 to 1024"),
        (b"a slots=-1", 1, 3, "'slots=-1' is not `slots=` and a number"),
        (b"a slots=4x", 1, 3, "'slots=4x' is not"),
        ("a slots=\u0664".encode(), 1, 3, "is not `slots=` and a number"),
        (b"a slots = 4", 1, 3, "'slots' is not"),
        (b"a 4", 1, 3, "'4' is not"),
        (b"a slots=4 max_slots=8", 1, 11, "'max_slots=8' after the entry. Remove it"),
        (b"a slots=4 b slots=4", 1, 11, "'b' after the entry"),
        (b"a slots=4\n\nb slots=4\na slots=2", 4, 1, "line 1 names a already"),
        (b"Node slots=4\n node slots=2", 2, 2, "line 1 names node already"),
        (b"a slots=4 # \0", 1, 13, "a NUL byte"),
        (b"a slots=4\n# \xc3\xa4 \xff", 2, 5, "a byte that is not UTF-8"),
        ("a slots=4".encode("utf-16"), 1, 1, "a byte that is not UTF-8"),
    ],
)
def test_bad_lines(hostfile: Path, content: bytes, line: int, column: int, problem: str) -> None:
    hostfile.write_bytes(content)
    where = f"--hostfile {hostfile}, line {line}, column {column}: "
    with refused(where, problem, "A line is `host slots=N`."):
        read_hostfile(str(hostfile))


def test_all_problems_at_once(hostfile: Path) -> None:
    hostfile.write_text("a\nb slots=0\nc slots=1\nc slots=1\n" + 40 * "x;\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(str(hostfile))
    *problems, last = caught.value.problems
    assert [int(re.findall(r"line (\d+), column", p)[0]) for p in problems] == [1, 2, *range(4, 22)]
    assert last.endswith("so for 23 more lines.")


def test_no_hosts(tmp_path: Path, hostfile: Path) -> None:
    with refused("--hostfile nowhere: there is no such file", "host slots=N"):
        read_hostfile("nowhere")
    for name in (str(tmp_path), "/dev/null"):
        with refused(f"--hostfile {name}: this is not a file"):
            read_hostfile(name)
    for text in ("", "# none\n\n"):
        hostfile.write_text(text)
        with refused("names no host. Add lines"):
            read_hostfile(str(hostfile))


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True)
POOLS = st.dictionaries(NAMES, st.integers(1, 9), min_size=1, max_size=5)
NEAR_LINES = st.lists(
    st.tuples(
        NAMES | st.text(max_size=3), st.sampled_from(" \t;"), st.text("slot=0123 #", max_size=9)
    )
    .map("".join)
    .flatmap(lambda line: st.sampled_from([line, f"{line} slots=3", "# " + line])),
    max_size=4,
).map("\n".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary() | st.text().map(str.encode) | NEAR_LINES.map(str.encode))
@example(content=b"a slots=1\x1cb slots=2")
@example(content=b"a slots=1\xe2\x80\xa8b slots=2")
@example(content=b"a slots=1 #\x0b\nb slots=2")
def test_what_is_accepted_deepspeed_reads_alike(hostfile: Path, content: bytes) -> None:
    hostfile.write_bytes(content)
    try:
        hosts = read_hostfile(str(hostfile))
    except ConfigError:
        return
    assert list(hosts.items()) == list(fetch_hostfile(hostfile).items())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pool=POOLS)
def test_what_is_written_is_read(hostfile: Path, pool: dict[str, int]) -> None:
    pool = {host.lower(): slots for host, slots in pool.items()}
    hostfile.write_text(write_hostfile(pool))
    assert list(read_hostfile(str(hostfile)).items()) == list(pool.items())


def test_examples() -> None:
    pools = {file.name: read_hostfile(str(file)) for file in EXAMPLES.iterdir()}
    assert pools.keys() == {"one_host", "two_hosts", "four_hosts", "slurm"}
    assert pools["one_host"] == {"localhost": 8}
    assert pools["two_hosts"] == {"node-1": 8, "node-2": 8}
    assert list(pools["four_hosts"].values()) == [8, 8, 4, 2]
    slurm = {"SLURM_JOB_NODELIST": "gpu[01-03,07]", "SLURM_GPUS_PER_NODE": "8"}
    assert (EXAMPLES / "slurm").read_text().endswith("\n" + write_hostfile(from_slurm(slurm)))


@st.composite
def filters(draw: st.DrawFn) -> tuple[dict[str, int], str]:
    """Hosts, and a filter of them that names each as a whole or by slots, perhaps repeatedly."""
    pool = draw(POOLS)
    specs = []
    for host in draw(st.lists(st.sampled_from(sorted(pool)), min_size=1, unique=True)):
        groups = st.lists(st.integers(0, pool[host] - 1), min_size=1, max_size=4)
        of_slots = groups.map(lambda ids, host=host: f"{host}:{','.join(map(str, ids))}")
        specs += draw(st.just([host]) | st.lists(of_slots, min_size=1, max_size=2))
    return pool, "@".join(draw(st.permutations(specs)))


@given(drawn=filters(), option=st.sampled_from(["include", "exclude"]))
def test_filters_as_deepspeed_has_them(drawn: tuple[dict[str, int], str], option: str) -> None:
    pool, text = drawn
    include, exclude = (text, "") if option == "include" else ("", text)
    expected = parse_inclusion_exclusion(pool, include, exclude)
    if not expected:
        with refused("--exclude leaves no slot"):
            select(pool, include, exclude)
    else:
        assert list(select(pool, include, exclude).items()) == list(expected.items())


@given(pool=POOLS, data=st.data())
def test_counts_as_deepspeed_has_them(pool: dict[str, int], data: st.DataObject) -> None:
    nodes = data.draw(st.none() | st.integers(1, len(pool)))
    slots = data.draw(st.none() | st.integers(1, min(pool.values())))
    everything = parse_inclusion_exclusion(pool, "", "")
    expected = apply_num_nodes_and_gpus(everything, nodes or -1, slots or -1)
    assert list(select(pool, "", "", nodes, slots).items()) == list(expected.items())


@given(
    text=st.text() | st.text("abc@:,0129-", max_size=12),
    option=st.sampled_from(["include", "exclude"]),
)
def test_any_filter_is_taken_or_refused(text: str, option: str) -> None:
    pool = {"a": 2, "b": 1, "c": 3}
    try:
        chosen = select(pool, **{option: text})
    except ConfigError:
        return
    include, exclude = (text, "") if option == "include" else ("", text)
    assert chosen == parse_inclusion_exclusion(pool, include, exclude)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"include": "a", "exclude": "a"}, "--include and --exclude exclude each other. Give one"),
        ({"include": "node-3"}, "there is no host node-3. There are node-1, node-2, 10.0.0.3."),
        ({"exclude": "node-2:0@x"}, "--exclude: there is no host x"),
        ({"include": "node-2:0,2"}, "--include: node-2 has no slot 2. Its slots are 0 to 1."),
        ({"exclude": "node-2:0,1@node-1@10.0.0.3"}, "--exclude leaves no slot. Name fewer hosts."),
        ({"include": "node-2:"}, "'node-2:' is not HOST or HOST:SLOT,SLOT"),
        ({"include": "node-2:0@"}, "'' is not HOST"),
        ({"include": "node-2:-1"}, "'node-2:-1' is not HOST"),
        ({"include": "node-2:0:1"}, "'node-2:0:1' is not HOST"),
        ({"include": "node-1 @node-2"}, "'node-1 ' is not HOST"),
        ({"include": "node-1@node-1:0"}, "--include names node-1 both whole and by slots"),
        ({"num_nodes": 4}, "--num-nodes 4, but the hostfile has 3: node-1, node-2, 10.0.0.3."),
        ({"num_nodes": 0}, "--num-nodes 0 is below 1"),
        ({"num_slots": 3}, "--num-gpus 3, but node-2 has 2. Lower it"),
        ({"num_slots": 3, "slots_option": "--num-procs"}, "--num-procs 3, but node-2 has 2"),
        ({"num_slots": -1}, "--num-gpus -1 is below 1"),
    ],
)
def test_bad_choices(arguments: dict[str, Any], problem: str) -> None:
    with refused(problem):
        select(HOSTS, **arguments)


def test_only_the_chosen_hosts_need_the_slots() -> None:
    assert select(HOSTS, num_nodes=1, num_slots=3) == {"node-1": [0, 1, 2]}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("gpu[01-03,07],login1", ["gpu01", "gpu02", "gpu03", "gpu07", "login1"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("n[8-11]-ib,x[5].y", ["n8-ib", "n9-ib", "n10-ib", "n11-ib", "x5.y"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("b,a[2,1]", ["b", "a2", "a1"]),
    ],
)
def test_hostlist(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' in the list"),
        ("a,", "'' in the list"),
        ("a[1-2", "'[' in the list of hosts 'a[1-2'"),
        ("a1-2]", "'a1-2]' in the list"),
        ("a[]", "'[]' in the list"),
        ("a[2-1]", "'[2-1]' in the list"),
        ("a[1-]", "'[1-]' in the list"),
        ("a[1,,2]", "'[1,,2]' in the list"),
        ("a[[1]]", "in the list"),
        ("a[x-z]", "'[x-z]' in the list"),
        ("a[1-2]$(x)", "'a[1-2]$(x)' in the list"),
        ("-a", "'-a' in the list"),
        ("a b", "'a b' in the list"),
        ("a,b,a", "names one twice. Name each once."),
        ("a[1-2,2]", "names one twice"),
        ("a[1-65537]", "more than 65536. Shorten it."),
        ("a[1-999999999999999999]", "more than 65536. Shorten it."),
        ("a[0-999][0-999]", "more than 65536. Shorten it."),
        ("a[1-40000],b[1-40000]", "more than 65536. Shorten it."),
    ],
)
def test_bad_hostlists(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        expand_hostlist(text)


@given(st.text() | st.text("ab[]0123,-x()", max_size=15))
def test_any_list_is_taken_or_refused(text: str) -> None:
    for parse in (expand_hostlist, slurm_slots):
        with suppress(ConfigError):
            assert 1 <= len(parse(text)) <= 65536


def test_slurm_slots() -> None:
    assert slurm_slots("8(x3),4") == [8, 8, 8, 4]
    assert slurm_slots("2") == [2]
    for text in ("", "8(x0)", "0", "1025", "8(x65537)", "4,8(x65536)", "8(3)", "-1", "a", "8,"):
        with refused("is not as in 8(x3),4", "Give --slots N."):
            slurm_slots(text)


@pytest.mark.parametrize(
    ("environment", "slots"),
    [
        ({"GPUS_PER_NODE": "4"}, [4, 4]),
        ({"GPUS_PER_NODE": "a100:4", "GPUS_ON_NODE": "8"}, [4, 4]),
        ({"GPUS_PER_NODE": "gpu:a100:4"}, [4, 4]),
        ({"GPUS_PER_NODE": "", "GPUS_ON_NODE": "8", "NTASKS_PER_NODE": "1"}, [8, 8]),
        ({"NTASKS_PER_NODE": "3", "TASKS_PER_NODE": "1(x2)"}, [3, 3]),
        ({"TASKS_PER_NODE": "8,4"}, [8, 4]),
        ({"TASKS_PER_NODE": "8(x2)"}, [8, 8]),
    ],
)
def test_from_slurm(environment: dict[str, str], slots: list[int]) -> None:
    given = {f"SLURM_{name}": value for name, value in environment.items()}
    for variable in ("SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        found = from_slurm({**given, variable: "n[1-2]"})
        assert list(found.items()) == list(zip(["n1", "n2"], slots, strict=True))
        assert from_slurm({**given, variable: "n[1-2]"}, slots=5) == {"n1": 5, "n2": 5}


@pytest.mark.parametrize(
    ("environment", "slots", "problem"),
    [
        ({}, 8, "This is not a Slurm allocation: SLURM_JOB_NODELIST is not set. Run it by salloc"),
        ({"JOB_NODELIST": "n[1-2]"}, None, "Give --slots N."),
        ({"JOB_NODELIST": "n[1-2]", "TASKS_PER_NODE": "8"}, None, "counts 1 hosts, but"),
        ({"JOB_NODELIST": "n[1-2]", "GPUS_ON_NODE": "8(x3)"}, None, "counts 3 hosts, but"),
        ({"JOB_NODELIST": "n1", "GPUS_PER_NODE": "a100"}, None, "SLURM_GPUS_PER_NODE=a100: 'a100'"),
        ({"JOB_NODELIST": "n1"}, 0, "--slots 0 is not from 1 to 1024"),
        ({"JOB_NODELIST": "n[1"}, 8, "'[' in the list of hosts 'n[1'"),
    ],
)
def test_no_slots_from_slurm(environment: dict[str, str], slots: int | None, problem: str) -> None:
    with refused(problem):
        from_slurm({f"SLURM_{name}": value for name, value in environment.items()}, slots)


def test_numbers_count_what_a_filter_leaves() -> None:
    assert select(HOSTS, exclude="node-1", num_nodes=1) == {"node-2": [0, 1]}
    assert select(HOSTS, exclude="node-1:0", num_slots=2)["node-1"] == [1, 2]
    with refused("--num-nodes 3, but --exclude leaves 2: node-2, 10.0.0.3"):
        select(HOSTS, exclude="node-1", num_nodes=3)
