"""Bases by hub name: huggingface_hub's own client against a small server of this process."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.runs import run_command, small_disk, word_rows, write_jsonl

pytestmark = pytest.mark.slow

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """The address of a hub with one model, someone/tiny: a folder's files."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            files = [file for file in sorted(folder.iterdir()) if file.is_file()]
            kind = "application/json"
            if path.startswith("/api/models/someone/tiny/revision/"):
                siblings = [{"rfilename": file.name} for file in files]
                content = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings})
                body = content.encode()
            elif path.startswith("/api/models/someone/tiny/tree/"):
                entries = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in files
                ]
                body = json.dumps(entries).encode()
            elif path.startswith("/someone/tiny/resolve/") and (folder / Path(path).name).is_file():
                body, kind = (folder / Path(path).name).read_bytes(), "application/octet-stream"
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_hub_name_is_fetched_once(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", word_rows(4))
    command = f"lorasb eval --model someone/tiny --data {data} --max-new-tokens 2 --num-samples 2"
    settings = {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    served = tmp_path / "served"
    served.mkdir()
    for file in tiny_model.iterdir():
        (served / file.name).symlink_to(file)
    (served / "pytorch_model.bin").write_bytes(b"a pickle that is not wanted")
    with hub(served) as address:
        first = run_command(*command.split(), HF_ENDPOINT=address, HF_HUB_OFFLINE="0", **settings)
    snapshot = tmp_path / "home" / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").is_file()
    assert not (snapshot / "pytorch_model.bin").exists()
    again = run_command(*command.split(), HF_HUB_OFFLINE="1", **settings)
    losses = [re.findall(r"held-out loss \S+", output) for output in (first, again)]
    assert losses[0] == losses[1] != []
    code = "from lorasb_ds.models.base import Base; print(Base('someone/tiny').digest)"
    assert run_command(sys.executable, "-c", code, HF_HUB_OFFLINE="1", **settings).strip() == (
        f"someone/tiny@{COMMIT}"
    )


def test_a_disk_that_is_full_while_fetching(tiny_model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    with small_disk(small, "4m"), hub(tiny_model) as address:
        output = run_command(
            *["lorasb", "eval", "--model", "someone/tiny"],
            status=2,
            HF_ENDPOINT=address,
            HF_HOME=str(small),
            HF_HUB_OFFLINE="0",
            NO_PROXY="127.0.0.1",
        )
    assert "--model someone/tiny cannot be fetched" in output
    assert "The disk is full: free some of it, or name another one by HF_HOME." in output
    assert "Traceback" not in output
