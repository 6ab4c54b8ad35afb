"""Images per second of the scorers beside the straightforward route, preprocessing alone, and the engine: JSON lines.

    python -m benchmarks.scoring              # tiny random networks, preprocessing, engine
    python -m benchmarks.scoring --full       # a random ViT-H/14 CLIP and Mask2Former Swin-S, two images

Ours is `scorer.score(tensors)` on `[B, 3, 512, 512]` in [0, 1]. The straightforward route is transformers': PIL images
that are there already -> its processor (the PIL variant) -> its model, with the same weights in the same process. Both
encode every prompt and every image anew. They take turns; what is printed are medians. A generator makes tensors, so
that the straightforward route must also make the PIL images: `ratio_from_tensors` counts that, `ratio` does not.
`largest_difference` is between the two routes' scores: the processor resizes in 8 bits.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerImageProcessorPil,
)
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from tests.scorers.tiny_clip import tiny_tokenizer
from tests.scorers.tiny_image_reward import random_state, write_vocabulary
from tests.scorers.tiny_vlm import save_vlm
from tests.tiny_detector import confident, tiny_mask2former
from tiltflow.rewards import PointwiseRewardModel, RewardArguments, RewardEngine, RewardModelOutput
from tiltflow.scorers import AestheticScorer, ClipScorer, ImageRewardScorer, clip_preprocess
from tiltflow.scorers.aesthetic import AestheticHead
from tiltflow.scorers.checkpoints import MODELS_VARIABLE
from tiltflow.scorers.clip_backbone import ClipBackbone
from tiltflow.scorers.deqa import DeQAScorer, expected_level
from tiltflow.scorers.image_reward import image_reward_tokenizer
from tiltflow.scorers.mask2former import LONG_SIDE, SHORT_SIDE, STRIDE, Mask2Former, Mask2FormerNetwork
from tiltflow.types import Prompt, SampleBatch

SIDE = 512  # pixels
SUBJECTS = (
    "cat",
    "dog",
    "owl",
    "fox",
    "hen",
    "cow",
    "bee",
    "ant",
    "emu",
    "yak",
    "rat",
    "pig",
    "bat",
    "eel",
    "elk",
    "ram",
)
Route = Callable[[], Tensor]


def pictures(count: int) -> tuple[Tensor, list[Image.Image]]:
    """Return smooth random images as tensors on the 8-bit grid, and as PIL images."""
    coarse = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = (F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear") * 255).round()
    return levels / 255, to_pil(levels / 255)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert a batch as pipelines do."""
    levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(each) for each in levels]


