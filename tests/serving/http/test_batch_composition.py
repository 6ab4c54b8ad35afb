"""A sample's score does not depend on the samples that its network is shown together with."""

import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.scorers.tiny_clip import save_clip
from tests.serving.http.servers import Answer, Server, b64, running, scores

COUNT = 13
BATCH = 8  # of the model: a request with more is scored in several calls


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve CLIPScore over a tiny random CLIP of the real class."""
    folder = save_clip(tmp_path_factory.mktemp("models") / "clip")
    reward = {"reward_model": "CLIP", "model_name_or_path": str(folder), "device": "cpu", "batch_size": BATCH}
    with running("-m", "tiltflow", "serve", json.dumps(reward), "--port", "0") as server:
        yield server


@pytest.fixture(scope="module")
def items() -> list[dict[str, object]]:
    """Return items with random pictures of one size, and prompts of several lengths."""
    generator = np.random.default_rng(0)
    found = []
    for index in range(COUNT):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(buffer, "PNG")
        found.append({"prompt": "a cat " * (1 + index % 4) + str(index), "image": b64(buffer.getvalue())})
    return found


@pytest.fixture(scope="module")
def alone(server: Server, items: list[dict[str, object]]) -> list[float]:
    """Return the score of every item in a request of its own."""
    answers = [ask(server, [item]) for item in items]
    assert {answer.json["batch_size"] for answer in answers} == {1}
    found = [score for answer in answers for score in scores(answer) if score is not None]
    assert len(found) == COUNT
    ordered = np.sort(found)
    assert np.diff(ordered).min() > 1e-4  # ten times the tolerance: a mix-up would be seen
    return found


def ask(server: Server, items: list[dict[str, object]]) -> Answer:
    answer = server.post("/v1/score", {"items": items})
    assert answer.status == 200, answer.body
    return answer


@pytest.mark.parametrize("count", [2, 3, 5, BATCH, COUNT])
@pytest.mark.parametrize("order", ["as before", "reversed"])
def test_scores_in_batches_are_those_of_samples_alone(
    server: Server, items: list[dict[str, object]], alone: list[float], count: int, order: str
) -> None:
    places = list(range(count)) if order == "as before" else list(range(COUNT))[: -count - 1 : -1]
    answer = ask(server, [items[place] for place in places])
    assert answer.json["batch_size"] == min(count, BATCH)
    assert scores(answer) == pytest.approx([alone[place] for place in places], abs=1e-5, rel=0)


def test_neighbours_do_not_matter(server: Server, items: list[dict[str, object]], alone: list[float]) -> None:
    for place in range(1, COUNT):
        answer = ask(server, [items[place - 1], items[place], items[0]])
        assert scores(answer) == pytest.approx([alone[place - 1], alone[place], alone[0]], abs=1e-5, rel=0)
