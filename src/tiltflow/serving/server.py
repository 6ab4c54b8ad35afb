"""`RewardServer`: a reward of one's own behind HTTP.

class MyRewardServer(RewardServer):
    def setup(self):
        self.model = load_my_model()

    def compute_reward(self, prompts, images=None):
        return [self.model.score(prompt, image) for prompt, image in zip(prompts, images)]

if __name__ == "__main__":
    MyRewardServer(port=8000).run()
"""

import hashlib
import operator
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tiltflow.errors import ConfigError
from tiltflow.serving.jobs import Sample, ScorerSource
from tiltflow.serving.settings import ServerSettings
from tiltflow.serving.wire import FIELDS, Limits, ModelInfo, Pixels, WireError

IMPORTED_MAIN: Final = "__mp_main__"  # what multiprocessing calls the main file in a process that it has started
_FIELD_OF: Final = {  # argument of compute_reward -> field of a sample
    "images": "image",
    "videos": "video",
    "condition_images": "condition_images",
    "condition_videos": "condition_videos",
    "metadata": "metadata",
}


class RewardServer(ABC):
    """Serves one reward; subclass it, implement `compute_reward` and call `run`.

    The object that you make only starts the server. Each worker process makes another one, with the same arguments,
    and calls its `setup` and then its `compute_reward`. So load models in `setup`: what the constructor loads is loaded
    here too.
    """

    required_fields: ClassVar[tuple[str, ...]] = ("prompt", "image")  # an item without one of them is refused
    optional_fields: ClassVar[tuple[str, ...]] = ("image", "video")  # passed too where the samples have them
    groupwise: ClassVar[bool] = False  # gets all samples of one group in one call, and nothing else
    use_array_inputs: ClassVar[bool] = False  # True: uint8 arrays [H, W, 3] instead of PIL images
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *arguments: Any, **options: Any) -> "RewardServer":
        """Remember the arguments, with which the worker processes make their own."""
        self = super().__new__(cls)
        self._arguments = (arguments, options)
        return self

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        insecure: bool = False,
        replicas: int = 1,
        batch_size: int = 16,
        batch_pixels: int | None = None,
        batch_tokens: int | None = None,
        batch_seconds: float = 60.0,
        load_seconds: float = 1800.0,
        name: str | None = None,
        revision: str = "",
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        drain_seconds: float = 30.0,
    ):
        """Check the settings; nothing is started yet.

        Args:
            host: Where to listen; another address than this machine's own needs a token, or `insecure`.
            port: 0 takes a free one.
            token: What clients must send; None takes the environment variable TILTFLOW_SERVER_TOKEN, if set.
            insecure: Answer anyone who can reach the address.
            replicas: Worker processes, each with a model of its own.
            batch_size: Most samples of one call.
            batch_pixels: Most pixels of one call; None: 64 x 1024 x 1024.
            batch_tokens: Most tokens of one call's prompts, at four bytes each; None: 65,536.
            batch_seconds: After so long a call counts as hung: its worker is killed and replaced.
            load_seconds: After so long without being ready the model counts as failed.
            name: Of the model; None: the class's.
            revision: Of the model, told with every score; empty: a hash of the file that defines the class.
            limits: Of requests.
            drain_seconds: After SIGTERM, for what is in flight.

        Raises:
            ConfigError: A setting is wrong.
        """
        _check_positive(
            replicas=replicas, batch_size=batch_size, batch_seconds=batch_seconds, load_seconds=load_seconds
        )
        for key, named in (("required_fields", self.required_fields), ("optional_fields", self.optional_fields)):
            unknown = [field for field in named if field not in FIELDS]
            if unknown:
                raise ConfigError(f"{key} names {unknown[0]!r}; legal fields: {', '.join(FIELDS)}")
        self.name = name or type(self).__name__
        if "@" in self.name or "/" in self.name:
            raise ConfigError(f"name={self.name!r}: leave out @ and /, which requests and addresses give a meaning")
        self.settings = ServerSettings(
            host=host, port=port, token=token, insecure=insecure, limits=limits, drain_seconds=drain_seconds
        )
        self.replicas = replicas
        self.batch_size = batch_size
        self.batch_pixels = batch_pixels
        self.batch_tokens = batch_tokens
        self.batch_seconds = batch_seconds
        self.load_seconds = load_seconds
        self.revision = revision

    def setup(self) -> None:  # noqa: B027  # what the constructor does may be enough
        """Load the model; called once in each worker process, before the first call of `compute_reward`."""

    @abstractmethod
    def compute_reward(
        self,
        prompts: list[str],
        images: list[Any] | None = None,
        videos: list[list[Any]] | None = None,
        condition_images: list[list[Any]] | None = None,
        condition_videos: list[list[list[Any]]] | None = None,
        metadata: list[dict[str, Any]] | None = None,
    ) -> Sequence[float]:
        """Score B samples.

        Only fields that `required_fields` or `optional_fields` name are passed, and of these only those that the
        samples have, so a shorter signature will do.

        Args:
            prompts: B texts.
            images: B pictures: PIL images in RGB, or arrays (see `use_array_inputs`).
            videos: B lists of frames.
            condition_images: B lists of pictures that the samples were made from.
            condition_videos: B lists of videos that the samples were made from.
            metadata: B mappings.

        Returns:
            B finite numbers. An exception fails the samples that cause it: the batch is tried again in parts.
        """

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            ConfigError: A package is missing, or the worker processes could not import this class.
            SystemExit: The address cannot be had, or the model could not be made; says which, with status 1.
        """
        cls = type(self)
        if "settings" not in vars(self):
            raise ConfigError(f"{cls.__name__}.__init__ does not call super().__init__(**kwargs)")
        if cls.__module__ == IMPORTED_MAIN:
            raise ConfigError(
                f"a worker process that imports your file to find {cls.__name__} started the server again: start it "
                'under `if __name__ == "__main__":`'
            )
        arguments, options = self._arguments
        _check_importable(cls, arguments, options)
        try:
            from tiltflow.serving.running import ModelSpec, run_server
        except ImportError as error:
            raise ConfigError(
                f"serving needs a package that is missing ({error}): pip install 'tiltflow[serve]'"
            ) from error
        source = ScorerSource(
            make_scorer,
            {"server": cls, "arguments": arguments, "options": options},
            borrows=not self.use_array_inputs,
        )
        spec = ModelSpec(
            self.name,
            source,
            replicas=self.replicas,
            batch_size=self.batch_size,
            batch_pixels=self.batch_pixels,
            batch_tokens=self.batch_tokens,
            batch_seconds=self.batch_seconds,
            load_seconds=self.load_seconds,
        )
        note = ""
        if cls.__init__ is not RewardServer.__init__ and cls.setup is RewardServer.setup:
            note = f"what {cls.__name__}.__init__ loads is loaded in this process too, for nothing; load it in setup()"
        try:
            run_server([spec], self.settings, note=note)
        except ConfigError as error:  # told in one line: nothing of it is a mistake in the caller's code
            sys.exit(f"tiltflow: {error}")


class UserScorer:
    """A `RewardServer` in its worker process, as a scorer."""

    def __init__(self, server: RewardServer):
        """Let the server load what it needs."""
        server.setup()
        self._server = server

    def describe(self) -> ModelInfo:
        """Return what `/v1/models` tells of it."""
        server = self._server
        return ModelInfo(
            name=server.name,
            revision=server.revision or _revision_of(type(server)),
            groupwise=server.groupwise,
            required_fields=server.required_fields,
            batch_size=server.batch_size,
        )

    def score(
        self, samples: Sequence[Sample]
    ) -> tuple[Sequence[float], Mapping[str, Sequence[Any]], Mapping[int, str | WireError]]:
        """Call `compute_reward` with the fields that the samples have."""
        known = {*self._server.required_fields, *self._server.optional_fields}
        fields: dict[str, list[Any]] = {
            "images": [None if sample.image is None else self._picture(sample.image) for sample in samples],
            "videos": [None if sample.video is None else self._frames(sample.video) for sample in samples],
            "condition_images": [
                None if sample.condition_images is None else [self._picture(each) for each in sample.condition_images]
                for sample in samples
            ],
            "condition_videos": [
                None if sample.condition_videos is None else [self._frames(each) for each in sample.condition_videos]
                for sample in samples
            ],
            "metadata": [None if sample.meta is None else dict(sample.meta) for sample in samples],
        }
        given = {
            name: column
            for name, column in fields.items()
            if _FIELD_OF[name] in known and any(value is not None for value in column)
        }
        rewards = self._server.compute_reward([sample.prompt for sample in samples], **given)
        return [float(reward) for reward in rewards], {}, {}

    def _picture(self, array: Pixels) -> Any:
        levels = to_levels(array)
        return levels if self._server.use_array_inputs else Image.fromarray(levels)

    def _frames(self, array: Pixels) -> list[Any]:
        return [self._picture(frame) for frame in array]


def make_scorer(server: type[RewardServer], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> UserScorer:
    """Make the scorer of a worker process from the class and arguments of the server that was started."""
    return UserScorer(server(*arguments, **options))


def to_levels(array: Pixels) -> NDArray[np.uint8]:
    """Return a picture as levels `[H, W, 3]`, those of `[3, H, W]` in [0, 1] rounded."""
    if array.dtype == np.uint8:
        return np.asarray(array, dtype=np.uint8)
    levels = np.rint(array * np.float32(255)).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, -3, -1))


def _revision_of(cls: type[RewardServer]) -> str:
    """Return a hash of the file that defines a class, so that a client notices another one under the same address."""
    path = vars(sys.modules[cls.__module__]).get("__file__")
    if path is None or not Path(path).is_file():
        return ""
    return f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"


def _check_positive(**settings: float) -> None:
    for key, value in settings.items():
        if value <= 0:
            raise ConfigError(f"{key}={value}: use a number above 0")


def _check_importable(cls: type[RewardServer], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    module = sys.modules.get(cls.__module__)
    remedy = "define it at the top level of a file or module that can be imported, and start that"
    if module is None or (cls.__module__ == "__main__" and "__file__" not in vars(module)):
        raise ConfigError(f"{cls.__name__}: worker processes cannot import it from {cls.__module__!r}; {remedy}")
    try:
        found = operator.attrgetter(cls.__qualname__)(module)
    except AttributeError:
        found = None
    if found is not cls:
        raise ConfigError(f"{cls.__qualname__}: worker processes cannot import it from {cls.__module__!r}; {remedy}")
    try:
        pickle.dumps((arguments, dict(options)))
    except Exception as error:  # any object may refuse in its own way
        raise ConfigError(
            f"{cls.__name__}: its arguments cannot be sent to worker processes ({type(error).__name__}: {error}); pass "
            "plain values and load models in setup()"
        ) from error
