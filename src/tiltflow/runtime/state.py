"""Nested training state as safetensors and JSON: nothing is ever pickled."""

import json
import math
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from tiltflow.errors import CheckpointError
from tiltflow.runtime.files import replacing, write_atomically

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors of any device and layout to a safetensors file, atomically.

    Raises:
        CheckpointError: The system refused; the old file is untouched.
    """
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses two names for one memory (tied weights): the second becomes a copy.
        address = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if address in storages else value
        storages.add(address)
    with replacing(path) as temporary:
        save_file(plain, temporary)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        return load(path.read_bytes())  # not mapped: the file may be replaced or removed while they are in use
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the tensors of {path}: {error}") from error


def flatten_state(state: object) -> tuple[dict[str, Tensor], Json]:
    """Split a nest of dicts, lists, tuples, numbers, text, None and tensors into tensors and JSON.

    Args:
        state: Such as `optimizer.state_dict()`. Dict keys may be of any of the plain kinds (ints stay ints).

    Returns:
        The tensors under numbered names, and a JSON value that refers to them by `{"tensor": name}`.

    Raises:
        CheckpointError: Something in the nest is of another kind; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(state, tensors, "state")


def unflatten_state(tensors: dict[str, Tensor], structure: Json) -> object:
    """Undo `flatten_state`.

    Raises:
        CheckpointError: The JSON was not made by `flatten_state`, or refers to a tensor that is not there.
    """
    match structure:
        case None | bool() | int() | float() | str():
            return structure
        case list():
            return [unflatten_state(tensors, item) for item in structure]
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"tuple": list(items)}:
            return tuple(unflatten_state(tensors, item) for item in items)
        case {"dict": list(items)} if all(isinstance(item, list) and len(item) == 2 for item in items):
            pairs: Any = [unflatten_state(tensors, item) for item in items]
            return dict(pairs)
        case {"float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case _:
            raise CheckpointError(f"a saved state holds {str(structure)[:80]!r}, which flatten_state never writes")


def save_state(directory: Path, name: str, state: object) -> None:
    """Write a nested state as `<name>.safetensors` and `<name>.json`; see `flatten_state`.

    Raises:
        CheckpointError: The state holds something else, or the system refused.
    """
    tensors, structure = flatten_state(state)
    save_tensors(directory / f"{name}.safetensors", tensors)
    write_atomically(directory / f"{name}.json", json.dumps(structure, allow_nan=False))


def load_state(directory: Path, name: str) -> object:
    """Read what `save_state` wrote: an equal nest, its tensors on the CPU.

    Raises:
        CheckpointError: One of the two files is missing or damaged.
    """
    path = directory / f"{name}.json"
    try:
        structure: Json = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the state of {path}: {error}") from error
    return unflatten_state(load_tensors(directory / f"{name}.safetensors"), structure)


def _encode(value: object, tensors: dict[str, Tensor], where: str) -> Json:
    match value:
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value
            return {"tensor": name}
        case dict():
            pairs: list[Json] = []
            for key, item in value.items():
                at = f"{where}[{key!r}]"
                pairs.append([_encode(key, tensors, f"the key of {at}"), _encode(item, tensors, at)])
            return {"dict": pairs}
        case list() | tuple():
            encoded: list[Json] = [_encode(item, tensors, f"{where}[{index}]") for index, item in enumerate(value)]
            return encoded if isinstance(value, list) else {"tuple": encoded}
        case float():
            # JSON keeps every finite float exactly and has no word for the others.
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        case None | bool() | int() | str():
            return value
        case _:
            raise CheckpointError(
                f"{where} is a {type(value).__qualname__}; a state may hold dict, list, tuple, int, float, bool, str, "
                "None and Tensor: convert it before saving"
            )
