"""An environment with only what a server needs: no torch, no python-multipart, no prometheus-client, no uvloop."""

import subprocess
from pathlib import Path

import pytest

from tests.serving.http.servers import Server, b64, picture, running, scores


@pytest.mark.slow
def test_the_example_serves_there(isolated_python: Path) -> None:
    pip = [str(isolated_python), "-m", "pip"]
    listed = subprocess.run([*pip, "list"], capture_output=True, text=True, check=True).stdout
    for absent in ("torch", "python-multipart", "prometheus", "uvloop", "httptools", "transformers"):
        assert absent not in listed
    words = ("example_server.py", "--port", "0")
    with running(*words, python=isolated_python, TILTFLOW_SERVER_TOKEN="t", PYTHONPATH="") as server:
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
