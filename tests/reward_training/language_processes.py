"""A short run of a language reward model, on as many processes as it is started on; see test_language_run.py.

Arguments: the kind of reward model, the model's folder, the data, where the results go, and `ddp` or `fsdp`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.reward_training.processes import join, units
from tiltflow.reward_training import FitConfig, LanguageDataConfig, LanguageModelConfig, RewardTrainer, build_language

CONFIG = FitConfig(
    batch_size=8, micro_batch_size=3, lr=0.003, max_epochs=1, validate_at_start=True, max_grad_norm=0.5, workers=0
)


HEAD = {"num_attributes": 2, "attribute_names": ["kind", "long"]}  # of ratings


def main(kind: str, base: str, data: str, output: Path, parallel: str) -> None:
    group = join(parallel)
    sections: dict[str, Any] = {"head": HEAD} if kind == "regression" else {}
    fitting = build_language(
        LanguageModelConfig.model_validate(
            {"reward_model_type": kind, "pretrained": base, "length_buckets": 3, "bucket_overhead": 1, **sections}
        ),
        LanguageDataConfig(train=data, validation=data),
    )
    calls: list[int] = []  # rows of each call of the network
    fitting.model.get_submodule("model").register_forward_hook(lambda module, inputs, found: calls.append(len(found)))
    batch = fitting.train.batch(share := list(group.share(range(6))), [1.0] * len(share))
    loss, metrics = fitting.model.get_loss_and_metrics(batch)
    trainer = RewardTrainer(fitting, CONFIG, seed=3, distributed=group)
    calls.clear()
    steps = [dict(step.metrics) for step in trainer.run()]
    answers = {"steps": steps, "loss": loss.item(), "metrics": metrics, "units": units(fitting.model), "calls": calls}
    model = trainer.whole_model()
    if group.is_main:
        model.save_pretrained(output / "model")
    (output / f"rank{group.rank}.json").write_text(json.dumps(answers))
    group.gather(None)
    group.close()


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]), sys.argv[5])
