"""Image files to be scored, each with its prompt."""

import glob
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiltflow.data.prompts import read_prompt_file
from tiltflow.errors import DataError
from tiltflow.runtime.pixels import to_rgb, upright
from tiltflow.types import Prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageFile:
    """One image on the disk and what it should show.

    Example: `ImageFile(Path("images/000.png"), Prompt("a photo of a star"))`.
    """

    path: Path
    prompt: Prompt

    def load(self) -> Tensor:
        """Return the image as RGB, float32 `[3, H, W]` in [0, 1].

        Raises:
            DataError: The file is missing, damaged or no image.
        """
        return read_pixels(self.path, name=f"image {self.path}").permute(2, 0, 1).contiguous().float() / 255


def read_pixels(image: bytes | Path, *, name: str) -> Tensor:
    """Return an image as RGB, uint8 `[H, W, 3]`: upright, and of 16 bits per channel the upper 8.

    Args:
        image: A file, or its content.
        name: What the message of an error calls it.

    Raises:
        DataError: The file is missing, damaged or no image.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
            pixels = np.asarray(to_rgb(upright(file)))
    except Exception as error:  # each format's reader fails on a damaged file in its own way
        raise DataError(f"{name} cannot be read: {error}") from error
    return torch.from_numpy(pixels.copy())


def find_images(source: str, prompts: str | None = None) -> list[ImageFile]:
    """Find images and the prompt of each.

    Args:
        source: A folder (its images in the order of their names), a glob pattern, or a `.jsonl` file with `image` (a
            path, relative to the file) and, maybe, `prompt` a line; everything else in a line is metadata.
        prompts: A `.txt` or `.jsonl` prompt file with one line per image, in the same order; what else its lines have
            joins the metadata. Without it, an image that has no prompt of its own has the empty one.

    Raises:
        DataError: There is no image, a line lacks its image, or the numbers of images and prompts differ.
    """
    if source.endswith(".jsonl"):
        files = _from_lines(Path(source))
    else:
        paths = _paths(source)
        if not paths:
            raise DataError(f"images {source!r}: no image there; give a folder, a glob pattern or a .jsonl file")
        files = [ImageFile(path, Prompt("")) for path in paths]
    if prompts is None:
        return files
    lines = read_prompt_file(Path(prompts))
    if len(lines) != len(files):
        raise DataError(f"{len(files)} images in {source!r} and {len(lines)} prompts in {prompts!r}; give one each")
    return [
        ImageFile(file.path, Prompt(line.text, {**file.prompt.metadata, **line.metadata}))
        for file, line in zip(files, lines, strict=True)
    ]


def _paths(source: str) -> Sequence[Path]:
    folder = Path(source)
    found = folder.iterdir() if folder.is_dir() else map(Path, glob.glob(source, recursive=True))
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())


def _from_lines(path: Path) -> list[ImageFile]:
    files: list[ImageFile] = []
    for number, line in enumerate(read_prompt_file(path, promptless=True), start=1):
        metadata = dict(line.metadata)
        image = metadata.pop("image", None)
        if not isinstance(image, str) or not image:
            raise DataError(f'{path}, entry {number}: has no "image"; write the path of an image file')
        files.append(ImageFile(path.parent / image, Prompt(line.text, metadata)))
    return files
