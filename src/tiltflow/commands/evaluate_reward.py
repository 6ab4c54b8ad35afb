"""`tiltflow evaluate-reward`: how often a language reward model prefers what people prefer."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from tiltflow.data.preferences import Preference, read_preferences
from tiltflow.data.records import LeftOut, OnBad
from tiltflow.errors import ConfigError, DataError
from tiltflow.evaluation.reward_bench import Accuracies, ScoredPair, accuracies
from tiltflow.evaluation.statistics import Estimate
from tiltflow.reward_training.language_build import max_length
from tiltflow.reward_training.language_config import LanguageDataConfig
from tiltflow.reward_training.language_data import OverLength, Tokenizing
from tiltflow.runtime.files import make_folder, write_atomically
from tiltflow.scorers import LanguageRewardModel
from tiltflow.scorers.language_head import DTYPES

AsConversation = Literal["auto", "yes", "no"]
CHUNK = 256  # pairs between two looks of the progress bar


def run_reward_evaluation(
    model: str,
    data: Sequence[str],
    *,
    output: Path | None = None,
    as_conversation: AsConversation = "auto",
    length: int | None = None,
    over_length: OverLength = "truncate",
    on_bad_record: OnBad = "error",
    dtype: str = "float32",
) -> tuple[Accuracies, Path, dict[str, int]]:
    """Score preferences and write what came out.

    Args:
        model: Folder of a language reward model, or a hub repository in the cache.
        data: Files, folders or `owner/name@split` of the hub, with `chosen`, `rejected`, and maybe `prompt` and
            `subset`; pairs without a subset are one of their source's name.
        output: The result, JSON; the scores of every pair go beside it, as .jsonl.
        as_conversation: Whether a prompt and an answer that are texts go through the chat template: `auto`, if they
            did in training, or, where the model does not tell, if it has one; a text without prompt is then taken as it
            is.
        length: Tokens that a text may have; None: what the network can read, at most 4096.
        over_length: What happens to a longer one; counted.
        on_bad_record: What happens to a record that cannot be used; counted.
        dtype: In which the network computes.

    Returns:
        The accuracies, where they were written, and what was left out or shortened, and how often.

    Raises:
        RewardError: The model cannot be loaded.
        ConfigError: An argument is wrong, or the head gives several numbers.
        DataError: The data cannot be used, or nothing of it is left.
    """
    path = output or Path("outputs") / "reward_evaluation" / f"{Path(model).resolve().name}.json"
    if path.suffix != ".json":
        raise ConfigError(f"--output {path}: the result is JSON; end the name in .json")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = LanguageRewardModel.from_pretrained(model, require_head=True, device=device, dtype=DTYPES[dtype]).eval()
    if not network.head.scalar:
        network.head = network.head.model_copy(update={"merge_attributes": True})
    left_out = LeftOut(on_bad_record)
    limit = max_length(network, LanguageDataConfig(train="", max_length=length))
    tokenizing = Tokenizing(network, max_length=limit, over_length=over_length, left_out=left_out)
    chat: bool | Literal["prompted"] = as_conversation == "yes"
    if as_conversation == "auto" and network.takes_conversations:
        chat = "prompted"
    kept, rows = _encoded(_preferences(data, left_out, chat), tokenizing)
    notes = dict(tokenizing.notes + Counter({f"{kind}, left out": n for kind, n in left_out.counts.items()}))
    if not kept:
        raise DataError(f"data {', '.join(data)}: no pair is left ({notes})")
    scores = _scores(network, rows)
    pairs = [
        ScoredPair(each.place, each.subset, scores[2 * place], scores[2 * place + 1]) for place, each in enumerate(kept)
    ]
    found = accuracies(pairs)
    _write(path, found, pairs, {"model": model, "data": list(data), "max_length": limit, "notes": notes})
    return found, path, notes


def _preferences(
    data: Sequence[str], left_out: LeftOut, as_conversation: bool | Literal["prompted"]
) -> list[Preference]:
    found: list[Preference] = []
    for source in data:
        name = Path(source.partition("@")[0]).stem
        for each in read_preferences(source, left_out=left_out, as_conversation=as_conversation):
            found.append(each if each.subset else replace(each, subset=name))
    return found


def _encoded(preferences: Sequence[Preference], tokenizing: Tokenizing) -> tuple[list[Preference], list[Any]]:
    """Return the pairs that are not left out, and the tokens of their texts, two rows each."""
    kept: list[Preference] = []
    rows: list[Any] = []
    for preference in preferences:
        tokens = tokenizing.tokens((preference.chosen, preference.rejected), preference.place)
        if tokens is not None:
            kept.append(preference)
            rows += tokens
    return kept, rows


def _scores(network: LanguageRewardModel, rows: Sequence[Any]) -> list[float]:
    scores: list[float] = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("texts", total=len(rows))
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            scores += network.score_encoded(chunk).tolist()
            bar.advance(task, len(chunk))
    return scores


def _write(path: Path, found: Accuracies, pairs: Sequence[ScoredPair], about: dict[str, Any]) -> None:
    make_folder(path.parent)
    content = {
        **about,
        "pairs": len(pairs),
        "overall": _told(found.overall),
        "sections": {name: _told(each) for name, each in found.sections.items()},
        "subsets": {name: _told(each) for name, each in found.subsets.items()},
    }
    write_atomically(path, json.dumps(content, indent=1))
    write_atomically(path.with_suffix(".jsonl"), "".join(f"{json.dumps(vars(pair))}\n" for pair in pairs))


def _told(each: Estimate) -> dict[str, float]:
    return {"accuracy": each.value, "low": each.low, "high": each.high, "pairs": each.count}
