"""The exception tree: every error a user can cause names the field, the value, the legal set and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_is_error() -> Iterator[None]:
    """Raise a RuntimeError in place of a library's `sys.exit`, which would end the process without a word.

    Raises:
        RuntimeError: What is within has called `sys.exit`.
    """
    try:
        yield
    except SystemExit as error:
        # With the traceback, whose innermost frame says where in the reader's own code it came from.
        raise RuntimeError(f"SystemExit: {error}").with_traceback(error.__traceback__) from error


class TiltflowError(Exception):
    """Base of every error that tiltflow raises on purpose; the command line prints its message without a traceback."""


class ConfigError(TiltflowError):
    """A config, an override or an option is wrong."""


class GeometryError(ConfigError):
    """Batch or epoch sizes do not fit each other."""


class DataError(TiltflowError):
    """A prompt, preference or image file is missing, empty or malformed."""


class CheckpointError(TiltflowError):
    """A checkpoint cannot be written, read or trusted."""


class TrainingError(TiltflowError):
    """An update cannot be made, such as one whose gradient is not finite."""


class RewardError(TiltflowError):
    """A reward cannot be built, or failed where failing is not allowed."""


class JudgeError(RewardError):
    """A model behind an endpoint was asked to judge, and there is no answer that can be used."""


class JudgeTimeoutError(JudgeError, TimeoutError):
    """There was none in time."""


class UnparsableError(JudgeError):
    """There was one, but it does not say what was asked for."""


class RewardOutage(RewardError):
    """Rewards failed so that an epoch or an evaluation was given up, on every process alike; nothing was learnt."""
