"""A Hub id end to end, with the real huggingface-hub client against a small Hub on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.tiny import ROOT, make_checkpoint, run_recipe

COMMIT = "a" * 40


@pytest.fixture
def hub(tmp_path):
    """Serves one repository, org/model: its file list and its files. Yields (address, names asked for)."""
    make_checkpoint(tmp_path / "repo")
    (tmp_path / "repo/pytorch_model.bin").write_bytes(b"a pickle")
    files = {path.name: path.read_bytes() for path in (tmp_path / "repo").iterdir()}
    asked = set()

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path, headers, status = self.path.partition("?")[0], {}, 200
            if path.startswith("/api/models/org/model"):
                siblings = [{"rfilename": name} for name in files]
                asked.add(path)
                entries = [{"type": "file", "path": n, "size": len(b), "oid": COMMIT} for n, b in files.items()]
                info = {"id": "org/model", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                body = json.dumps(entries if "/tree/" in path else info).encode()
            elif path.startswith("/org/model/") and (name := path.rpartition("/")[2]) in files:
                asked.add(name)
                body = files[name]
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            else:
                status, body = 404, b""
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.mark.slow(6)
def test_a_hub_id_is_downloaded_and_used(tmp_path, hub):
    address, asked = hub

    flags = ("--raw", "--prompt", "3 + 4", "--max-new-tokens", "8", "--device", "cpu")

    def generate(model):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",  # whatever whoever runs the tests has set
        }
        command = [sys.executable, str(ROOT / "recipes/generate.py"), "--model", model, *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    by_id, by_folder = generate("org/model@v2"), run_recipe("generate", "--model", tmp_path / "repo", *flags)
    assert by_id.returncode == 0, by_id.stderr
    assert by_id.stdout == by_folder.stdout and len(by_id.stdout) > 1
    assert "/api/models/org/model/revision/v2" in asked
    assert "model.safetensors" in asked and "pytorch_model.bin" not in asked  # pickles are not even fetched
    missing = generate("org/other")
    assert missing.returncode == 2 and "org/other" in missing.stderr and "Traceback" not in missing.stderr
