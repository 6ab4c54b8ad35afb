"""The quick start of docs/serving.md, run as it stands there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.serving.http.servers import ROOT, running
from tiltflow.serving.wire import CODES, Limits, read_reply

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_quick_start_scores_a_picture(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "port=8000" in source
    (tmp_path / "my_server.py").write_text(source.replace("port=8000", "port=0"))
    (commands,) = (text for text in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "curl" in text)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "circle.png")
    with running(str(tmp_path / "my_server.py")) as server:
        script = commands.replace("python my_server.py\n", "").replace("localhost:8000", f"127.0.0.1:{server.port}")
        done = subprocess.run(
            ["bash", "-ec", script],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=tmp_path,
            env={**os.environ, "no_proxy": "*"},
        )
    assert done.returncode == 0, done.stderr
    reply = done.stdout[done.stdout.index('{"id"') :]
    (result,) = read_reply(reply, items=1).results
    assert result.scores == {"Redness": 1.0}


def test_the_page_names_every_code_and_every_limit() -> None:
    assert [code for code in CODES if f"`{code}`" not in PAGE and code != "forbidden"] == []
    assert [name for name in Limits.model_fields if f"`{name}`" not in PAGE] == []
