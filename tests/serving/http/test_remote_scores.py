"""Rewards behind a server, asked by the package's own client, give the scores of one process, bit for bit."""

from collections.abc import Iterator

import pytest
import torch

from tests.serving.http.servers import Server, running
from tiltflow.rewards import RewardArguments, RewardEngine, build_reward_model
from tiltflow.types import Prompt, RewardTable

TESTS = "tests.rewards_for_tests"
IMAGES = torch.rand(24, 3, 20, 24, generator=torch.Generator().manual_seed(5))
IMAGES[0, :, 0, :4] = torch.tensor([0.5, 1.5, 2.5, 3.5]) / 255  # halves, which rounding treats apart
GROUPS = [place // 4 for place in range(24)]
MODELS = {
    "jpeg": "JPEGCompressibility",
    "bright": f"{TESTS}.Brightness",
    "rank": f"{TESTS}.Rank",
    "keys": f"{TESTS}.MetadataSize",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    words = [f"{{reward_model: {model}, name: {name}}}" for name, model in MODELS.items()]
    with running("-m", "tiltflow", "serve", *words, "--port", "0") as server:
        yield server


def score(*rewards: RewardArguments) -> RewardTable:
    with RewardEngine(list(rewards)).begin() as scoring:
        for begin in range(0, 24, 6):  # groups come in parts
            end = begin + 6
            scoring.add([Prompt("a red circle")] * 6, GROUPS[begin:end], images=IMAGES[begin:end])
        return scoring.finish()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("name", "fields"), [("jpeg", ["image"]), ("bright", ["prompt", "image"]), ("rank", ["image"])]
)
def test_scores_are_those_of_one_process(server: Server, name: str, fields: list[str], asynchronous: bool) -> None:
    kind = "RemoteGroupwiseRewardModel" if name == "rank" else "RemotePointwiseRewardModel"
    options = {"server_url": f"http://127.0.0.1:{server.port}", "model": name, "required_fields": fields}
    far = RewardArguments(
        name="r",
        reward_model=kind,
        batch_size=5,
        options=options,
        async_reward=asynchronous,
        num_workers=3 if asynchronous else 1,
    )
    table = score(far)
    local = score(RewardArguments(name="r", reward_model=MODELS[name]))
    assert table.failures == local.failures == ()
    assert torch.equal(table.scores, local.scores)
    assert table.scores.unique().numel() >= 4
    told, own = table.extra_info.get("r", {}), local.extra_info.get("r", {})
    assert {key: list(values) for key, values in told.items()} == {key: list(values) for key, values in own.items()}


def test_empty_metadata_is_sent_and_scored(server: Server) -> None:
    options = {
        "server_url": f"http://127.0.0.1:{server.port}",
        "model": "keys",
        "required_fields": ["prompt", "metadata"],
    }
    far = build_reward_model(RewardArguments(name="r", reward_model="RemotePointwiseRewardModel", options=options))
    assert far.info.batch_pixels == 64 * 2**20  # what the server takes unless told otherwise
    output = far(prompt=["a"] * 4, metadata=[{}, {"a": 1}, None, {}])  # pyright: ignore[reportCallIssue]
    assert torch.as_tensor(output.rewards)[[0, 1, 3]].tolist() == [0.0, 1.0, 0.0]
    assert {place: str(error) for place, error in output.failures.items()} == {
        2: "invalid_item: items[2].meta: absent, and keys needs it"
    }
