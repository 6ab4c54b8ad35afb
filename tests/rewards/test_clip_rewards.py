"""PickScore, its rank, CLIPScore, HPSv2 and the aesthetic score as rewards, over tiny random weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rewards.samples import entry
from tests.scorers.test_clip import Calls
from tests.scorers.tiny_clip import images, save_clip, save_tokenizer, tiny_backbone, tiny_model, to_open_clip
from tiltflow.errors import RewardError
from tiltflow.rewards import RewardEngine, build_reward, check_reward
from tiltflow.rewards.clip_rewards import mean_ranks
from tiltflow.scorers import AestheticScorer, ClipScorer
from tiltflow.scorers.aesthetic import AestheticHead
from tiltflow.scorers.checkpoints import MODELS_VARIABLE
from tiltflow.types import Prompt, SampleBatch

PROMPTS = ["cat", "a red dog", "dog cat dog", "red"]
NAMES = ("PickScore", "PickScore_Rank", "CLIP", "HPSv2", "AestheticScore")


def head(seed: int = 5) -> AestheticHead:
    torch.manual_seed(seed)
    return AestheticHead(32).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a models folder with tiny weights under the published names."""
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "PickScore_v1", seed=1)
    save_clip(folder / "clip-vit-large-patch14", seed=2, hidden_act="quick_gelu")
    for name, seed in (("HPS_v2.1_compressed.pt", 3), ("HPS_v2_compressed.pt", 4)):
        torch.save({"epoch": 1, "state_dict": to_open_clip(tiny_model(seed=seed))}, folder / name)
    torch.save(head().state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


@pytest.fixture(autouse=True)
def use_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(MODELS_VARIABLE, str(models))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models / "no_cache"))
    yield


def build(name: str, **options: Any) -> Any:
    return build_reward(name, device="cpu", **options)


def rewards_of(name: str, batch: Tensor | None = None, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
    batch = images(4) if batch is None else batch
    output = build(name, **options)(prompt=prompts, image=list(batch))
    return torch.as_tensor(output.rewards)


def samples(batch: Tensor, *, group_size: int = 1) -> SampleBatch:
    count = len(batch)
    groups = torch.arange(count) // group_size
    prompts = [Prompt(PROMPTS[group]) for group in groups.tolist()]
    return SampleBatch(prompts=prompts, groups=groups, latents=torch.zeros(count, 1, 1, 1), images=batch)


# --- values -----------------------------------------------------------------------------------------------------------


def clip_of(kind: Any, **model: Any) -> Callable[[], Tensor]:
    return lambda: ClipScorer(tiny_backbone(**model), kind=kind).score(images(4), PROMPTS)


SCORES = [
    ("PickScore", {"divisor": 1.0}, clip_of("pickscore", seed=1)),
    ("CLIP", {}, clip_of("clip", seed=2, hidden_act="quick_gelu")),
    ("HPSv2", {}, clip_of("hpsv2", seed=3)),
    ("HPSv2", {"version": "v2.0"}, clip_of("hpsv2", seed=4)),
]


@pytest.mark.parametrize(("name", "options", "expected"), SCORES)
def test_a_reward_is_its_score(name: str, options: dict[str, Any], expected: Callable[[], Tensor]) -> None:
    torch.testing.assert_close(rewards_of(name, **options), expected(), atol=1e-4, rtol=0)


def test_pickscore_is_divided_by_26() -> None:
    output = build("PickScore")(prompt=PROMPTS, image=list(images(4)))
    scores = clip_of("pickscore", seed=1)()
    torch.testing.assert_close(output.rewards, scores / 26, atol=1e-5, rtol=0)


def test_options_reach_the_score() -> None:
    cosine, logits = rewards_of("CLIP"), rewards_of("CLIP", scale="logits", divisor=100.0)
    torch.testing.assert_close(logits, cosine, atol=1e-4, rtol=0)
    assert not torch.allclose(rewards_of("HPSv2"), rewards_of("HPSv2", antialias=False), atol=1e-3)
    assert not torch.allclose(rewards_of("HPSv2"), rewards_of("HPSv2", version="v2.0"), atol=1e-3)


def test_hpsv2_reads_a_named_file_and_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save({"state_dict": to_open_clip(tiny_model(seed=4))}, path)
    words = save_tokenizer(tmp_path / "words")
    found = rewards_of("HPSv2", checkpoint=str(path), tokenizer=str(words))
    torch.testing.assert_close(found, rewards_of("HPSv2", version="v2.0"), atol=1e-6, rtol=0)


def test_the_aesthetic_rating_needs_no_prompt() -> None:
    reward = build("AestheticScore")
    assert reward.required_fields == ("image",)
    found = reward(image=list(images(4))).rewards
    expected = AestheticScorer(tiny_backbone(seed=2, hidden_act="quick_gelu"), head()).score(images(4))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    halved = build("AestheticScore", divisor=2.0)(image=list(images(4))).rewards
    torch.testing.assert_close(halved, expected / 2, atol=1e-5, rtol=0)


def test_the_aesthetic_head_of_another_file(tmp_path: Path) -> None:
    torch.save(head(seed=6).state_dict(), tmp_path / "head.pth")
    other = rewards_of("AestheticScore", checkpoint=str(tmp_path / "head.pth"))
    assert not torch.allclose(other, rewards_of("AestheticScore"), atol=1e-3)


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([20.0, 22.0, 22.0, 21.0], [0.0, 2.5, 2.5, 1.0]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ([3.0, 1.0, 2.0], [2.0, 0.0, 1.0]),
        ([5.0, 5.0, 1.0, 1.0, 1.0, 9.0], [3.5, 3.5, 1.0, 1.0, 1.0, 5.0]),
        ([7.0], [0.0]),
        ([], []),
    ],
)
def test_equal_scores_share_their_mean_rank(scores: list[float], ranks: list[float]) -> None:
    assert mean_ranks(torch.tensor(scores)).tolist() == ranks


