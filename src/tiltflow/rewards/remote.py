"""Rewards that a server in another environment computes; a sample that it cannot score is a failure of its own."""

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator

from tiltflow.errors import RewardError
from tiltflow.rewards.base import (
    GroupwiseRewardModel,
    PointwiseRewardModel,
    RewardArguments,
    RewardModel,
    RewardModelOutput,
)
from tiltflow.rewards.payload import Parcel, Parcels, RequestForm, pack_group, pack_pointwise
from tiltflow.rewards.retries import Patience, RemoteRewardError, RewardClient
from tiltflow.rewards.secrets import Secret
from tiltflow.rewards.transport import AttemptError, ServerSettings
from tiltflow.serving import wire
from tiltflow.types import Config

if TYPE_CHECKING:
    import httpx2

DEFAULT_TIMEOUT: Final = 60.0  # seconds per request, where the reward's entry sets none
ANSWER_SECONDS: Final = 5.0  # how long a server may take to answer at all when the reward is built
LOADING_SECONDS: Final = 600.0  # how long one that answers may go on loading its model then
PAUSE: Final = 0.25  # seconds between two looks
ALIKE: Final = {"revision", "preproc", "dtype", "pixels", "groupwise"}  # what servers of one reward agree about

_log = logging.getLogger(__name__)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class RemoteOptions(Config):
    """Options of rewards that a server computes."""

    server_url: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]  # one, or a list of equals
    model: str | None = None  # "name" or "name@revision"; None: the only one that the server has
    required_fields: tuple[str, ...] = ("prompt", "image")  # what is sent
    pixels: Literal["auto", "uint8", "float32"] = "auto"  # auto: what the model scores as in one process
    retry_attempts: int = Field(default=3, ge=1)  # tries of one request that a server may have worked on
    partial: Literal["allow", "forbid"] = "allow"  # forbid: one sample's failure fails its whole request
    token: Secret | None = None  # saved configs show stars in its place
    token_env: str | None = Field(default=None, min_length=1)  # the environment variable that holds the token

    @field_validator("server_url")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            scheme, _, rest = url.partition("://")
            if scheme not in ("http", "https") or not rest.strip("/") or "@" in rest or "?" in rest or "#" in rest:
                raise ValueError("give addresses such as http://localhost:8000; a token has keys of its own")
        return tuple(dict.fromkeys(url.rstrip("/") for url in urls))

    @field_validator("required_fields")
    @classmethod
    def _something(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError(f"name what the server needs, of: {', '.join(wire.FIELDS)}")
        return names

    @field_validator("token_env")
    @classmethod
    def _one_token(cls, name: str | None, info: Any) -> str | None:
        if name is not None and info.data.get("token") is not None:
            raise ValueError("give token or token_env, not both")
        return name


class RemoteRewardModel(RewardModel):
    """What pointwise and groupwise remote rewards share.

    A copy that went through pickle has no connections and makes its own.
    """

    remote = True
    times_itself = True
    default_timeout = DEFAULT_TIMEOUT
    Options = RemoteOptions
    packages = ("httpx2", "stamina")
    running_options = ("retry_attempts", "partial")
    groupwise: ClassVar[bool]
    partner: ClassVar[str]  # the class for models that this one is not for

    @classmethod
    def how_run(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Name the server's address too where `model` is given: else it decides which model it is."""
        return (*cls.running_options, "server_url") if options.get("model") else cls.running_options

    def __init__(
        self,
        config: RewardArguments,
        accelerator: Any = None,
        *,
        transport: "httpx2.BaseTransport | None" = None,
    ):
        """Find the servers, and learn from them what the model is and takes.

        Args:
            config: The reward's entry.
            accelerator: Not used; scores come back to the CPU.
            transport: Takes the place of the network in tests.

        Raises:
            RewardError: No server answers, they do not have the model or disagree about it, it needs fields that are
                not in `required_fields` or is not of this class's kind, a package is missing, or the token.
        """
        super().__init__(config, accelerator)
        options: RemoteOptions = self.options
        settings = ServerSettings(config.name, options.server_url, options.token, options.token_env)
        patience = Patience(config.timeout or DEFAULT_TIMEOUT, options.retry_attempts, config.num_workers)
        self._client = RewardClient(settings, patience, transport=transport)
        self._client.check()
        self.required_fields = options.required_fields
        self.info = self._meet(options)
        pixels = self.info.pixels if options.pixels == "auto" else options.pixels
        self.use_tensor_inputs = pixels == "float32"
        self._form = RequestForm(
            model=self.info.name,
            asked=options.model or self.info.name,
            revision=self.info.revision,
            partial=options.partial,
            limits=self.info.limits,
            batch_pixels=self.info.batch_pixels,
        )

    @classmethod
    def fields_for(cls, options: RemoteOptions) -> tuple[str, ...]:
        """Return what is sent."""
        return options.required_fields

    @classmethod
    def call_seconds(cls, config: RewardArguments) -> float:
        """Return the time of the requests that a call takes at most: of single samples, or of one group."""
        requests = 1 if cls.groupwise else config.batch_size
        return requests * (config.timeout or DEFAULT_TIMEOUT)

    def close(self) -> None:
        """Close all connections; they are made again if the reward is asked after all."""
        self._client.close()

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
        metadata: Any = None,
    ) -> RewardModelOutput:
        """Send samples to a server and return its scores.

        A call that takes several requests loses no score by one that fails: its samples are failures with its reason.

        Raises:
            RemoteRewardError: The servers refused or failed the one request that the call took.
        """
        columns = (prompt, image, video, condition_images, condition_videos, metadata)
        given = dict(zip(wire.FIELDS, columns, strict=True))
        fields = {name: values for name, values in given.items() if values is not None}
        packed = self._pack(fields)
        count = len(next(iter(fields.values()), ()))
        merged = _Merged(count, self.info.name, packed.failures)
        lost: RemoteRewardError | None = None
        for parcel in packed.parcels:
            if lost is not None:
                merged.fail(parcel, lost)  # it would only wait as long for the same
                continue
            try:
                self._exchange(parcel, fields, merged)
            except RemoteRewardError as error:
                if len(parcel.places) == count:
                    raise
                merged.fail(parcel, error)
                lost = error if error.for_all else None
        return merged.output()

    def _exchange(self, parcel: Parcel, fields: Mapping[str, Sequence[Any]], merged: "_Merged") -> None:
        """Send a request and note the answers; samples that failed in passing are sent once more.

        Raises:
            RemoteRewardError: There was no reply.
        """
        progress = self._client.begin()
        reply = self._client.send(parcel, progress)
        merged.add(parcel, reply)
        failed = {
            place: result.error
            for place, result in zip(parcel.places, reply.results, strict=True)
            if result.error is not None
        }
        passing = {place: error for place, error in failed.items() if error.retryable}
        if not passing or not self._client.wait_for_items(progress, passing.values()):
            return
        places, before = (parcel.places, len(failed)) if self.groupwise else (tuple(passing), len(passing))
        for again in self._pack({name: [values[place] for place in places] for name, values in fields.items()}).parcels:
            moved = replace(again, places=tuple(places[place] for place in again.places))
            try:
                reply = self._client.send(moved, progress)
            except RemoteRewardError as error:  # the first reply stands
                _log.info("reward %r: samples sent again were not answered: %s", self.config.name, error)
                continue
            if sum(result.error is not None for result in reply.results) < before:
                merged.add(moved, reply)

    @abstractmethod
    def _pack(self, fields: Mapping[str, Sequence[Any]]) -> Parcels:
        """Return samples as requests."""

    def _meet(self, options: RemoteOptions) -> wire.ModelInfo:
        """Return what the model is, with the least of what its servers take."""
        known = self._ask_servers(options)
        (first_url, first), *others = known.items()
        told = first.model_dump(include=ALIKE)
        for url, info in others:
            for name, value in info.model_dump(include=ALIKE).items():
                if value != told[name]:
                    raise RewardError(
                        f"reward {self.config.name!r}: server_url lists servers that disagree about {first.name!r}: "
                        f"{name} is {told[name]!r} at {first_url} and {value!r} at {url}; their scores cannot be mixed"
                    )
        if first.groupwise != self.groupwise:
            kind = "compares the samples of a group" if first.groupwise else "scores each sample on its own"
            raise RewardError(
                f"reward {self.config.name!r}: {first.name!r} at {first_url} {kind}; use reward_model: {self.partner}"
            )
        absent = [name for name in first.required_fields if name not in self.required_fields]
        if absent:
            fields = [name for name in wire.FIELDS if name in {*first.required_fields, *self.required_fields}]
            raise RewardError(
                f"reward {self.config.name!r}: {first.name!r} at {first_url} requires {absent[0]!r}; write "
                f"required_fields: [{', '.join(fields)}]"
            )
        limits = [info.limits.model_dump() for info in known.values()]
        least = {name: min(each[name] for each in limits) for name in limits[0]}
        pixels = [info.batch_pixels for info in known.values() if info.batch_pixels is not None]
        return first.model_copy(
            update={"limits": wire.Limits.model_validate(least), "batch_pixels": min(pixels, default=None)}
        )

    def _ask_servers(self, options: RemoteOptions) -> dict[str, wire.ModelInfo]:
        """Return what each server that answers says of the model, waiting while all of them are still loading it."""
        began = time.monotonic()
        told = False
        while True:
            known: dict[str, wire.ModelInfo] = {}
            silent: list[str] = []
            for url, answer in zip(options.server_url, self._ask_all(options.server_url), strict=True):
                if not isinstance(answer, AttemptError):
                    known[url] = self._choose(url, answer, options.model)
                elif answer.retryable:
                    silent.append(str(answer))
                else:
                    raise RewardError(f"reward {self.config.name!r}: {answer}") from answer
            ready = {url: info for url, info in known.items() if info.state in ("", "READY")}
            took = time.monotonic() - began
            if ready:
                for problem in silent:
                    _log.warning("reward %r goes on without one of its servers: %s", self.config.name, problem)
                return ready
            if took > (LOADING_SECONDS if known else ANSWER_SECONDS):
                raise RewardError(self._nobody(known, silent, took))
            if known and not told:
                told = True
                _log.warning("reward %r waits for %s to load its model", self.config.name, ", ".join(known))
            time.sleep(PAUSE)

    def _ask_all(self, urls: Sequence[str]) -> list[list[wire.ModelInfo] | AttemptError]:
        def ask(url: str) -> list[wire.ModelInfo] | AttemptError:
            try:
                return self._client.transport.models(url, timeout=ANSWER_SECONDS)
            except AttemptError as error:
                return error

        with ThreadPoolExecutor(len(urls)) as pool:
            return list(pool.map(ask, urls))

    def _choose(self, url: str, models: Sequence[wire.ModelInfo], wanted: str | None) -> wire.ModelInfo:
        names = sorted({info.name for info in models})
        if wanted is None:
            if len(models) == 1:
                return self._not_failed(url, models[0])
            raise RewardError(
                f"reward {self.config.name!r}: {url} serves {', '.join(names) or 'no model'}; name one with model"
            )
        for info in models:
            if info.name == wanted.partition("@")[0]:
                return self._not_failed(url, info)
        raise RewardError(
            f"reward {self.config.name!r}: model={wanted!r}: {url} does not serve it; it serves: {', '.join(names)}"
        )

    def _not_failed(self, url: str, info: wire.ModelInfo) -> wire.ModelInfo:
        if info.state == "FAILED":
            raise RewardError(
                f"reward {self.config.name!r}: {url} could not load {info.name!r}; what its server printed says why"
            )
        return info

    def _nobody(self, known: Mapping[str, wire.ModelInfo], silent: Sequence[str], took: float) -> str:
        if known:
            states = ", ".join(f"{info.name!r} at {url} is {info.state}" for url, info in known.items())
            return f"reward {self.config.name!r}: no server is ready after {took:.3g} s: {states}"
        why = "; ".join(silent)
        return f"reward {self.config.name!r}: no reward server answers: {why}; start it, or correct server_url"


class RemotePointwiseRewardModel(RemoteRewardModel, PointwiseRewardModel):
    """Scores each sample on its own, on a server."""

    groupwise = False
    partner = "RemoteGroupwiseRewardModel"

    def _pack(self, fields: Mapping[str, Sequence[Any]]) -> Parcels:
        return pack_pointwise(fields, self._form)


class RemoteGroupwiseRewardModel(RemoteRewardModel, GroupwiseRewardModel):
    """Scores all samples of one prompt together, on a server; a group is always sent whole."""

    groupwise = True
    partner = "RemotePointwiseRewardModel"

    def _pack(self, fields: Mapping[str, Sequence[Any]]) -> Parcels:
        return pack_group(fields, self._form)


class _Merged:
    """The replies to one call's requests, by the places of their samples."""

    def __init__(self, count: int, model: str, failures: Mapping[int, Exception]):
        self._model = model
        self._rewards = torch.full((count,), torch.nan)
        self._extra: dict[str, list[Any]] = {}
        self._failures = dict(failures)

    def add(self, parcel: Parcel, reply: wire.ScoreReply) -> None:
        """Put one reply's answers in their places, over those that an earlier one may have had."""
        for place, result in zip(parcel.places, reply.results, strict=True):
            self._forget(place)
            if result.error is not None:
                self._failures[place] = RemoteRewardError(f"{result.error.code}: {result.error.message}")
                continue
            self._rewards[place] = result.scores[self._model]
            for key, value in result.components.get(self._model, {}).items():
                self._extra.setdefault(key, [None] * len(self._rewards))[place] = value

    def _forget(self, place: int) -> None:
        self._failures.pop(place, None)
        self._rewards[place] = torch.nan
        for values in self._extra.values():
            values[place] = None

    def fail(self, parcel: Parcel, error: Exception) -> None:
        """Note that a request has no reply."""
        self._failures.update(dict.fromkeys(parcel.places, error))

    def output(self) -> RewardModelOutput:
        """Return all of them; a sample without score is NaN."""
        return RewardModelOutput(self._rewards, self._extra, self._failures)
