"""What each command does: builds the parts that a config names and puts them to work."""

from tiltflow.commands.build import EMBEDDED_MODELS, build_policy, build_trainer
from tiltflow.commands.doctor import doctor_report
from tiltflow.commands.evaluate import run_evaluation
from tiltflow.commands.evaluate_reward import run_reward_evaluation
from tiltflow.commands.pretrain import run_pretraining
from tiltflow.commands.reward_config import REWARD_MODEL_TYPES, find_kind, load_reward_config
from tiltflow.commands.sample import run_sampling
from tiltflow.commands.score import failure_causes, run_scoring, summary_table, without_score
from tiltflow.commands.serve import CallSettings, run_serving
from tiltflow.commands.train import run_training
from tiltflow.commands.train_reward import run_reward_training

__all__ = [
    "EMBEDDED_MODELS",
    "REWARD_MODEL_TYPES",
    "CallSettings",
    "build_policy",
    "build_trainer",
    "doctor_report",
    "failure_causes",
    "find_kind",
    "load_reward_config",
    "run_evaluation",
    "run_pretraining",
    "run_reward_evaluation",
    "run_reward_training",
    "run_sampling",
    "run_scoring",
    "run_serving",
    "run_training",
    "summary_table",
    "without_score",
]
