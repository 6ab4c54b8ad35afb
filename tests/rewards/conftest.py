"""One judge behind a real HTTP server for all tests that ask one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.judge_server import JudgeServer, judge_server, save_judge


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random vision-language model, made once per run."""
    return save_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="session")
def _served_judge(judge_folder: Path) -> Iterator[JudgeServer]:
    pytest.importorskip("openai")
    with judge_server(judge_folder) as server:
        yield server


@pytest.fixture
def judge(_served_judge: JudgeServer) -> JudgeServer:
    """Return the server of that model, well behaved and asked nothing yet."""
    _served_judge.behave()
    return _served_judge
