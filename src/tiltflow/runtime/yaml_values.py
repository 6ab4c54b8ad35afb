"""YAML files and values typed on a command line, as mappings of plain values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tiltflow.errors import ConfigError

NO_VALUE: Final = "\0"  # of a key that was typed without one; no word of a command line can hold it


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or holds something else than a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not valid YAML: {_one_line(error)}") from error
    if values is None:
        raise ConfigError(f"config {path} is empty; it must hold a mapping of keys")
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must hold a mapping of keys; it holds {type(values).__name__}")
    for key in values:
        if not isinstance(key, str):  # YAML reads a bare `on` or `1` so
            raise ConfigError(f"config {path}: key {key!r} is no text; put it in quotes")
    return values


def parse_value(key: str, text: str, *, as_text: bool = False) -> Any:
    """Read an override's value as YAML; `1e-4`, which YAML takes for a string, is a number.

    Args:
        key: Named in the message of an error.
        text: What was typed.
        as_text: The key holds text: a project called `2024` or `1e5` stays one, only `null` is none.

    Raises:
        ConfigError: It is not YAML, or there is none.
    """
    if text == NO_VALUE:
        raise ConfigError(f"--{key} needs a value")
    if as_text and text not in ("null", "~", ""):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        typed = "" if "{" in text or ":" in text else f" {text!r}"  # a mapping may hold secrets
        raise ConfigError(f"--{key}{typed} is not a valid YAML value: {_one_line(error)}") from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in a nested mapping, copying the sections on the way.

    Raises:
        ConfigError: A section on the way is something else than a mapping.
    """
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, Mapping | None):
            raise ConfigError(f"--{key}: {section} must be a mapping of keys in the config; it is {inner!r}")
        values[section] = dict(inner or {})
        values = values[section]
    values[last] = value


def _one_line(error: yaml.YAMLError) -> str:
    """Return what is wrong and the line, counted from 1, without YAML's excerpt of the file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
