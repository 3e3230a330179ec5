"""Several hosts on one machine: namespaces of the kernel, joined by a bridge, with an sshd in each.

A host has its own network, process ids, hostname, shared memory and mounts. The files are the
machine's, as on hosts that share them, but for /run, /dev/shm, /etc/hosts, root's .bashrc (empty)
and what a test binds. Nothing has a name on the machine itself, so nothing of a session that
crashed is ever in the way.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tests.runs import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORKS = {"eth0": "10.77.0", "eth1": "10.78.0"}  # hosts' names resolve to eth0's

NAMESPACES = ("--net", "--pid", "--uts", "--ipc", "--mount")
UNSHARE = ("unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child")

# The first process of a host. It ignores the end of its children, so the kernel reaps them and
# every orphan; it ends with its input, which is a pipe: also when this process is killed.
INIT = """
set -e
hostname "$0"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$1" /etc/hosts
if [ -e "$2" ]; then mount --bind /dev/null "$2"; fi
echo ready
exec env --ignore-signal=CHLD cat >/dev/null
"""

SSHD_CONFIG = """
Port 22
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
PermitRootLogin prohibit-password
PermitUserRC no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PrintLastLog no
MaxStartups 100
"""

SSH_CONFIG = """
Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  GlobalKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "hosts need root"
    tools = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter", "setpriv", "mount")
    absent = [tool for tool in tools if not shutil.which(tool, path=SYSTEM_PATH)]
    if absent:
        return f"hosts need {', '.join(absent)}: scripts/setup.sh --nodes"
    attempt = (
        "ip link add type veth && ip link add type bridge && hostname n0"
        " && mount -t tmpfs tmpfs /run && mount --bind /etc/hosts /etc/hosts"
    )
    try:
        _tool(*UNSHARE, "sh", "-c", attempt)
    except RuntimeError as error:
        return f"namespaces are not permitted: {error}"
    return None


