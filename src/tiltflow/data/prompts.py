"""Prompt sets: named ones, plain text files and metadata files."""

import difflib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tiltflow.data.geneval import generate_prompts
from tiltflow.errors import DataError
from tiltflow.types import Prompt

Split = Literal["train", "test"]
PACKAGED = Path(__file__).parent / "prompts"
# name -> splits that come with the package; the other split is looked for under prompts/ in the working directory.
PROMPT_SETS: Mapping[str, tuple[Split, ...]] = {
    "shapes": ("train", "test"),
    "words": ("train", "test"),
    "geneval": ("train", "test"),
    "ocr": ("test",),
    "pickscore": (),
    "drawbench": ("test",),
}
# Sets that the drawn worlds make themselves; imported when asked for, since the demo room lies above this one.
DRAWN_SETS: Mapping[str, str] = {"shapes": "tiltflow.demo.prompts", "words": "tiltflow.demo.words"}
GENEVAL_TRAINING_PROMPTS = 50_000


def load_prompts(source: str, *, split: Split, blocklist: Sequence[str] = ()) -> list[Prompt]:
    """Load a prompt set.

    Args:
        source: A named set, or a path: `.txt` has one prompt a line, `.jsonl` one object with `prompt` a line.
        split: Which part of a named set; a path is taken as it is.
        blocklist: Prompts that contain one of these strings (whatever their case) are left out.

    Raises:
        DataError: The set is unknown, or the file is missing, empty or malformed (names the line).
    """
    prompts = _named(source, split) if source in PROMPT_SETS else read_prompt_file(_existing(source))
    blocked = [word.lower() for word in blocklist]
    kept = [prompt for prompt in prompts if not any(word in prompt.text.lower() for word in blocked)]
    if not kept:
        raise DataError(f"prompts {source!r}: the blocklist leaves none of {len(prompts)} prompts; shorten it")
    return kept


def read_prompt_file(path: Path, *, promptless: bool = False) -> list[Prompt]:
    """Read a `.txt` or `.jsonl` prompt file; blank lines are skipped.

    Args:
        path: Of the file.
        promptless: Lines of a `.jsonl` file may have no `prompt`, which then is empty.

    Raises:
        DataError: The file is missing, empty, of another kind, or has a malformed line.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"prompt file {path}: ends in {path.suffix!r}; write .txt (a prompt a line) or .jsonl")
    try:
        # Not splitlines(): characters such as U+2028 may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt file {path} cannot be read: {error}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError(f"prompt file {path} is empty; write at least one prompt")
    if path.suffix == ".txt":
        return [Prompt(line) for _, line in numbered]
    return [_from_json(path, number, line, promptless=promptless) for number, line in numbered]


def _from_json(path: Path, number: int, line: str, *, promptless: bool) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
    if promptless and isinstance(record, dict) and "prompt" not in record:
        return Prompt("", record)
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise DataError(f'{path}, line {number}: needs an object with a non-empty "prompt" string; got {line[:80]!r}')
    return Prompt(record["prompt"], {key: value for key, value in record.items() if key != "prompt"})


def _named(name: str, split: Split) -> list[Prompt]:
    if name in DRAWN_SETS:
        return _from_lines(import_module(DRAWN_SETS[name]).split_prompts(split))
    local = [Path("prompts") / name / f"{split}{ending}" for ending in (".jsonl", ".txt")]
    packaged = [PACKAGED / f"{name}_{split}{ending}" for ending in (".jsonl", ".txt")]
    for path in [*packaged, *local]:
        if path.exists():
            return read_prompt_file(path)
    if (name, split) == ("geneval", "train"):
        test = [dict(prompt.metadata) for prompt in _named("geneval", "test")]
        return _from_lines(generate_prompts(GENEVAL_TRAINING_PROMPTS, seed=0, exclude=test))
    raise DataError(
        f"the {split} prompts of {name!r} do not come with the package; put them into {local[1]} (one prompt a line) "
        "or give the path of your own file; docs/prompts.md tells where published sets can be found"
    )


def _from_lines(lines: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    return [Prompt(line["prompt"], {key: value for key, value in line.items() if key != "prompt"}) for line in lines]


def _existing(source: str) -> Path:
    path = Path(source)
    if path.exists():
        return path
    near = difflib.get_close_matches(source, PROMPT_SETS, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"prompts {source!r}: no such file or set{hint}. Named sets: {', '.join(PROMPT_SETS)}")
