"""Secrets among the options of rewards, which are shown in nothing that is saved, printed or tracked.

An option whose annotation is `SecretStr` is one, in a reward of one's own too.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, get_args

from pydantic import BeforeValidator, SecretStr

from tiltflow.types import Config

STARS: Final = str(SecretStr("any"))  # what is shown in place of a secret


def _as_text(value: Any) -> Any:
    # YAML reads a token of digits as a number; a message about that would show it.
    return str(value) if isinstance(value, int | float) else value


Secret = Annotated[SecretStr, BeforeValidator(_as_text)]


def secret_names(options: type[Config]) -> tuple[str, ...]:
    """Return the names of the options that hold a secret."""
    return tuple(name for name, field in options.model_fields.items() if _is_secret(field.annotation))


def secret_keys(options: type[Config]) -> frozenset[str]:
    """Return the names of the options that hold a secret, or name the environment variable that does."""
    names = secret_names(options)
    return frozenset(key for name in names for key in (name, f"{name}_env") if key in options.model_fields)


def sealed(options: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as they were given, but for secrets, which no longer show themselves.

    Args:
        options: What they are read as.
        given: As they stand in a config.
    """
    values = dict(options)
    defaults = {name: field.default for name, field in type(options).model_fields.items()}
    # A default is no secret: the word that servers without a key want can stay readable.
    hidden = [name for name in secret_names(type(options)) if name in given and values[name] != defaults[name]]
    return {**given, **{name: values[name] for name in hidden}}


def starred(options: Config) -> str | None:
    """Return the first secret that is none: a saved config shows stars in its place."""
    values = dict(options)
    for name in secret_names(type(options)):
        if isinstance(values[name], SecretStr) and values[name].get_secret_value() == STARS:
            return name
    return None


def _is_secret(annotation: Any) -> bool:
    return annotation is SecretStr or any(_is_secret(part) for part in get_args(annotation))