class Command(subprocess.Popen[str]):
    """A command inside a host, in a session of its own.

    ``pid`` is nsenter's, which waits outside, ends as the command does and passes no signal on:
    signals go to the command itself. When nsenter dies, so does the command.
    """

    @property
    def inner_pid(self) -> int:
        """The command's process id, and process group, as seen outside: killpg is a Ctrl-C."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        while self.poll() is None:
            if found := children.read_text().split():
                return int(found[0])
            time.sleep(0.01)
        raise ProcessLookupError(f"{self.args!r} has ended with status {self.returncode}")

    def send_signal(self, sig: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.inner_pid, sig)


class Host:
    """One host. Process ids, in and out, are those seen outside of it.

    Attributes:
        name: What it is called and what its name resolves to: n0, n1, …
        address: On eth0. ``addresses`` holds eth1's too.
        pid: Of its first process; another one after ``Hosts.revive``.
    """

    def __init__(self, hosts: Hosts, index: int) -> None:
        self.hosts = hosts
        self.name = f"n{index}"
        self.addresses = {key: f"{network}.{index + 1}" for key, network in NETWORKS.items()}
        self.address = self.addresses["eth0"]
        self.lost = True
        self.bound: list[Path] = []
        self._key = hosts.folder / f"{self.name}.key"

    def run(
        self,
        *argv: str | Path,
        timeout: float = 60,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> str:
        """Run a command to its end; what it printed (both streams).

        Past the time limit, which ``check`` does not excuse, its process group is killed.
        """
        # Not a pipe: what the command leaves behind would hold it open.
        with tempfile.TemporaryFile("w+") as output:
            command = self.popen(*argv, env=env, cwd=cwd, stdout=output)
            try:
                status: int | str = command.wait(timeout)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(command.inner_pid, signal.SIGKILL)
                command.wait()
                status, check = f"none after {timeout} s", True
            output.seek(0)
            text = output.read()
        assert status == 0 or not check, f"{self.name}: {argv}: status {status}:\n{text[-6000:]}"
        return text

    def popen(
        self,
        *argv: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        **options: Any,
    ) -> Command:
        """Start a command in ``Hosts.environment`` and ``env``; both streams go to ``stdout``."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
        return Command(
            [
                *("nsenter", "--target", str(self.pid), *NAMESPACES),
                *("setpriv", "--pdeathsig", "KILL", "setsid", "env", "-C", str(cwd)),
                *map(str, argv),
            ],
            env=self.hosts.environment | dict(env or {}),
            stdin=subprocess.DEVNULL,
            text=True,
            **options,
        )

    def processes(self, marker: str) -> list[int]:
        """The processes in this host whose command line holds the marker; zombies have none."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError):  # it has ended meanwhile
                here = _pid_namespace(int(entry.name)) == self._pid_namespace
                if here and marker in self.command_line(int(entry.name)):
                    found.append(int(entry.name))
        return sorted(found)

    def command_line(self, pid: int) -> str:
        """The words of a process; none if it has ended."""
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            return words.replace(b"\0", b" ").decode(errors="replace").rstrip()
        return ""

    def kill(self, pid: int, signum: int = signal.SIGKILL) -> None:
        """Signal a process of this host."""
        assert _pid_namespace(pid) == self._pid_namespace, f"{pid} is not {self.name}'s"
        os.kill(pid, signum)

    def link(self, up: bool, interface: str | None = None) -> None:
        """Plug one cable, or all of them, in or out: what is sent meanwhile vanishes silently."""
        ports = [self._port(key) for key in NETWORKS if interface in (None, key)]
        _ip(self.hosts.switch_pid, *(f"link set {port} {'up' if up else 'down'}" for port in ports))

    def lose(self) -> None:
        """The power fails: nothing in the host lives on, and nobody is told."""
        self.link(False)
        self._end()

    def bind(self, source: Path, target: Path) -> None:
        """Put another file or folder in a target's place, on this host only. Follows links."""
        self.run("mount", "--bind", source, target)
        self.bound.append(target)

    def unbind(self, target: Path) -> None:
        self.run("umount", "--lazy", target)
        self.bound.remove(target)

    def start_sshd(self) -> None:
        """Start sshd if it is stopped; it listens when this returns."""
        if not self._listeners():
            log = self.hosts.folder / f"{self.name}.sshd.log"
            config = self.hosts.folder / "sshd_config"
            self.run("/usr/sbin/sshd", "-f", config, "-h", self._key, "-E", log)
            wait_until(self._listeners, f"sshd of {self.name} listens, see {log}")

    def stop_sshd(self) -> None:
        """Let no new connection in; those that are open stay."""
        for pid in self._listeners():
            self.kill(pid)
        wait_until(lambda: not self._listeners(), f"sshd of {self.name} ends")

    def _listeners(self) -> list[int]:
        return self.processes("sshd: /usr/sbin/sshd")  # its title once it listens

    def _start(self) -> None:
        """Make the host, whose object stays when it is lost."""
        if not self._key.exists():
            _tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._key))
        names = str(self.hosts.folder / "hosts")
        # What commands over ssh start with is not to depend on whose machine this is.
        shell_rc = f"{pwd.getpwuid(0).pw_dir}/.bashrc"
        command = (*UNSHARE, "sh", "-c", INIT, self.name, names, shell_rc)
        self._holder, self.pid = _first_process(*command)
        self._pid_namespace = _pid_namespace(self.pid)
        self.lost, self.bound = False, []
        outside, inside = [], ["link set lo up"]
        for interface, address in self.addresses.items():
            # The address of the card is always the same: the others remember it.
            card = "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
            peer = f"peer name {interface} address {card} netns {self.pid}"
            outside += [
                f"link add {self._port(interface)} type veth {peer}",
                f"link set {self._port(interface)} master {interface} up",
            ]
            inside += [f"addr add {address}/24 dev {interface}", f"link set {interface} up"]
        _ip(self.hosts.switch_pid, *outside)
        _ip(self.pid, *inside)
        self.start_sshd()

    def _end(self) -> None:
        self.lost = True
        _end(self._holder, self.pid)

    def _port(self, interface: str) -> str:
        """This host's end of the cable in the switch."""
        return f"{interface}.{self.pid}"


