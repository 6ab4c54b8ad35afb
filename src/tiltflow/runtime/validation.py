"""Values against a config class: every problem in one line that names the key, and shows no secret."""

import difflib
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError

from tiltflow.errors import ConfigError
from tiltflow.runtime.overrides import dotted_keys, resolve_key


def validate(schema: type[Any], values: Any, *, source: str, overrides: Sequence[tuple[str, str]] = ()) -> Any:
    """Validate values against a config class.

    Args:
        schema: The class.
        values: A mapping, or what else the class takes.
        source: Where they are from, for messages.
        overrides: (key, value) pairs that have been set over the source; messages of these name them instead.

    Raises:
        ConfigError: The first problems: an unknown key with the nearest one, a missing key, or a wrong value.
    """
    try:
        return schema.model_validate(dict(values) if isinstance(values, Mapping) else values)
    except ValidationError as error:
        problems = [(".".join(map(str, problem["loc"])), problem) for problem in error.errors()]
        # Entries that are wrong do not count, so that their list may seem too short as well.
        real = [
            (path, problem)
            for path, problem in problems
            if problem["type"] != "too_short" or not any(other.startswith(f"{path}.") for other, _ in problems)
        ]
        typed = {resolve_key(key, schema): f"--{key}" for key, _ in overrides}
        lines = [f"{_origin(path, typed, source)}: {_describe(path, problem, schema)}" for path, problem in real[:5]]
        raise ConfigError("\n".join(lines)) from error


def shown(value: Any) -> str:
    """Return a value for a message; of a mapping or a list, which may hold secrets, only that it is one."""
    if value is None or isinstance(value, str | int | float | date):
        return f"{value!r:.100}"
    if isinstance(value, Mapping | BaseModel):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _origin(path: str, typed: Mapping[str, str], source: str) -> str:
    """Return where the value at a path is from: the override that set it or a section around it, or the source."""
    around = [full for full in typed if f"{path}.".startswith(f"{full}.")]
    return typed[max(around, key=len)] if around else source


def _describe(path: str, problem: Any, schema: type[BaseModel]) -> str:
    value, message = problem.get("input"), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path!r}{_nearest(path, schema)}"
    if problem["type"] == "missing":
        return f"key {path!r} is missing; it has no default"
    if isinstance(value, list | tuple) and not value:
        return f"{path}=[]: {message}"
    if isinstance(value, list | tuple | Mapping | BaseModel):
        got = "" if problem["type"] == "value_error" else f"; got {shown(value)}"
        return f"{path}: {message}{got}" if path else message + got
    return f"{path}={shown(value)}: {message}" if path else f"{shown(value)}: {message}"


def _nearest(path: str, schema: type[BaseModel]) -> str:
    """Return a hint at the key that an unknown one is nearest to: one of its own section before any other."""
    section, _, name = path.rpartition(".")
    last_parts = {full: full.rpartition(".")[2] for full in dotted_keys(schema)}
    own = [full for full in last_parts if full.rpartition(".")[0] == section]
    for keys in (own, list(last_parts)):
        near = difflib.get_close_matches(name, [last_parts[full] for full in keys], n=1, cutoff=0.6)
        if near:
            return f"; did you mean {next(full for full in keys if last_parts[full] == near[0])!r}?"
    return f"; keys of {section or 'the config'}: {', '.join(last_parts[full] for full in own)}"
