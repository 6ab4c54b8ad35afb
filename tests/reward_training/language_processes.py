"""A short run of a language reward model, on as many processes as it is started on; see test_language_run.py.

Arguments: the model's folder, the pairs, where the results go, and `ddp` or `fsdp`.
"""

import json
import sys
from pathlib import Path

from tests.reward_training.processes import join
from tiltflow.reward_training import FitConfig, LanguageDataConfig, LanguageModelConfig, RewardTrainer, build_language

CONFIG = FitConfig(
    batch_size=8, micro_batch_size=3, lr=0.003, max_epochs=1, validate_at_start=True, max_grad_norm=0.5, workers=0
)


def main(base: str, pairs: str, output: Path, kind: str) -> None:
    group = join(kind)
    fitting = build_language(
        LanguageModelConfig(reward_model_type="binary_ranking", pretrained=base, length_buckets=3),
        LanguageDataConfig(train=pairs, validation=pairs),
    )
    batch = fitting.train.batch(share := list(group.share(range(6))), [1.0] * len(share))
    loss, metrics = fitting.model.get_loss_and_metrics(batch)
    trainer = RewardTrainer(fitting, CONFIG, seed=3, distributed=group)
    steps = [dict(step.metrics) for step in trainer.run()]
    model = trainer.whole_model()
    if group.is_main:
        model.save_pretrained(output / "model")
    answers = {"steps": steps, "loss": loss.item(), "metrics": metrics}
    (output / f"rank{group.rank}.json").write_text(json.dumps(answers))
    group.gather(None)
    group.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
