"""`tiltflow evaluate-reward`: how often a reward model, of language or of images, prefers what people prefer."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from tiltflow.commands.evaluate_pairs import PairEvaluation, evaluate_pairs
from tiltflow.commands.reward_results import RewardOutcome, result_path, source_names, write_result
from tiltflow.config import validate
from tiltflow.data.preferences import Preference, read_preferences
from tiltflow.data.records import LeftOut, OnBad
from tiltflow.errors import ConfigError, DataError
from tiltflow.evaluation.pair_bench import told
from tiltflow.evaluation.reward_bench import ScoredPair, accuracies, accuracy_table
from tiltflow.reward_training.language_build import max_length
from tiltflow.reward_training.language_data import OverLength, Tokenizing, Tokens
from tiltflow.rewards.base import auto_device
from tiltflow.scorers import LanguageRewardModel
from tiltflow.scorers.language_head import reward_attribute
from tiltflow.scorers.model_kinds import ModelKind, model_kind
from tiltflow.types import DTYPES, Config

Dtype = Literal["float32", "bfloat16"]
CHUNK = 256  # texts between two looks of the progress bar


class LanguageEvaluation(Config):
    """What can be chosen for a language model."""

    # Whether a prompt and an answer that are texts go through the chat template: `auto`, if they did in training, or,
    # where the model does not tell, if it has one; a text without prompt is then taken as it is.
    as_conversation: Literal["auto", "yes", "no"] = "auto"
    columns: Mapping[str, str] = Field(default_factory=dict[str, str])  # expected name -> the data's own
    max_length: int | None = Field(default=None, ge=1)  # tokens; None: what the network can read, at most 4096
    over_length: OverLength = "truncate"
    attribute: str | None = None  # name or number, of a model that gives several


def run_reward_evaluation(
    model: str,
    data: Sequence[str],
    *,
    output: Path | None = None,
    on_bad_record: OnBad = "error",
    dtype: Dtype = "float32",
    options: Mapping[str, Any] | None = None,
) -> tuple[RewardOutcome, Path]:
    """Score preferences and write what came out.

    Args:
        model: Folder of a reward model, or a hub repository in the cache.
        data: For a language model files, folders or `owner/name@split` of the hub, with `chosen`, `rejected`, and maybe
            `prompt`, `label` and `subset`; pairs without a subset are one of their source's name. For an image-text
            model a `source` of pairs as in `data.train`, or its whole mapping as YAML.
        output: The result, JSON; the scores of every pair go beside it, as .jsonl. None: into the model's run.
        on_bad_record: What happens to a record that cannot be used; counted.
        dtype: In which the network computes.
        options: Those of the kind of model: `LanguageEvaluation`, `PairEvaluation`.

    Returns:
        What came out, and where it was written.

    Raises:
        RewardError: The model cannot be loaded, or is none.
        ConfigError: An argument is wrong.
        DataError: The data cannot be used, or nothing of it is left.
    """
    schema, evaluates = _KINDS[model_kind(model)]
    given = dict(options or {})
    if foreign := [name for name in given if name not in schema.model_fields]:
        own = ", ".join(f"--{name}" for name in schema.model_fields)
        raise ConfigError(f"--{foreign[0]} is not for the kind of reward model in {model}; its own options are {own}")
    settings = validate(schema, given, source="evaluate-reward")
    path = result_path(model, data, output)
    outcome = evaluates(model, data, settings, on_bad_record=on_bad_record, dtype=dtype)
    write_result(path, outcome, model=model, data=data)
    return outcome, path


def evaluate_language(
    model: str, data: Sequence[str], settings: LanguageEvaluation, *, on_bad_record: OnBad, dtype: Dtype
) -> RewardOutcome:
    """Do the work of `run_reward_evaluation` for a language model."""
    device = auto_device()
    network = LanguageRewardModel.from_pretrained(model, require_head=True, device=device, dtype=DTYPES[dtype]).eval()
    column = reward_attribute(network.head, network.attribute_names, settings.attribute, option="--attribute")
    network.head = network.head.model_copy(update={"merge_attributes": True})
    left_out = LeftOut(on_bad_record)
    limit = max_length(network, settings.max_length, name="--max_length")
    tokenizing = Tokenizing(
        network, max_length=limit, over_length=settings.over_length, left_out=left_out, keep_identical=True
    )
    chat: bool | Literal["prompted"] = settings.as_conversation == "yes"
    if settings.as_conversation == "auto" and network.takes_conversations:
        chat = "prompted"
    kept, rows = _encoded(_preferences(data, left_out, settings.columns, chat), tokenizing)
    notes = dict(tokenizing.notes + Counter({f"{kind}, left out": n for kind, n in left_out.counts.items()}))
    if not kept:
        raise DataError(f"data {', '.join(data)}: no pair is left ({notes})")
    scores = _scores(network, rows, column)
    pairs = [
        ScoredPair(each.place, each.subset, *scores[2 * place : 2 * place + 2], label=each.label)
        for place, each in enumerate(kept)
    ]
    found = accuracies(pairs)
    counts = {"ties, left out": found.ties, "a reward that is not finite, left out": len(found.failures)}
    content = {
        "max_length": limit,
        "attribute": settings.attribute,
        "pairs": len(pairs),
        "ties": found.ties,
        "failures": list(found.failures),
        "overall": told(found.overall),
        "sections": {name: told(each) for name, each in found.sections.items()},
        "subsets": {name: told(each) for name, each in found.subsets.items()},
    }
    notes |= {kind: count for kind, count in counts.items() if count}
    return RewardOutcome(accuracy_table(found), content, [vars(pair) for pair in pairs], notes)


def _preferences(
    data: Sequence[str], left_out: LeftOut, columns: Mapping[str, str], as_conversation: bool | Literal["prompted"]
) -> list[Preference]:
    found: list[Preference] = []
    for source, name in zip(data, source_names(data), strict=True):
        for each in read_preferences(source, left_out=left_out, columns=columns, as_conversation=as_conversation):
            found.append(each if each.subset else replace(each, subset=name))
    return found


def _encoded(preferences: Sequence[Preference], tokenizing: Tokenizing) -> tuple[list[Preference], list[Tokens]]:
    """Return the pairs that are not left out, and the tokens of their texts, two rows each."""
    kept: list[Preference] = []
    rows: list[Tokens] = []
    for preference in preferences:
        tokens = tokenizing.tokens((preference.chosen, preference.rejected), preference.place)
        if tokens is not None:
            kept.append(preference)
            rows += tokens
    return kept, rows


def _scores(network: LanguageRewardModel, rows: Sequence[Tokens], column: int | None) -> list[float]:
    """Return a reward of every row; equal texts have equal ones, whatever batches they are in."""
    first = {row.tobytes(): row for row in rows}
    distinct, scores = list(first.values()), list[float]()
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("texts", total=len(distinct))
        for start in range(0, len(distinct), CHUNK):
            chunk: Any = distinct[start : start + CHUNK]
            found = network.score_encoded(chunk) if column is None else network.attributes(chunk)[:, column]
            scores += found.tolist()
            bar.advance(task, len(chunk))
    known = dict(zip(first, scores, strict=True))
    return [known[row.tobytes()] for row in rows]


_KINDS: Mapping[ModelKind, tuple[type[Config], Callable[..., RewardOutcome]]] = {
    "language": (LanguageEvaluation, evaluate_language),
    "image_text": (PairEvaluation, evaluate_pairs),
}
