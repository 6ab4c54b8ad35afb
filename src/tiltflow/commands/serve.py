"""`tiltflow serve`: rewards by name or Python path behind HTTP."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from tiltflow.config import normalise_rewards, parse_value, validate
from tiltflow.errors import ConfigError
from tiltflow.rewards import RewardArguments, check_reward, reward_class, sealed_reward
from tiltflow.serving.builtin import source_of
from tiltflow.serving.settings import ServerSettings
from tiltflow.serving.wire import Limits

BATCH_SECONDS: Final = 60.0  # of a call, at least, where nothing else is said
SLACK_SECONDS: Final = 30.0  # beyond a reward's own timeouts, for what it does besides waiting
UNKNOWN_SECONDS: Final = 3600.0  # for a reward that asks others and does not tell for how long


@dataclass(frozen=True)
class CallSettings:
    """How the worker processes of each reward are called."""

    replicas: int = 1  # worker processes of each reward
    batch_pixels: int | None = None  # of one call at most; None: the server's own limit
    batch_tokens: int | None = None  # likewise, of its prompts
    batch_seconds: float | None = None  # then a call counts as hung; None: what the reward's own timeouts allow, or 60
    load_seconds: float = 1800.0  # then a model that is not ready has failed


def run_serving(
    rewards: Sequence[str],
    *,
    host: str,
    port: int,
    token: str | None,
    insecure: bool,
    batch_size: int,
    calls: CallSettings,
    limits: Sequence[str],
    drain_seconds: float,
    engine: Literal["http", "ray"] = "http",
    scaling: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Serve rewards until SIGTERM or SIGINT; everything that can be checked is checked before a worker starts.

    Args:
        rewards: Names, Python paths, or YAML mappings such as `{reward_model: Geneval, detector: shapes}`.
        host: Where to listen.
        port: 0 takes a free one.
        token: What clients must send; None takes the environment variable.
        insecure: Answer anyone who can reach the address.
        batch_size: Samples per call of rewards that do not set their own.
        calls: Of every reward.
        limits: `name=value`, of `Limits`.
        drain_seconds: After SIGTERM, for what is in flight.
        engine: "http": one server, in this process; "ray": as many as the load asks for, on Ray Serve.
        scaling: Fields of `RaySettings`, for that engine alone.

    Raises:
        ConfigError: An option is wrong, a package is missing, the address cannot be had, or no reward could be built.
        RewardError: There is no such reward, or one of its options is wrong.
    """
    if scaling and engine != "ray":
        raise ConfigError(f"--{next(iter(scaling))} needs --engine ray; --replicas is for one server")
    arguments = _arguments(rewards, batch_size)
    settings = ServerSettings(
        host=host, port=port, token=token, insecure=insecure, limits=read_limits(limits), drain_seconds=drain_seconds
    )
    _start(arguments, settings, calls, engine=engine, scaling=scaling)


def _start(
    arguments: Sequence[RewardArguments],
    settings: ServerSettings,
    calls: CallSettings,
    *,
    engine: Literal["http", "ray"],
    scaling: Mapping[str, Any],
) -> None:
    try:
        from tiltflow.serving.ray_engine import RaySettings, run_on_ray
        from tiltflow.serving.running import ModelSpec, run_server
    except ImportError as error:
        raise ConfigError(
            f"serving needs a package that is missing ({error}): pip install 'tiltflow[serve]'"
        ) from error
    specs = [
        ModelSpec(
            entry.name,
            source_of(entry),
            replicas=calls.replicas,
            batch_size=entry.batch_size,
            batch_pixels=calls.batch_pixels,
            batch_tokens=calls.batch_tokens,
            batch_seconds=_batch_seconds(entry, calls.batch_seconds),
            load_seconds=calls.load_seconds,
        )
        for entry in arguments
    ]
    if engine == "ray":
        run_on_ray(specs, settings, RaySettings(**scaling))
    else:
        run_server(specs, settings)


def _batch_seconds(entry: RewardArguments, given: float | None) -> float:
    """Return after how long a call of a reward counts as hung.

    Raises:
        ConfigError: `given` would end calls that the reward's own timeouts allow.
    """
    own = reward_class(entry.reward_model).call_seconds(entry)
    if given is None:
        if own is None:
            return BATCH_SECONDS
        return UNKNOWN_SECONDS if math.isinf(own) else max(BATCH_SECONDS, own + SLACK_SECONDS)
    if own is not None and not math.isinf(own) and given <= own:
        raise ConfigError(
            f"--batch_seconds {given:g}: a call of {entry.name!r} may wait {own:g} s for those it asks (batch_size="
            f"{entry.batch_size}); leave --batch_seconds out, give more than {own:g}, or let it wait less: a smaller "
            "timeout or batch_size, or a larger max_concurrent where it has one"
        )
    return given


def read_limits(pairs: Sequence[str]) -> Limits:
    """Return limits of which some were given as `name=value`.

    Raises:
        ConfigError: One is unknown or no number.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in Limits.model_fields:
            near = difflib.get_close_matches(name, Limits.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"--limit {pair}: no limit is called {name!r}{hint}; limits: {', '.join(Limits.model_fields)}"
            )
        found[name] = value
    return validate(Limits, found, source="--limit")


def _arguments(rewards: Sequence[str], batch_size: int) -> list[RewardArguments]:
    entries: list[dict[str, Any]] = []
    for text in rewards:
        entries += normalise_rewards(parse_value("rewards", text), key="serve")
    arguments = [validate(RewardArguments, {"batch_size": batch_size, **entry}, source="serve") for entry in entries]
    for entry in arguments:
        check_reward(entry)
        if "@" in entry.name or "/" in entry.name:
            raise ConfigError(f"name={entry.name!r}: leave out @ and /, which requests and addresses give a meaning")
    names = [entry.name for entry in arguments]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{twice[0]!r} is served twice; give one of them another `name`")
    return [sealed_reward(entry) for entry in arguments]
