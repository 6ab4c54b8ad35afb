"""The aesthetic head with its published weights, and the scorer over a shared network."""

from pathlib import Path

import pytest
import torch

from tests.scorers.tiny_clip import images, save_clip, tiny_backbone
from tests.shared import SHARED, golden, requires_shared
from tiltflow.errors import RewardError
from tiltflow.scorers import AestheticScorer, ClipScorer
from tiltflow.scorers.aesthetic import AestheticHead
from tiltflow.scorers.checkpoints import read_weights

PUBLISHED = SHARED / "data" / "weights" / "sac+logos+ava1-l14-linearMSE.pth"


def random_head(width: int) -> AestheticHead:
    torch.manual_seed(5)
    return AestheticHead(width).eval()


@requires_shared
def test_the_published_weights_give_the_published_ratings() -> None:
    meta, tensors = golden("scorers/laion_aesthetic")
    head = AestheticHead.from_state(read_weights(PUBLISHED))
    with torch.no_grad():
        scores = head(tensors["in/embeddings"])
        raw = tensors["in/embeddings_unnormalised"]
        again = head(raw / raw.norm(dim=-1, keepdim=True))
        exact = head.double()(tensors["in/embeddings"].double())
    torch.testing.assert_close(scores, tensors["out/scores"], atol=2e-4, rtol=0)
    torch.testing.assert_close(again, tensors["out/scores"], atol=2e-4, rtol=0)
    torch.testing.assert_close(exact, tensors["out/scores_float64"], atol=1e-9, rtol=0)
    affine = tensors["in/embeddings"].double() @ tensors["out/affine_direction"] + meta["affine"]["offset"]
    torch.testing.assert_close(scores.double(), affine, atol=2e-4, rtol=0)


@requires_shared
def test_the_head_has_exactly_the_published_weights() -> None:
    assert {name: value.shape for name, value in read_weights(PUBLISHED).items()} == {
        name: value.shape for name, value in AestheticHead().state_dict().items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.7.bias": None}, "head.pth does not fit AestheticHead: missing layers.7.bias"),
        ({"layers.1.weight": torch.zeros(2)}, "unexpected layers.1.weight"),
        ({"layers.2.weight": torch.zeros(128, 7)}, r"layers.2.weight is \[128, 7\] instead of \[128, 1024\]"),
    ],
)
def test_another_head_is_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {**AestheticHead(8).state_dict(), **change}
    with pytest.raises(RewardError, match=message):
        AestheticHead.from_state({name: v for name, v in state.items() if v is not None}, source="head.pth")


def test_the_score_is_the_head_of_the_unit_embedding() -> None:
    backbone, batch, head = tiny_backbone(), images(3), random_head(32)
    scorer = AestheticScorer(backbone, head)
    scores = scorer.score(batch, ["ignored", "", "all the same"])
    with torch.no_grad():
        expected = head(backbone.image_features(batch, scorer.preprocess))
    assert torch.equal(scores, expected)
    assert torch.equal(scores, scorer.score(batch))
    assert scores.shape == (3,)
    assert not head.training


def test_it_shares_image_features_with_clipscore() -> None:
    backbone, batch = tiny_backbone(), images(3)
    encoded: list[int] = []
    backbone.model.vision_model.register_forward_hook(
        lambda module, args, kwargs, output: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    AestheticScorer(backbone, random_head(32)).score(batch)
    ClipScorer(backbone, kind="clip").score(batch, ["cat"] * 3)
    assert encoded == [3]


def test_a_gradient_reaches_the_pixels_and_no_weight() -> None:
    scorer = AestheticScorer(tiny_backbone(), random_head(32))
    batch = images(2, height=32, width=32).requires_grad_()
    scorer.score(batch).sum().backward()
    assert batch.grad is not None
    assert (batch.grad != 0).all()
    assert AestheticScorer.differentiable
    assert not any(weight.requires_grad for weight in scorer.parameters())


def test_the_head_stays_in_float32() -> None:
    scorer = AestheticScorer(tiny_backbone().to(torch.bfloat16), random_head(32))
    scores = scorer.score(images(2))
    assert scores.dtype == torch.float32
    assert scorer.dtype == torch.bfloat16
    exact = AestheticScorer(tiny_backbone(), random_head(32)).score(images(2))
    torch.testing.assert_close(scores, exact, atol=0.02, rtol=0)


def test_a_head_for_another_network_is_refused() -> None:
    with pytest.raises(RewardError, match="reads embeddings of width 48, the CLIP network makes 32; use the network"):
        AestheticScorer(tiny_backbone(), random_head(48))


def test_from_files(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    torch.save(random_head(32).state_dict(), tmp_path / "head.pth")
    scorer = AestheticScorer.from_files(folder, tmp_path / "head.pth")
    expected = AestheticScorer(tiny_backbone(), random_head(32)).score(images(2))
    torch.testing.assert_close(scorer.score(images(2)), expected, atol=1e-6, rtol=0)
