"""Pictures made of many images: plain grids, and the labelled before/after picture."""

import math
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tiltflow.errors import DataError
from tiltflow.evaluation import to_picture, write_png
from tiltflow.report.contents import Pair, Shot, pairs, read_run

GAP = 2  # pixels between the images of a grid
INK, PAPER, QUIET = (28, 28, 32), (255, 255, 255), (110, 110, 118)
RIGHT, WRONG = (22, 130, 60), (190, 40, 40)


def save_grid(images: Tensor, path: Path, *, columns: int) -> None:
    """Write images as one PNG, row by row.

    Args:
        images: `[B, 3, H, W]` in [0, 1].
        path: The file; folders above it are made.
        columns: Images a row.

    Raises:
        ValueError: There is no image, or no column.
        CheckpointError: The system refused to write.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError(f"{len(images)} images in {columns} columns make no grid; give at least one of each")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[-2:]
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(to_picture(image), (column * (width + GAP), row * (height + GAP)))
    write_png(sheet, path)


def before_after_picture(run_dir: Path, path: Path, *, pairs: int = 8, scale: int = 3) -> None:
    """Write the picture for a README: the same prompts and noise before and after training, side by side.

    The pairs are spread evenly over all that the evaluations kept, not picked by how they look. A tick or a cross marks
    images that a reward judged strictly.

    Args:
        run_dir: The folder of a run with both evaluations.
        path: The PNG.
        pairs: How many pairs, four a row.
        scale: Whole number that enlarges every image.

    Raises:
        DataError: The folder is missing, or holds no pair of images.
        CheckpointError: The system refused to write.
    """
    both = [(pair, *loaded) for pair in _pairs(run_dir, pairs) if (loaded := _load(pair, scale=scale)) is not None]
    if not both:
        raise DataError(
            f"{run_dir / 'evaluations'} holds no image of one prompt both before and after; evaluate with "
            "evaluation.keep_images above 0"
        )
    side_w, side_h = both[0][1].size
    font = ImageFont.load_default(size=15)
    columns, margin = min(4, len(both)), 14
    wrap = max(12, int(2 * side_w / 7.6))
    captions = [textwrap.wrap(pair.prompt, wrap)[:3] or [""] for pair, _, _ in both]
    cell_w, cell_h = 2 * side_w + 4, side_h + 24 + 19 * max(map(len, captions))
    rows = math.ceil(len(both) / columns)
    sheet = Image.new("RGB", (margin + columns * (cell_w + margin), margin + rows * (cell_h + margin)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, ((pair, old, new), caption) in enumerate(zip(both, captions, strict=True)):
        row, column = divmod(index, columns)
        left, top = margin + column * (cell_w + margin), margin + row * (cell_h + margin)
        for side, picture, label, shot in ((0, old, "before", pair.before), (1, new, "after", pair.after)):
            x = left + side * (side_w + 4)
            draw.text((x, top), label, font=font, fill=QUIET)
            sheet.paste(picture, (x, top + 20))
            _mark(draw, shot, x=x + side_w - 16, y=top + 2)
        for number, line in enumerate(caption):
            draw.text((left, top + side_h + 24 + 19 * number), line, font=font, fill=INK)
    write_png(sheet, path)


def _pairs(run_dir: Path, limit: int) -> list[Pair]:
    return pairs(read_run(run_dir), limit=limit)


def _load(pair: Pair, *, scale: int) -> tuple[Image.Image, Image.Image] | None:
    """Return both images of a pair enlarged, or None where one is missing."""
    if pair.before is None or pair.after is None:
        return None
    old, new = (_enlarged(shot.path, scale) for shot in (pair.before, pair.after))
    return old, new


def _enlarged(path: Path, scale: int) -> Image.Image:
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
    return rgb.resize((rgb.width * scale, rgb.height * scale), Image.Resampling.NEAREST)


def _mark(draw: ImageDraw.ImageDraw, shot: Shot | None, *, x: int, y: int) -> None:
    """Draw a tick or a cross of 14 pixels; no font is sure to have them."""
    if shot is None or shot.strict is None:
        return
    if shot.strict:
        draw.line([(x, y + 7), (x + 5, y + 12), (x + 14, y + 1)], fill=RIGHT, width=3)
    else:
        draw.line([(x + 1, y + 1), (x + 13, y + 13)], fill=WRONG, width=3)
        draw.line([(x + 1, y + 13), (x + 13, y + 1)], fill=WRONG, width=3)