def alternate(*works: Callable[[], Any], repeats: int) -> list[float]:
    """Return the median seconds of each, run in turns after one unmeasured turn each."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(1 + repeats):
        for work, taken in zip(works, seconds, strict=True):
            began = time.perf_counter()
            work()
            if turn:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def report(part: str, images: int, ours: float, theirs: float, **more: Any) -> None:
    line = {
        "benchmark": "scoring",
        "part": part,
        **more,
        "images": images,
        "images_per_second": round(images / ours, 3),
        "straightforward_images_per_second": round(images / theirs, 3),
        "ratio": round(theirs / ours, 3),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(line), flush=True)


# --- scorers ----------------------------------------------------------------------------------------------------------


def random_clip(*, full: bool) -> CLIPModel:
    """Return a random CLIP: of the sizes of ViT-H/14, or two layers over patches of 32 pixels."""
    words = len(tiny_tokenizer())
    marks = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": 0}
    text: dict[str, Any] = {"vocab_size": 49408, "hidden_act": "gelu", **marks}
    vision: dict[str, Any] = {"image_size": 224, "hidden_act": "gelu"}
    if full:
        text |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision |= {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        vision["patch_size"] = 14
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= sizes
        vision |= {**sizes, "patch_size": 32}
    width = 1024 if full else 64
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).eval()


class ClipRoutes:
    """Both routes over one CLIP."""

    def __init__(self, model: CLIPModel, count: int):
        self.count = count
        self.backbone = ClipBackbone(model, tiny_tokenizer())
        self.processor: Any = CLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=tiny_tokenizer())
        self.tensors, self.pils = pictures(count)
        self.prompts = [f"a photo of a {subject}" for subject in SUBJECTS[:count]]

    def straightforward(self, *, logits: bool) -> Tensor:
        """Score as the model card does: all pairs are computed from two towers, and the diagonal is read."""
        inputs = self.processor(text=self.prompts, images=self.pils, padding=True, truncation=True, return_tensors="pt")
        output: Any = self.backbone.model(**inputs)
        return output.logits_per_image.diagonal() / (1 if logits else self.backbone.logit_scale)

    def ours(self, scorer: ClipScorer | AestheticScorer) -> Tensor:
        self.backbone.forget()
        return scorer.score(self.tensors, self.prompts)

    def compare(self, weights: str, *, repeats: int, kinds: tuple[Any, ...]) -> None:
        for kind in kinds:
            scorer = ClipScorer(self.backbone, kind=kind)
            logits = scorer.scale == "logits"
            measured(
                lambda scorer=scorer: self.ours(scorer),
                lambda logits=logits: self.straightforward(logits=logits),
                self.count,
                repeats=repeats,
                scorer=kind,
                weights=weights,
            )

    def compare_aesthetic(self, weights: str, *, repeats: int) -> None:
        head = AestheticHead(self.backbone.width).eval()
        scorer = AestheticScorer(self.backbone, head)

        def straightforward() -> Tensor:
            inputs = self.processor(images=self.pils, return_tensors="pt")
            model = self.backbone.model
            embeddings = model.visual_projection(model.vision_model(**inputs).pooler_output)
            return head(F.normalize(embeddings, dim=-1))

        name = {"scorer": "aesthetic", "weights": weights}
        measured(lambda: self.ours(scorer), straightforward, self.count, repeats=repeats, **name)


def measured(ours: Route, theirs: Route, count: int, *, repeats: int, **more: Any) -> None:
    tensors, _ = pictures(count)
    with torch.no_grad():
        difference = (ours() - theirs()).abs().max().item()
        own, other, conversion = alternate(ours, theirs, lambda: to_pil(tensors), repeats=repeats)
    more |= {"ratio_from_tensors": round((other + conversion) / own, 3), "repeats": repeats}
    report("scorer", count, own, other, **more, largest_difference=round(difference, 5))


def compare_image_reward(models: Path, count: int, *, repeats: int) -> None:
    write_vocabulary(models / "bert-base-uncased")
    torch.save(random_state(image_size=224), models / "ImageReward.pt")
    scorer = ImageRewardScorer.from_checkpoint(models / "ImageReward.pt", image_reward_tokenizer())
    processor: Any = BlipImageProcessorPil(size={"height": 224, "width": 224})
    tensors, pils = pictures(count)
    prompts = [f"w{index} w{index + 1} w7" for index in range(count)]

    def straightforward() -> Tensor:
        pixels = processor(pils, return_tensors="pt")["pixel_values"]
        return scorer(pixels, *scorer.tokenize(prompts))

    name = {"scorer": "image_reward", "weights": "tiny"}
    measured(lambda: scorer.score(tensors, prompts), straightforward, count, repeats=repeats, **name)


def compare_deqa(models: Path, count: int, *, repeats: int) -> None:
    scorer = DeQAScorer.from_folder(save_vlm(models / "vlm"))
    tensors, pils = pictures(count)

    def straightforward() -> Tensor:
        """All logits of all positions, of which five are read."""
        texts = [scorer.prompt] * count
        inputs = scorer.processor(text=texts, images=pils, padding=True, padding_side="left", return_tensors="pt")
        logits = scorer.model(**inputs).logits[:, -1]
        return expected_level(logits[:, scorer.levels].softmax(dim=1))

    name = {"scorer": "deqa", "weights": "tiny"}
    measured(lambda: scorer.score(tensors, [""] * count), straightforward, count, repeats=repeats, **name)


def compare_mask2former(network: Mask2FormerNetwork, weights: str, count: int, *, repeats: int) -> None:
    """Images to instances above 0.3, as GenEval counts them; what is compared is how many there are of each image.

    A random network would find something with every query; the background is made likely enough that about five are
    left of each image, as in photographs. The straightforward route makes its masks at 384 pixels, ours at 800 and then
    at the image's size, as mmdet does.
    """
    detector = Mask2Former(confident(network))
    size = {"shortest_edge": SHORT_SIDE, "longest_edge": LONG_SIDE}
    processor: Any = Mask2FormerImageProcessorPil(size=size, size_divisor=STRIDE)
    tensors, pils = pictures(count)
    levels = (tensors * 255).to(torch.uint8)
    with torch.inference_mode():
        classes, _ = detector.network(torch.stack([detector.prepare(image) for image in levels]))
    objects = classes[..., :-1].logsumexp(-1) - classes[..., -1]  # [B, Q] log-odds of being anything at all
    network.class_predictor.bias.data[-1] = objects.flatten().sort(descending=True).values[5 * count].item()

    def straightforward() -> Tensor:
        classes, masks = detector.network(processor(pils, return_tensors="pt")["pixel_values"])
        output = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
        sides = [(SIDE, SIDE)] * count
        found = processor.post_process_instance_segmentation(output, threshold=0.3, target_sizes=sides)
        return torch.tensor([float(len(each["segments_info"])) for each in found])

    def ours() -> Tensor:
        return torch.tensor([float(len(found.labels)) for found in detector.detect(list(levels), min_score=0.3)])

    name = {"scorer": "mask2former", "weights": weights, "instances_per_image": ours().mean().item()}
    measured(ours, straightforward, count, repeats=repeats, **name)


# --- what is around the networks --------------------------------------------------------------------------------------


def compare_preprocessing(count: int, *, repeats: int) -> None:
    """Tensors to the network's input: in torch, or by way of PIL images and the processor."""
    processor: Any = CLIPImageProcessorPil()
    tensors, _ = pictures(count)

    def straightforward() -> Tensor:
        return processor(to_pil(tensors), return_tensors="pt")["pixel_values"]

    difference = (clip_preprocess(tensors) - straightforward()).abs().max().item()
    own, other = alternate(lambda: clip_preprocess(tensors), straightforward, repeats=repeats)
    report("preprocessing", count, own, other, largest_difference=round(difference, 5), repeats=repeats)


