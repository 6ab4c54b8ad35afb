"""A short run of an image-text reward model, on as many processes as it is started on; see test_image_processes.py.

Arguments: where the results go, `ddp` or `fsdp`, and the share of in-batch negatives.
"""

import json
import sys
from pathlib import Path

from tests.reward_training.processes import join, units
from tests.reward_training.test_image_text_run import SMALL
from tiltflow.reward_training.fit_config import FitConfig
from tiltflow.reward_training.image_text_fit import ImageTextDataConfig, ImageTextModelConfig, build_image_text
from tiltflow.reward_training.trainer import RewardTrainer


def main(folder: Path, kind: str, negatives: float) -> None:
    group = join(kind)
    model = ImageTextModelConfig.model_validate({"from_scratch": SMALL, "in_batch_negatives": negatives})
    data = ImageTextDataConfig.model_validate(
        {
            "train": {"drawn": {"pairs": 21}},
            "validation": {"held_out": {"drawn": {"pairs": 9, "prompts": "test"}}},
            "weight_by_prompt": True,
        }
    )
    # The micro-batches of one process and of two are the same rows, and so are the negatives.
    config = FitConfig(
        batch_size=8, micro_batch_size=4 // group.world_size, lr=1e-3, max_epochs=2, validate_every=2, workers=1
    )
    trainer = RewardTrainer(build_image_text(model, data, seed=0), config, seed=0, distributed=group)
    steps = [dict(step.metrics) for step in trainer.run()]
    whole, shown = trainer.whole_model(), trainer.shown(4)
    if group.is_main:
        whole.save_pretrained(folder / "model")
        (folder / "steps.json").write_text(json.dumps(steps))
        (folder / "shown.json").write_text(json.dumps([note for each in shown["held_out"] for note in each.notes]))
        (folder / "units.json").write_text(json.dumps(units(trainer.model)))
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
