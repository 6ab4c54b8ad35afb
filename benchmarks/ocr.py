"""How fast and how well the OCR reward reads, by its settings; one JSON line each.

python -m benchmarks.ocr                 # phrases at 512x512: RapidOCR as it comes, detection sides, workers
python -m benchmarks.ocr --part words    # words at 64x64, clean and spoilt: upscaling
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tiltflow.demo.words import FONT_FILE, all_words, draw_word, word_prompt
from tiltflow.rewards import build_reward
from tiltflow.rewards.ocr import Piece, ocr_score

PHRASES = """
Open 24 Hours
Fresh Bread
No Parking
Happy Birthday
Sale Ends Today
Mind the Gap
Welcome Home
Exit
Grand Central Station
Best Coffee in Town
Do Not Disturb
Wet Floor
Library
Live Music Tonight
Beware of the Dog
Room 101
Ice Cream
Keep Calm and Carry On
Lost and Found
Under Construction
Farmers Market
Taxi
Push
One Way
Museum of Modern Art
Free Wi-Fi
Speed Limit 55
Hello World
Last Chance
Thank You for Visiting
""".strip().splitlines()
SETTINGS = ((224, 1), (320, 1), (416, 1), (512, 1), (320, 2), (320, 4))  # detection side, workers
UPSCALES = tuple((factor, method) for factor in (1, 2, 3, 4) for method in ("nearest", "bicubic"))[1:]
Score = Callable[[list[str], list[Image.Image]], list[float]]


def phrase_images(seed: int = 0) -> tuple[list[str], list[Image.Image]]:
    """Return prompts and 512x512 pictures of the phrases: dark or light letters over a smooth coloured background."""
    rng = np.random.default_rng(seed)
    images = []
    for phrase in PHRASES:
        corners = rng.integers(0, 110, (2, 2, 3)) + (130 if rng.random() < 0.5 else 0)
        pixels = cv2.resize(corners.astype(np.float32), (512, 512), interpolation=cv2.INTER_CUBIC)
        image = Image.fromarray(np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8))
        ink = (20, 20, 25) if pixels.mean() > 128 else (245, 245, 240)
        points = float(rng.uniform(24, 64))
        font = ImageFont.truetype(str(FONT_FILE), points)
        left, top, right, bottom = font.getbbox(phrase)
        if right - left > 480:
            font = ImageFont.truetype(str(FONT_FILE), points * 480 / (right - left))
            left, top, right, bottom = font.getbbox(phrase)
        x, y = rng.uniform(16, 496 - (right - left)), rng.uniform(16, 496 - (bottom - top))
        ImageDraw.Draw(image).text((x - left, y - top), phrase, font=font, fill=ink)
        images.append(image)
    return [f'a poster with the text "{phrase}"' for phrase in PHRASES], images


def word_images(count: int, *, spoilt: bool, seed: int = 0) -> tuple[list[str], list[Image.Image]]:
    """Return prompts and 64x64 signs; spoilt ones are blurred, warped and noisy, as samples are."""
    rng = np.random.default_rng(seed)
    words = [all_words()[int(index)] for index in rng.choice(len(all_words()), size=count, replace=False)]
    images = []
    for word in words:
        pixels = draw_word(word, rng=rng).astype(np.float32)
        if spoilt:
            offsets = cv2.resize(rng.normal(0, 1.5, (8, 8, 2)).astype(np.float32), (64, 64))
            grid = np.stack(np.meshgrid(np.arange(64), np.arange(64)), axis=-1).astype(np.float32) + offsets
            pixels = cv2.remap(pixels, grid, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            pixels = cv2.GaussianBlur(pixels, (0, 0), float(rng.uniform(0.6, 1.4)))
            pixels += rng.normal(0, 14, pixels.shape)
        images.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return [word_prompt(word) for word in words], images


def measured(score: Score, prompts: list[str], images: list[Image.Image], **setting: Any) -> None:
    """Score two images to warm up, then all against the clock, and print the line."""
    score(prompts[:2], images[:2])
    began, cpu_began = time.perf_counter(), time.process_time()
    rewards = score(prompts, images)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    line = {
        "benchmark": "ocr",
        **setting,
        "images": len(images),
        "ms_per_image": round(1000 * seconds / len(images), 1),
        "cpu_ms_per_image": round(1000 * cpu_seconds / len(images), 1),
        "reward": round(statistics.fmean(rewards), 4),
        "exact": round(sum(value == 1 for value in rewards) / len(images), 4),
    }
    print(json.dumps(line), flush=True)


def as_it_comes() -> Score:
    """Return RapidOCR with its own defaults: every thread there is, the shorter side enlarged to 736."""
    import rapidocr

    recogniser = rapidocr.RapidOCR(params={"Global.log_level": "error"})

    def read(image: Image.Image) -> list[Piece]:
        result: Any = recogniser(image)
        return [Piece(text, float(score)) for text, score in zip(result.txts or (), result.scores or (), strict=True)]

    return lambda prompts, images: [ocr_score(p, read(image)) for p, image in zip(prompts, images, strict=True)]


def ours(**options: Any) -> Score:
    """Return the reward with these options."""
    reward = build_reward("OCR", device="cpu", **options)
    return lambda prompts, images: [float(value) for value in reward(prompts, image=images).rewards]


def phrases() -> None:
    prompts, images = phrase_images()
    measured(as_it_comes(), prompts, images, part="phrases", setting="RapidOCR defaults")
    for side, workers in SETTINGS:
        score = ours(detection_side=side, workers=workers)
        measured(score, prompts, images, part="phrases", detection_side=side, workers=workers)


def words(count: int) -> None:
    score = ours(workers=1)
    for spoilt in (False, True):
        prompts, images = word_images(count, spoilt=spoilt)
        for upscale, method in UPSCALES:
            size = (64 * upscale, 64 * upscale)
            large = [image.resize(size, Image.Resampling[method.upper()]) for image in images]
            measured(score, prompts, large, part="words", spoilt=spoilt, upscale=upscale, method=method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("phrases", "words"), default="phrases")
    parser.add_argument("--count", type=int, default=100, help="words of --part words")
    known = parser.parse_args()
    if known.part == "phrases":
        phrases()
    else:
        words(known.count)


if __name__ == "__main__":
    main()
