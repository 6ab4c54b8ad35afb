"""Seeds derived from named parts, so that every random draw of a run can be repeated by itself."""

import hashlib
import json

import torch


def derive_seed(seed: int, *parts: int | str) -> int:
    """Derive a stable 63-bit seed from a base seed and the parts that name a purpose.

    The first 63 bits of sha256 over the JSON list `[seed, *parts]`. JSON keeps the parts apart, so that
    `(1, 23)` and `(12, 3)`, or `1` and `"1"`, give different seeds. The result depends on neither the process,
    the machine nor the Python hash seed.

    Args:
        seed: The seed of the run.
        *parts: What the draw is for, such as `(epoch, group, "rollout noise")`.

    Returns:
        An integer in [0, 2**63).

    Raises:
        TypeError: A part is neither an int nor a str; a float, for instance, has no single stable text.

    Example:
        >>> derive_seed(0, 3, "prompts") == derive_seed(0, 3, "prompts")
        True
    """
    for part in (seed, *parts):
        if not isinstance(part, int | str):
            raise TypeError(f"seed part {part!r} is a {type(part).__name__}; a part must be an int or a str")
    # `int(...)` makes True and 1 the same part, as they are equal in Python.
    plain = [part if isinstance(part, str) else int(part) for part in (seed, *parts)]
    digest = hashlib.sha256(json.dumps(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded with `derive_seed(seed, *parts)`.

    The CPU generator of torch seeds itself with the low 32 bits only, so two purposes share a CPU stream with
    probability 2**-32; CUDA generators use all bits.

    Args:
        seed: The seed of the run.
        *parts: What the draws are for.
        device: Where the draws will be made; CPU and CUDA streams of one seed differ.
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *parts))
