"""Addresses, tokens, limits, and classes that worker processes cannot make."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.serving.http.fault_server import Faulty
from tests.serving.http.servers import ROOT
from tiltflow.errors import ConfigError
from tiltflow.serving import RewardServer
from tiltflow.serving.jobs import Sample
from tiltflow.serving.server import UserScorer
from tiltflow.serving.settings import TOKEN_ENV, ServerSettings, address_of, listen
from tiltflow.serving.wire import Limits


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_this_machine_alone_needs_no_token(host: str) -> None:
    assert ServerSettings(host=host).token is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", ""])
def test_any_other_address_needs_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"--token or the environment variable {TOKEN_ENV}"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, insecure=True).token is None
    assert ServerSettings(host=host, token="t").token == "t"
    monkeypatch.setenv(TOKEN_ENV, "from-env")
    assert ServerSettings(host=host).token == "from-env"
    assert "from-env" not in repr(ServerSettings(host=host))


@pytest.mark.parametrize("token", ["", "  ", "a\nb", "schlüssel"])
def test_a_token_that_no_header_can_carry(token: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        ServerSettings(token=token)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": -1}, "port=-1"),
        ({"drain_seconds": -1.0}, "drain_seconds"),
        ({"limits": Limits(items=0)}, "items=0"),
        ({"replicas": 0}, "replicas=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_seconds": 0}, "batch_seconds=0"),
        ({"name": "a/b"}, "leave out @ and /"),
    ],
)
def test_settings_are_checked_when_the_server_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plain(**settings)


def test_listening() -> None:
    with listen(ServerSettings(port=0)) as found:
        assert address_of(found).startswith("http://127.0.0.1:")
        with pytest.raises(ConfigError, match="cannot listen there"):
            listen(ServerSettings(port=found.getsockname()[1]))
    with pytest.raises(ConfigError, match="no address of this machine"):
        listen(ServerSettings(host="no.such.host.invalid", insecure=True))


class Plain(RewardServer):
    def compute_reward(self, prompts: list[str], images: Any = None, videos: Any = None) -> list[float]:
        return [1.0] * len(prompts)


class Forgetful(Plain):
    def __init__(self) -> None:
        pass


class Typo(Plain):
    required_fields = ("prompt", "picture")


def test_a_class_that_cannot_be_imported_is_told() -> None:
    class Local(Plain):
        pass

    with pytest.raises(ConfigError, match="worker processes cannot import it"):
        Local().run()
    with pytest.raises(ConfigError, match="its arguments cannot be sent"):
        Faulty(log=lambda: None).run()
    with pytest.raises(ConfigError, match=r"super\(\).__init__"):
        Forgetful().run()
    with pytest.raises(ConfigError, match="'picture'"):
        Typo()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "from tiltflow.serving import RewardServer\n"
            "class A(RewardServer):\n    def compute_reward(self, prompts): return []\n"
            "A(port=0).run()",
            "worker processes cannot import it",
        ),
    ],
)
def test_what_is_typed_in_cannot_be_served(source: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


def test_a_file_without_its_main_guard_is_told(tmp_path: Any) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from tiltflow.serving import RewardServer\n"
        "class A(RewardServer):\n    def compute_reward(self, prompts): return []\n"
        "A(port=0).run()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT / "src")}
    )
    assert done.returncode == 1
    assert 'under `if __name__ == "__main__":`' in done.stderr


def test_the_room_is_imported_without_torch_and_without_a_web_framework() -> None:
    source = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'fastapi', 'starlette', 'uvicorn', 'python_multipart'):\n"
        "    sys.modules[name] = None\n"
        "from tiltflow.serving import RewardServer\n"
        "from tiltflow.serving import wire\n"
        "class A(RewardServer):\n    def compute_reward(self, prompts): return []\n"
        "A()\n"
        "print(sorted(name for name in sys.modules if name.startswith('tiltflow')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PYTHONPATH": str(ROOT / "src")},
        check=True,
    )
    names = {name for name in done.stdout.replace("'", "").strip("[]\n").split(", ")}
    assert {name.split(".")[1] for name in names if "." in name} == {"errors", "serving"}


def test_empty_metadata_is_passed_and_absent_metadata_is_not() -> None:
    class Told(Plain):
        """Remembers the metadata."""

        optional_fields = ("metadata",)

        def compute_reward(self, prompts: Any, **fields: Any) -> Any:
            self.told = fields
            return [0.0] * len(prompts)

    for metas, expected in (([{}, {}], [{}, {}]), ([{}, None, {"a": 1}], [{}, None, {"a": 1}]), ([None], None)):
        server = Told()
        UserScorer(server).score([Sample(prompt="p", meta=meta) for meta in metas])
        assert server.told == ({} if expected is None else {"metadata": expected})


def test_a_field_that_the_class_does_not_name_is_not_passed() -> None:
    scorer = UserScorer(Plain())
    scores, _, _ = scorer.score([Sample(prompt="p", meta={"a": 1}, image=np.zeros((2, 2, 3), np.uint8))])
    assert len(scores) == 1
    with pytest.raises(ConfigError, match="optional_fields names 'depth'"):
        type("Wrong", (Plain,), {"optional_fields": ("depth",)})()
