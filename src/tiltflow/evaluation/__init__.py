"""Checkpoint x prompts x rewards -> results with 95% intervals."""

from tiltflow.evaluation.measure import EvaluationConfig, choose_prompts, evaluate, to_picture
from tiltflow.evaluation.results import EvaluationResult, EvaluationRow, write_png
from tiltflow.evaluation.statistics import Estimate, estimate, estimate_stratified
from tiltflow.evaluation.summary import Difference, compare_table, few_prompts_note, paired_difference, summarise
from tiltflow.evaluation.watch import HackingWatch, Sign, held_out

__all__ = [
    "Difference",
    "Estimate",
    "EvaluationConfig",
    "EvaluationResult",
    "EvaluationRow",
    "HackingWatch",
    "Sign",
    "choose_prompts",
    "compare_table",
    "estimate",
    "estimate_stratified",
    "evaluate",
    "few_prompts_note",
    "held_out",
    "paired_difference",
    "summarise",
    "to_picture",
    "write_png",
]
