"""Validation examples as people look at them: pictures beside each other, and what the model says of each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from tiltflow.reward_training.base import Shown
from tiltflow.runtime.files import replacing_folder

FOLDER: Final = "examples"
INDEX: Final = "examples.json"  # in it: [{"set": "held_out", "caption": ..., "images": [file], "notes": [text]}]
COUNT: Final = 16  # over all validation sets
SIDE: Final = 320  # pixels; larger images are shrunk


def pictures(example: Shown) -> list[Image.Image]:
    """Return the images of an example, large ones shrunk."""
    found = [Image.fromarray(image.cpu().numpy()) for image in example.images]
    for image in found:
        image.thumbnail((SIDE, SIDE))
    return found


def write_shown(run_dir: Path, examples: Mapping[str, Sequence[Shown]]) -> None:
    """Write examples into `<run_dir>/examples/`, in place of those of an earlier validation.

    Args:
        run_dir: The folder of a run.
        examples: By validation set.

    Raises:
        CheckpointError: The system refused to write.
    """
    with replacing_folder(run_dir / FOLDER) as folder:
        index: list[dict[str, object]] = []
        for name, shown in examples.items():
            for example in shown:
                files = [f"{len(index):02d}_{place}.png" for place in range(len(example.images))]
                for file, image in zip(files, pictures(example), strict=True):
                    image.save(folder / file)
                index.append({"set": name, "caption": example.caption, "images": files, "notes": list(example.notes)})
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
