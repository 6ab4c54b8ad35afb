"""What runs of every kind do with their folder: go on from it, compare its config, log into it."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiltflow.commands.build import CONFIG_FILE
from tiltflow.config import RunConfig, dump, read_yaml
from tiltflow.errors import ConfigError
from tiltflow.reward_training.fit_config import FitRunConfig
from tiltflow.runtime.checkpoint import CheckpointStore, write_atomically
from tiltflow.runtime.distributed import Distributed
from tiltflow.runtime.files import make_folder
from tiltflow.runtime.tracking import TrackerGroup, build_trackers
from tiltflow.types import Config


@contextmanager
def start_trackers(
    config: RunConfig | FitRunConfig, run_dir: Path, resumed_after: int | None, distributed: Distributed
) -> Iterator[TrackerGroup]:
    """Write the config into the run's folder and start its trackers on the main process; the others have none.

    Args:
        config: Of the run.
        run_dir: The folder of the run, made if need be.
        resumed_after: The last step, or epoch, that a resumed run has behind it; None for a new run.
        distributed: The processes.
    """
    trackers = TrackerGroup([])
    with distributed.together():
        if distributed.is_main:
            make_folder(run_dir)
            trackers = build_trackers(
                config.tracking,
                run_dir,
                run_name=run_dir.name,
                run_config=config.model_dump(mode="json"),
                resume_step=None if resumed_after is None else resumed_after + 1,
            )
            write_atomically(run_dir / CONFIG_FILE, dump(config))
    with trackers:
        yield trackers


def newest_checkpoint(store: CheckpointStore, distributed: Distributed) -> Path | None:
    """Return the newest intact checkpoint, if there is one, on all ranks; the main process chooses it."""
    chosen: Path | None = None
    with distributed.together():
        if distributed.is_main and store.directory.exists():
            chosen = store.latest(on_skip=warn)
    return distributed.gather(chosen)[0]


def changed_keys(
    path: Path,
    config: Config,
    identity: tuple[str, ...],
    *,
    free: tuple[str, ...] = (),
    compared: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> list[str]:
    """Compare a run's saved config with the one it is resumed with.

    Args:
        path: The saved config; a missing one compares as equal.
        config: The new one.
        identity: Beginnings of the keys that make it another run.
        free: Keys among these that do not, with all that is under them.
        compared: Returns what counts of a config's values.

    Returns:
        One line per key that has changed.

    Raises:
        ConfigError: A key has changed that makes it another run.
    """
    if not path.is_file():
        return []
    before = _flatten(compared(read_yaml(path)))
    now = _flatten(compared(config.model_dump(mode="json")))
    lines = []
    for key in sorted({*before, *now} - {"output_dir"}):
        if before.get(key) == now.get(key):
            continue
        line = f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        if key.startswith(identity) and not any(f"{key}.".startswith(f"{name}.") for name in free):
            raise ConfigError(
                f"{path.parent} holds another run ({line}); choose another output_dir, or keep the value (of what has "
                f"only moved, such as a file, write the new place into {path} too)"
            )
        lines.append(line)
    return lines


def warn(message: str) -> None:
    """Tell the user something on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