def test_a_score_that_is_missing_has_no_rank_and_changes_no_other() -> None:
    ranks = mean_ranks(torch.tensor([2.0, torch.nan, 1.0]))
    assert ranks[1].isnan()
    assert ranks[[0, 2]].tolist() == [1.0, 0.0]


def test_the_rank_reward_ranks_each_group_over_its_size() -> None:
    engine = RewardEngine([entry("rank", "PickScore_Rank", batch_size=2), entry("pick", "PickScore")])
    batch = images(12)
    batch[4] = batch[5]  # a tie
    table = engine.score(samples(batch, group_size=6))
    assert table.failures == ()
    for rows in (slice(0, 6), slice(6, 12)):
        torch.testing.assert_close(table.column("rank")[rows], mean_ranks(table.column("pick")[rows]) / 6)
    assert table.column("rank")[4] == table.column("rank")[5]
    assert table.column("rank")[6:].sort().values.tolist() == pytest.approx([i / 6 for i in range(6)])
    assert table.extra_info["rank"]["pickscore"] == pytest.approx((table.column("pick") * 26).tolist(), abs=1e-3)


# --- what every reward promises ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name: str) -> None:
    output = build(name)(prompt=[], image=[])
    assert len(output.rewards) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "PickScore_Rank"])
def test_the_batch_size_does_not_change_rewards(name: str) -> None:
    batch = images(4)
    tables = [RewardEngine([entry("r", name, batch_size=size)]).score(samples(batch.clone())) for size in (1, 3, 4)]
    for table in tables[1:]:
        torch.testing.assert_close(table.scores, tables[0].scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(name: str, dtype: str) -> None:
    reward = build(name, dtype=dtype)
    assert reward.scorer.dtype == getattr(torch, dtype)
    rewards = reward(prompt=PROMPTS, image=list(images(4))).rewards
    assert rewards.dtype == torch.float32
    assert rewards.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_rewards_carry_no_gradient_but_their_scorers_do(name: str) -> None:
    reward = build(name)
    batch = images(2, height=32, width=32).requires_grad_()
    assert not reward(prompt=PROMPTS[:2], image=list(batch)).rewards.requires_grad
    (gradient,) = torch.autograd.grad(reward.scorer.score(batch, PROMPTS[:2]).sum(), batch)
    assert (gradient != 0).all()


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_rewards_of_one_network_encode_each_image_once() -> None:
    names = ("PickScore", "PickScore_Rank", "CLIP", "AestheticScore")
    built: list[Any] = []

    def factory(arguments: Any) -> Any:
        built.append(build_reward(arguments.reward_model, device="cpu"))
        return built[-1]

    engine = RewardEngine([entry(name, name) for name in names], factory=factory)
    pick, rank, clip, aesthetic = (reward.scorer.backbone for reward in built)
    assert pick is rank
    assert clip is aesthetic
    assert pick is not clip
    calls = Calls(pick), Calls(clip)
    engine.score(samples(images(4), group_size=2))
    assert [sum(call.images) for call in calls] == [4, 4]
    assert [sum(call.prompts) for call in calls] == [2, 2]  # two groups, so two prompts


# --- missing weights --------------------------------------------------------------------------------------------------

MISSING = [
    ("PickScore", "the model yuvalkirstain/PickScore_v1 was not found; download it"),
    ("PickScore_Rank", "the model yuvalkirstain/PickScore_v1 was not found; download it"),
    ("CLIP", "the model openai/clip-vit-large-patch14 was not found; download it"),
    ("HPSv2", "the weights HPS_v2.1_compressed.pt were not found; get them from huggingface.co/xswu/HPSv2"),
    ("AestheticScore", r"the weights sac\+logos\+ava1-l14-linearMSE.pth were not found; get them from github.com/chri"),
]


@pytest.mark.parametrize(("name", "message"), MISSING)
def test_missing_weights_are_named(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    check_reward(entry("r", name))  # a config can name it all the same
    with pytest.raises(RewardError, match=message):
        build(name)


def test_a_part_of_a_model_in_the_cache_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--someone--half"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "model.safetensors").touch()
    message = (
        r"someone/half is in the hub's cache without a config\.json; download all of it \(hf download someone/half\)"
    )
    with pytest.raises(RewardError, match=message):
        build("PickScore", model_name_or_path="someone/half")


def test_a_run_that_has_made_no_model_yet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()  # the models folder has another one of that name
    with pytest.raises(RewardError, match=r"there is no model at outputs/a_run/model .*tiltflow train-reward CONFIG"):
        build("PickScore", model_name_or_path="outputs/a_run/model")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("HPSv2", {"version": "v3"}, "version: Input should be 'v2.1' or 'v2.0'; got 'v3'"),
        ("PickScore", {"divisor": 0}, "divisor: Input should be greater than 0; got 0"),
        ("CLIP", {"scale": "logit"}, "scale: Input should be 'cosine' or 'logits'; got 'logit'"),
        ("PickScore_Rank", {"divisor": 2}, "unknown key 'divisor'"),
        ("AestheticScore", {"checkpont": "x"}, "unknown key 'checkpont'; did you mean 'checkpoint'"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        build(name, **options)
