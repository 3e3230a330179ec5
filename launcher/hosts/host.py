"""What a host reports of itself: interpreter, packages, files, network, devices.

Standard library only. `preflight` sends this file to the interpreter of every host by ssh, so that
it works where nothing else of the project is installed: a question (JSON in base64) as its
argument, the answer as JSON on its standard output.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

SIOCGIFADDR = 0x8915


def interfaces() -> dict[str, str]:
    """Return network interface -> IPv4 address, for those that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode())
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
    return found


def interface_of(address: str | None) -> str | None:
    """Return the interface that has an address."""
    return next((name for name, its in interfaces().items() if its == address), None)


def route_from(host: str) -> str | None:
    """Return this host's address on the way to another one; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def resolve(host: str) -> str | None:
    """Return the IPv4 address that a host's name resolves to; None if it does not."""
    with suppress(OSError):
        return socket.gethostbyname(host)
    return None


def describe(question: dict[str, Any]) -> dict[str, Any]:
    """Answer what `preflight` asks."""
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in question["packages"]},
        "code": code_digest(Path(question["code"])),
        "cwd": Path(question["cwd"]).is_dir(),
        "sizes": {path: size_of(Path(path)) for path in question["paths"]},
        "disk": {path: _free_disk(Path(path)) for path in question["disk"]},
        "memory": _available_memory(),
        "interfaces": interfaces(),
        "routes": {host: route_from(host) for host in question["routes"]},
        "gpus": _gpus(question["patience"]),
        "compiler": shutil.which("g++") or shutil.which("c++"),
        "ninja": shutil.which("ninja") or _beside_python("ninja"),
        "locks": old_build_locks(),
        "devices": _devices(question["code"], question["patience"])
        if question["devices"]
        else None,
        "clock": time.time(),
    }


def size_of(path: Path) -> int | None:
    """Return the bytes of a file, or of the files in a folder; None if it does not exist."""
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        return path.stat().st_size
    except OSError:
        return None


def code_digest(root: Path) -> str | None:
    """Return a digest of the project's modules, which tells whether two hosts run the same."""
    files = sorted(
        file for part in ("launcher", "lorasb_ds") for file in (root / part).rglob("*.py")
    )
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def extensions_folder() -> Path:
    """Return the folder in which torch builds DeepSpeed's operators."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default).resolve()


def old_build_locks(older_than: float = 600.0) -> list[str]:
    """Return locks of builds that were killed, which torch would wait for for ever."""
    found = []
    with suppress(OSError):
        for lock in extensions_folder().glob("**/lock"):
            if time.time() - lock.stat().st_mtime > older_than:
                found.append(str(lock))
    return found


def listen(port: int, seconds: float) -> dict[str, Any]:
    """Listen on a port, on all addresses as torch does, for others to try to reach it."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            return {"error": f"{error.strerror or error}"}
        server.listen(1024)
        print(json.dumps({"listening": True}), flush=True)
        server.settimeout(0.2)
        deadline = time.monotonic() + seconds
        # Ends when ssh does, whose pipe is then closed.
        while time.monotonic() < deadline:
            with suppress(OSError):
                server.accept()[0].close()
            print(" ", flush=True)
    return {"error": None}


def connect(address: str, port: int, interface: str | None, seconds: float) -> dict[str, Any]:
    """Try to reach a port of another host, from an interface if one is named."""
    source = interfaces().get(interface) if interface else None
    if interface and source is None:
        return {"error": f"there is no interface {interface}", "interface": None}
    with socket.socket() as probe:
        probe.settimeout(seconds)
        try:
            if source:
                probe.bind((source, 0))
            probe.connect((address, port))
        except OSError as error:
            return {"error": f"{error.strerror or error}", "interface": None}
        return {"error": None, "interface": interface_of(str(probe.getsockname()[0]))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _free_disk(path: Path) -> int | None:
    """Return the bytes free where a folder is or would be made; None if it cannot be written."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else None
    return None


def _available_memory() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _beside_python(program: str) -> str | None:
    path = Path(sys.executable).parent / program
    return str(path) if path.is_file() else None


def _gpus(seconds: float) -> list[int] | None:
    """Return the bytes of each NVIDIA GPU; None where their driver is not installed."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return None
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=True
        )
        return [int(line) << 20 for line in output.stdout.split()]
    return None


def _devices(root: str, seconds: float) -> dict[str, Any]:
    """Ask DeepSpeed and torch in a process of its own: it takes seconds, and may fail."""
    program = (
        # Last: next to an installed package lie others, named as Python's own modules.
        "import sys; sys.path.append(sys.path.pop(0)); import json;"
        "from lorasb_ds.distributed import accelerator;"
        "print(json.dumps(accelerator.describe()))"
    )
    try:
        output = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=root,
        )
        answer: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return {"error": f"{type(error).__name__}: torch or DeepSpeed does not start"}
    return answer


def main() -> None:
    question = json.loads(base64.urlsafe_b64decode(sys.argv[1]))
    verb = question.pop("verb")
    if verb == "describe":
        answer = describe(question)
    elif verb == "listen":
        answer = listen(**question)
    else:
        answer = connect(**question)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
