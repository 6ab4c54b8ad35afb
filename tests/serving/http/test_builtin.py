"""The package's own rewards behind HTTP give the scores that they give in one process, bit for bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.serving.http.rewards import Conditioned
from tests.serving.http.servers import Server, b64, codes, levels, picture, running, scores
from tests.sockets import dead_port
from tiltflow import cli
from tiltflow.rewards import RewardArguments, RewardEngine
from tiltflow.serving.builtin import RewardScorer, make_scorer, to_tensor
from tiltflow.serving.jobs import Sample
from tiltflow.serving.server import to_levels
from tiltflow.serving.wire import (
    SAFETENSORS,
    Item,
    Media,
    ScoreRequest,
    WireError,
    pack_safetensors,
)
from tiltflow.types import Prompt

TESTS = "tests.rewards_for_tests"
HERE = "tests.serving.http.rewards"
FLOATS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def scorer(name: str, **options: Any) -> RewardScorer:
    return make_scorer({"name": name.rpartition(".")[2], "reward_model": name, "options": options})


@pytest.mark.parametrize("name", ["JPEGCompressibility", f"{TESTS}.Brightness", f"{TESTS}.Rank"])
def test_scores_are_those_of_the_engine(name: str) -> None:
    engine = RewardEngine([RewardArguments(name="r", reward_model=name)])
    with engine.begin() as scoring:
        scoring.add([Prompt("p")] * 6, [0] * 6, images=FLOATS)
        table = scoring.finish()
    found, components, failures = scorer(name).score([Sample(prompt="p", image=image.numpy()) for image in FLOATS])
    assert found == table.column("r").tolist()
    assert failures == {} and {key: list(column) for key, column in components.items()} == table.extra_info.get("r", {})


def test_levels_and_tensors() -> None:
    for pixels in (levels(2)[1], levels(2)):
        tensor = to_tensor(pixels)
        assert tensor.shape[-3] == 3 and tensor.dtype == torch.float32
        np.testing.assert_array_equal(to_levels(tensor.numpy()), pixels)
    assert to_tensor(FLOATS[0].numpy()).equal(FLOATS[0])


def test_every_field_reaches_a_reward_of_tensors() -> None:
    half = np.full((8, 8, 3), 51, np.uint8)
    sample = Sample(
        image=half, video=half[None], condition_images=[half, half], condition_videos=[half[None]], meta={"more": 1}
    )
    arguments = RewardArguments(name="c", reward_model=f"{HERE}.Conditioned", device="cpu")
    scores, _, _ = RewardScorer(arguments, Conditioned(arguments)).score([sample, sample])
    assert scores == pytest.approx([2.0, 2.0])


def test_failures_and_components_are_told() -> None:
    _, components, failures = scorer(f"{HERE}.Judged").score([Sample(prompt=p) for p in ("a", "empty", "odd")])
    assert components == {"tensor": [0, 1, 2], "word": ["a", "empty", "odd"]}
    told = failures[1]
    assert isinstance(told, WireError) and told.code == "upstream_judge"
    assert told.message == "UnparsableError: m gave an empty answer"
    assert failures[2] == "ValueError: odd"
    for name, prompt, code in (("Judged", "out", "upstream_judge"), ("TooFew", "a", "wrong_count")):
        with pytest.raises(WireError) as caught:
            scorer(f"{HERE}.{name}").score([Sample(prompt=prompt)])
        assert caught.value.code == code


def test_the_revision_changes_with_options_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, same, other = (
        scorer("Geneval", detector="shapes", score=score).describe().revision
        for score in ("strict", "strict", "partial")
    )
    assert one == same != other and one.startswith("sha256:")

    class Weights:
        label = "w"

        def find(self) -> Path:
            return tmp_path

    model = scorer("JPEGCompressibility")._model
    monkeypatch.setattr(type(model), "published_weights", classmethod(lambda cls, options: [Weights()]))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    arguments = RewardArguments(name="r", reward_model="JPEGCompressibility")
    before = RewardScorer(arguments, model).describe().revision
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert RewardScorer(arguments, model).describe().revision != before


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    rewards = ["JPEGCompressibility", f"{{reward_model: {TESTS}.Brightness, name: bright}}", f"{HERE}.Judged"]
    with dead_port() as port:
        nobody = f"{{reward_model: vllm_evaluate, name: asks, api_base_url: 'http://127.0.0.1:{port}/v1'"
        rewards.append(nobody + ", max_retries: 1, timeout: 20}")
        with running("-m", "tiltflow", "serve", *rewards, "--port", "0", "--limit", "items=10") as server:
            yield server


def test_several_models_in_one_request(server: Server) -> None:
    items = [Item(image=Media(ref="i", index=index), prompt="a") for index in range(6)]
    request = ScoreRequest(models=["JPEGCompressibility", "bright"], items=items, returns=["components"])
    body = pack_safetensors(request, {"i": FLOATS.numpy()})
    answer = server.ask("POST", "/v1/score", body, headers={"Content-Type": SAFETENSORS})
    results = answer.json["results"]
    with RewardEngine(
        [
            RewardArguments(name="JPEGCompressibility", reward_model="JPEGCompressibility"),
            RewardArguments(name="bright", reward_model=f"{TESTS}.Brightness"),
        ]
    ).begin() as scoring:
        scoring.add([Prompt("a")] * 6, [0] * 6, images=FLOATS)
        table = scoring.finish()
    told = torch.tensor([[each["scores"][name] for name in table.names] for each in results])
    assert torch.equal(told, table.scores)
    assert results[0]["components"]["JPEGCompressibility"]["bytes"] > 100
    assert all(each["revision"].startswith("sha256:") for each in answer.json["models"])


def test_one_model_is_named_where_there_are_several(server: Server) -> None:
    answer = server.post("/v1/score", {"items": [{"prompt": "a"}]})
    assert (answer.status, answer.error["param"]) == (400, "models")
    body = {"prompt": ["a"], "image": [b64(picture())["b64"]]}
    assert server.post("/compute", body).error["param"] == "model"
    assert server.post("/compute?model=JPEGCompressibility", body).json["rewards"][0] < 0
    assert server.post("/compute?model=jpeg", body).status == 404
    twice = {"models": ["bright", "bright"], "items": [{"prompt": "a"}]}
    assert server.post("/v1/score", twice).error["param"] == "models[1]"


def test_a_judge_that_is_out_is_a_bad_gateway(server: Server) -> None:
    answer = server.post("/v1/score", {"models": ["Judged"], "items": [{"prompt": "out"}]})
    assert (answer.status, answer.error["code"]) == (502, "upstream_judge")
    prompts = ("a", "empty", "late", "odd", "unlike")
    answer = server.post("/v1/score", {"models": ["Judged"], "items": [{"prompt": prompt} for prompt in prompts]})
    told = ["ok", "upstream_judge", "upstream_judge", "scorer_error", "scorer_error"]
    assert answer.status == 200 and codes(answer) == told
    assert scores(answer) == [0.5, None, None, None, None]
    answer = server.post("/v1/score", {"models": ["Judged"], "items": [{"prompt": "config"}]})
    assert (answer.status, answer.error["code"]) == (500, "scorer_error")  # however its message begins
    assert server.get("/v1/models").json["data"][0]["limits"]["items"] == 10


def test_a_judge_that_is_not_there_is_a_bad_gateway(server: Server) -> None:
    pytest.importorskip("openai")
    items = [{"prompt": "a cat", "image": b64(picture())}] * 2
    answer = server.post("/v1/score", {"models": ["asks"], "items": items})
    assert answer.status == 502 and codes(answer) == ["upstream_judge"] * 2
    assert scores(answer) == [None, None]
    told = answer.json["results"][0]["error"]
    assert told["retryable"] and "failed: APIConnectionError: " in told["message"]
    assert "(tried 2 times in " in told["message"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["PickSore"], "did you mean 'PickScore'?"),
        (["{reward_model: Geneval, detectr: shapes}"], "unknown key 'detectr'; did you mean 'detector'?"),
        (["OCR", "OCR"], "'OCR' is served twice"),
        (["{reward_model: OCR, name: a@b}"], "leave out @ and /"),
        (["OCR", "--limit", "itemz=3"], "did you mean 'items'?"),
        (["OCR", "--limit", "items=many"], "items"),
        (["OCR", "--limit", "items=0"], "items=0"),
        (["OCR", "--hots", "x"], "--hots is no option of serve"),
        (["OCR", "--host", "0.0.0.0"], "--insecure"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TILTFLOW_SERVER_TOKEN", raising=False)
    assert cli.main(["serve", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tiltflow serve: ") and message in line