class Nothing(PointwiseRewardModel):
    """Returns zeros at once."""

    use_tensor_inputs = True

    def __call__(self, prompt: list[str], image: Any = None, **media: Any) -> RewardModelOutput:
        return RewardModelOutput(torch.zeros(len(prompt)))


class NothingOfPictures(Nothing):
    """The same, of PIL images, which the engine makes."""

    use_tensor_inputs = False


def time_engine(count: int, *, repeats: int) -> None:
    tensors, _ = pictures(count)
    groups = torch.arange(count) // 8
    prompts = [Prompt(f"prompt {group}") for group in groups.tolist()]
    samples = SampleBatch(prompts, groups, torch.zeros(count, 1), tensors)
    line: dict[str, Any] = {"benchmark": "scoring", "part": "engine", "images": count, "repeats": repeats}
    for name, cls in (("tensors", Nothing), ("pictures", NothingOfPictures)):
        engine = RewardEngine([RewardArguments(name="r", reward_model="r", device="cpu")], factory=cls)
        (seconds,) = alternate(lambda engine=engine: engine.score(samples), repeats=repeats)
        line[f"{name}_ms_per_image"] = round(1000 * seconds / count, 4)
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="full-size random networks instead of all else")
    parser.add_argument("--count", type=int, help="images per batch: 16, or 2 with --full")
    parser.add_argument("--repeats", type=int, help="turns of each route: 9, or 3 with --full")
    known = parser.parse_args()
    if known.full:
        count, repeats = known.count or 2, known.repeats or 3
        ClipRoutes(random_clip(full=True), count).compare("ViT-H/14", repeats=repeats, kinds=("pickscore",))
        torch.manual_seed(0)
        swin = Mask2FormerNetwork(Mask2FormerConfig(num_labels=80))  # its defaults are those of Swin-S
        compare_mask2former(swin, "Swin-S", count, repeats=repeats)
        return
    count, repeats = known.count or 16, known.repeats or 9
    routes = ClipRoutes(random_clip(full=False), count)
    routes.compare("tiny", repeats=repeats, kinds=("clip", "pickscore", "hpsv2"))
    routes.compare_aesthetic("tiny", repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[MODELS_VARIABLE] = folder
        compare_image_reward(Path(folder), count, repeats=repeats)
        compare_deqa(Path(folder), count, repeats=repeats)
    compare_mask2former(tiny_mask2former(), "tiny", min(count, 4), repeats=repeats)
    compare_preprocessing(count, repeats=repeats)
    time_engine(64, repeats=repeats)


if __name__ == "__main__":
    main()
