"""The client drops idle connections before the server does, so that no request is sent into a closing one."""

import time
from pathlib import Path

from tests.rewards.samples import entry
from tests.serving.http.servers import faulty
from tiltflow.rewards import build_reward_model
from tiltflow.rewards.transport import KEEPALIVE_SECONDS
from tiltflow.serving.running import KEEP_ALIVE_SECONDS

UVICORN_SECONDS = 5  # what servers that are not told otherwise keep


def established(port: int) -> set[str]:
    """Return the connections to a port of this machine, by their own ends."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {own for _, own, peer, state, *_ in rows if peer.endswith(f":{port:04X}") and state == "01"}


def test_the_client_is_the_one_to_close() -> None:
    assert KEEPALIVE_SECONDS < UVICORN_SECONDS < KEEP_ALIVE_SECONDS
    with faulty() as server:
        options = {"server_url": f"http://127.0.0.1:{server.port}", "required_fields": ["prompt"], "retry_attempts": 1}
        reward = build_reward_model(entry("far", "RemotePointwiseRewardModel", options=options))
        used: list[set[str]] = []
        for pause in (0.0, 0.5, KEEPALIVE_SECONDS + 0.05, UVICORN_SECONDS - 0.02):
            time.sleep(pause)
            before = established(server.port)
            assert list(reward(prompt=["7"]).rewards) == [7.0]
            used.append(established(server.port))
            assert pause == 0.0 or before  # the server has not closed what was idle
        assert used[0] == used[1]
        assert used[-1].isdisjoint(used[1])
