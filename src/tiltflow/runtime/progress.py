"""The progress of a run on the console."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class ProgressBar:
    """A progress bar over epochs, or steps, on stderr; plain lines when stderr is no terminal.

    Args:
        total: The last epoch, counted from 1.
        start: Epochs that a resumed run has behind it.
        title: Shown in front.
        unit: What is counted, if not epochs.
        line_every: A plain line for every so many of them, and for the last.
        enabled: False prints nothing at all.
        clock: Seconds of a clock that never goes back.

    Example:
        >>> with ProgressBar(30, title="ram", enabled=False) as bar:
        ...     bar.status("rollout 3/6")
        ...     bar.advance(reward=0.61, rate=24.1)
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        title: str = "train",
        unit: str = "epoch",
        line_every: int = 1,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.done = start
        self._unit = unit
        self._line_every = line_every
        self._enabled = enabled
        self._clock = clock
        # The last few epochs only: the first ones of a run are slower (compilation, caches).
        self._ends: deque[float] = deque(maxlen=11)
        self._progress: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn(title, markup=False),
                TextColumn(unit + " {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}", markup=False),
                TimeElapsedColumn(),
                _TimeLeft(self.seconds_left),
                TextColumn("{task.fields[stage]}", style="dim", markup=False),
                console=Console(stderr=True),
                expand=True,
            )
            self._task = self._progress.add_task(title, total=total, completed=start, numbers="", stage="")

    def begin(self) -> None:
        """Start the clock of the first epoch; what came before it (loading, an evaluation) tells nothing about it."""
        self._ends.clear()
        self._ends.append(self._clock())

    def advance(self, *, reward: float | None = None, rate: float | None = None, **more: float) -> None:
        """Count one finished epoch.

        Args:
            reward: Its mean reward; None or NaN is left out.
            rate: Samples per second; None or NaN is left out.
            **more: Other numbers under their names; NaN is left out.
        """
        self.done += 1
        self._ends.append(self._clock())
        shown = {**more} if reward is None else {"reward": reward, **more}
        parts = [f"{name} {value:.4g}" for name, value in shown.items() if not math.isnan(value)]
        if rate is not None and not math.isnan(rate):
            parts.append(f"{rate:.1f} samples/s")
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done, numbers="  ".join(parts), stage="")
        elif self._enabled and (self.done % self._line_every == 0 or self.done == self.total):
            line = [f"{self._unit} {self.done}/{self.total}", *parts, f"left {format_duration(self.seconds_left())}"]
            print("  ".join(line), file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        """Show the stage within the epoch, such as "rollout 3/6"; only on a terminal."""
        if self._progress is not None:
            self._progress.update(self._task, stage=text)

    def seconds_left(self) -> float | None:
        """Estimate the time to the end from the last ten epochs; None before the first one has ended."""
        if len(self._ends) < 2:
            return None
        per_epoch = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(0.0, per_epoch * (self.total - self.done) - (self._clock() - self._ends[-1]))

    def __enter__(self) -> "ProgressBar":
        self.begin()
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()


class _TimeLeft(ProgressColumn):
    """Time to the end; rich's own column forgets epochs that take longer than half a minute."""

    def __init__(self, seconds_left: Callable[[], float | None]) -> None:
        super().__init__()
        self._seconds_left = seconds_left

    def render(self, task: Task) -> Text:
        return Text(f"left {format_duration(self._seconds_left())}")


def format_duration(seconds: float | None) -> str:
    """Format seconds as "4:10" or "1:04:10"; None as "?"."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
