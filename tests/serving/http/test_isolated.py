"""An environment with only what a server needs: no torch, no python-multipart, no prometheus-client, no uvloop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.http import servers
from tests.serving.http.servers import ROOT, Server, b64, picture, scores

PACKAGES = ("fastapi", "uvicorn", "pillow", "numpy", "safetensors")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the environment and return its interpreter."""
    folder = tmp_path_factory.mktemp("isolated")
    constraints = str(ROOT / "constraints.txt")
    environ = {**os.environ, "PIP_CONSTRAINT": constraints, "PIP_BUILD_CONSTRAINT": constraints}
    environ.pop("PYTHONPATH", None)

    def run(*words: str) -> None:
        done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    run(sys.executable, "-m", "venv", str(folder))
    found = folder / "bin" / "python"
    run(str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES)
    run(str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", str(ROOT))
    return found


@pytest.mark.slow
def test_the_example_serves_there(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = subprocess.run([str(python), "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    for absent in ("torch", "python-multipart", "prometheus", "uvloop", "httptools", "transformers"):
        assert absent not in listed
    monkeypatch.setattr(servers.sys, "executable", str(python))
    with servers.running("example_server.py", "--port", "0", TILTFLOW_SERVER_TOKEN="t", PYTHONPATH="") as server:
        serves(server)


def serves(server: Server) -> None:
    headers = {"Authorization": "Bearer t"}
    answer = server.post("/compute", {"prompt": ["ab"], "image": [b64(picture())["b64"]]}, **headers)
    assert answer.json == {"rewards": [3.0]}
    answer = server.post("/v1/score", {"items": [{"prompt": "ab", "image": b64(picture())}]}, **headers)
    assert scores(answer) == [3.0]
    answer = server.get("/metrics", **headers)
    assert (answer.status, answer.error["code"]) == (501, "not_implemented")
    assert "prometheus-client" in answer.error["message"]
    multipart = {**headers, "Content-Type": "multipart/form-data; boundary=x"}
    answer = server.ask("POST", "/v1/score", b"--x--\r\n", headers=multipart)
    assert answer.status == 415 and "python-multipart" in answer.error["message"]
