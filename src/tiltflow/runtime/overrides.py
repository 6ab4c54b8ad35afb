"""Values typed over those of a config: `--train.lr 1e-4`, `--lr=1e-4`, `--tag_shares.colors 2`."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from tiltflow.errors import ConfigError
from tiltflow.runtime.yaml_values import NO_VALUE, parse_value, set_key


def read_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Read `--key value` and `--key=value` pairs; a key without a value has `NO_VALUE`.

    Raises:
        ConfigError: A word belongs to no key.
    """
    pairs: list[tuple[str, str]] = []
    waiting = False
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            pairs.append((key, value if equals else NO_VALUE))
            waiting = not equals
        elif waiting:
            pairs[-1] = (pairs[-1][0], word)
            waiting = False
        else:
            raise ConfigError(
                f"{word!r} belongs to no option; options are written --name value, and a list, a pattern or a text "
                "with spaces in quotes"
            )
    return pairs


def override(
    values: Mapping[str, Any], overrides: Sequence[tuple[str, str]], schema: type[BaseModel]
) -> dict[str, Any]:
    """Return a config's values with overrides set; neither argument is changed.

    Raises:
        ConfigError: A key is unknown, ambiguous or without a value, a value is not YAML, or a section of the file is
            not a mapping.
    """
    result = dict(values)
    for key, text in overrides:
        full = resolve_key(key, schema)
        set_key(result, full, parse_value(key, text, as_text=_is_text(schema, full)))
    return result


def resolve_key(key: str, schema: type[BaseModel]) -> str:
    """Return the full dotted name of a key given in full or by the last part of exactly one key.

    Raises:
        ConfigError: No key or several keys match; lists the candidates.
    """
    matches = matching_keys(key, schema)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"--{key} is ambiguous; it could be: {', '.join(matches)}")
    keys = list(dotted_keys(schema))
    last_parts = {full.rpartition(".")[2]: full for full in keys}
    near = [
        last_parts.get(name, name) for name in difflib.get_close_matches(key, [*keys, *last_parts], n=3, cutoff=0.6)
    ]
    hint = f"; nearest: {', '.join(dict.fromkeys(near))}" if near else f"; keys: {', '.join(keys)}"
    raise ConfigError(f"--{key} is not a key of the config{hint}")


def matching_keys(key: str, schema: type[BaseModel]) -> list[str]:
    """Return the full names that a key may stand for: one where it is given in full, or those that end in it.

    Keys of sections that a config may leave out count where no others match. A key may go on into a mapping.
    """
    if _annotation(schema, key) is not None:
        return [key]
    every = list(dotted_keys(schema))
    always = set(dotted_keys(schema, optional=False))
    parts = key.split(".")
    for cut in range(len(parts), 0, -1):
        head, rest = ".".join(parts[:cut]), "".join(f".{part}" for part in parts[cut:])
        owners = [full for full in every if f".{full}".endswith(f".{head}")]
        found = [full for full in owners if _annotation(schema, full + rest) is not None]
        if found:
            return [full + rest for full in found if full in always] or [full + rest for full in found]
    return []


def dotted_keys(schema: type[BaseModel], prefix: str = "", *, optional: bool = True) -> Iterator[str]:
    """Yield every key of a schema, sections included, in full dotted form.

    Args:
        schema: The config class.
        prefix: Put before every key.
        optional: Whether the keys of sections that may be null are among them.
    """
    for name, info in schema.model_fields.items():
        yield prefix + name
        for each in _alternatives(info.annotation):
            if _is_section(each) and (optional or each is info.annotation):
                yield from dotted_keys(each, f"{prefix}{name}.", optional=optional)


def _annotation(schema: Any, key: str) -> Any:
    """Return what is written at a full key, an entry of a mapping included; None if there is no such key."""
    name, dot, rest = key.partition(".")
    for each in _alternatives(schema):
        inner: Any = None
        if _is_section(each) and name in each.model_fields:
            inner = each.model_fields[name].annotation
        elif get_origin(each) in (dict, Mapping) and name:
            inner = get_args(each)[1]
        if inner is not None:
            return _annotation(inner, rest) if dot else inner
    return None


def _is_text(schema: type[BaseModel], key: str) -> bool:
    """Tell whether a key of the schema holds text, or text or nothing."""
    return set(_alternatives(_annotation(schema, key))) - {type(None)} == {str}


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