class Hosts:
    """Hosts n0, n1, … on two networks, as a context manager; every one can ssh to every one.

    Attributes:
        folder: Of the keys and configuration, and of sshd's logs.
        all: The hosts, in order; ``hosts[i]`` is one of them.
    """

    def __init__(self, num_hosts: int, folder: Path) -> None:
        self.folder = folder
        self.all = [Host(self, index) for index in range(num_hosts)]
        self._stack = ExitStack()

    def __getitem__(self, index: int) -> Host:
        return self.all[index]

    def __enter__(self) -> Hosts:
        self._write_files()
        with ExitStack() as stack:  # what was made goes if the rest fails
            script = "echo ready; exec cat >/dev/null"
            flags = ("--net", "--fork", "--kill-child")
            holder, self.switch_pid = _first_process("unshare", *flags, "sh", "-c", script)
            stack.callback(_end, holder, self.switch_pid)
            _ip(self.switch_pid, *(f"link add {key} up type bridge" for key in NETWORKS))
            for host in self.all:
                stack.callback(self._end, host)
                host._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """What commands in hosts start with; what comes in over ssh has sshd's own."""
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{SYSTEM_PATH}"
        names = ("HOME", "LORASB_CACHE", "TORCH_EXTENSIONS_DIR")
        passed = {key: os.environ[key] for key in names if key in os.environ}
        return passed | {
            "PATH": path,
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",
        }

    def revive(self, host: Host) -> None:
        """Make a lost host anew, with its name, addresses and keys."""
        assert host.lost, f"{host.name} is not lost"
        host._start()

    def mend(self) -> None:
        """Undo what a test may have done: lost hosts, cables, bound files, stopped sshds."""
        for host in self.all:
            if host.lost:
                self.revive(host)
            else:
                host.link(True)
                for target in reversed(host.bound.copy()):
                    host.unbind(target)
                host.start_sshd()

    @staticmethod
    def _end(host: Host) -> None:
        if not host.lost:
            host._end()

    def _write_files(self) -> None:
        _tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "id"))
        shutil.copy(self.folder / "id.pub", self.folder / "authorized_keys")
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        names = "".join(f"{host.address} {host.name}\n" for host in self.all)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{names}")
        # First on PATH, so that everything that calls ssh leaves ~/.ssh alone.
        wrapper = self.folder / "bin/ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)


def _pid_namespace(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def _tool(*argv: str, text: str = "") -> None:
    """Run one of the system's tools on the machine itself."""
    done = subprocess.run(
        argv, input=text, env={"PATH": SYSTEM_PATH}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        message = (done.stderr + done.stdout).strip()
        raise RuntimeError(f"{argv[0]}: status {done.returncode}: {message[-2000:]}")


def _ip(pid: int, *lines: str) -> None:
    """Run lines of ip in the network of a process."""
    _tool("nsenter", "--target", str(pid), "--net", "ip", "-batch", "-", text="\n".join(lines))


def _first_process(*unshare: str) -> tuple[subprocess.Popen[str], int]:
    """Start unshare with a command that prints "ready"; unshare's process, the command's id."""
    # The command's input is never written to: it ends when this process closes it or dies.
    holder = subprocess.Popen(
        unshare,
        env={"PATH": SYSTEM_PATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert holder.stdout
    with holder.stdout:
        if (said := holder.stdout.readline()) != "ready\n":
            holder.kill()
            holder.communicate()
            raise RuntimeError(f"a host does not start: {said}")
    return holder, int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())


def _end(holder: subprocess.Popen[str], pid: int) -> None:
    """Kill the first process of a namespace, and with it the whole namespace."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with holder:  # waits, and closes the pipe
        pass
