"""One request on its way through the models: which of them, what is missing, and what becomes of their answers."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from tiltflow.serving.jobs import Sample, Scored
from tiltflow.serving.models import ServedModel
from tiltflow.serving.requests import Parsed, Read
from tiltflow.serving.wire import Item, WireError

# Errors of one item; any other is one of the whole request, which may go better as a whole next time.
ITEM_CODES: Final = frozenset(
    {"image_decode_failed", "invalid_item", "nonfinite_score", "scorer_error", "upstream_judge"}
)
_ITEM: Final = re.compile(r"items\[(\d+)\](.*)")


@dataclass(frozen=True)
class Outcome:
    """What a request came to."""

    results: Sequence[Mapping[str, Any]]  # one per item, in their order, as they are told
    models: Sequence[Mapping[str, Any]]
    batch_size: int  # the largest call that one of the items was part of
    queue_ms: float  # the longest wait
    compute_ms: float  # the longest call
    error: WireError | None  # that of the first item that has one

    @property
    def counts(self) -> dict[str, int]:
        """Return how many items have a score, and how many do not."""
        ok = sum(result["status"] == "ok" for result in self.results)
        return {"ok": ok, "error": len(self.results) - ok}


def choose(models: Mapping[str, ServedModel], names: Sequence[str]) -> list[ServedModel]:
    """Return the models that a request names; it need not name the only one.

    Raises:
        WireError: `model_not_found`, or `invalid_request`.
    """
    if not names:
        if len(models) > 1:
            message = f"models is empty; name one or more of {', '.join(models)}"
            raise WireError("invalid_request", message, param="models")
        return list(models.values())
    chosen: dict[str, ServedModel] = {}
    for place, name in enumerate(names):
        bare, _, revision = name.partition("@")
        param = f"models[{place}]"
        if bare not in models:
            message = f"there is no model {bare!r}; this server has {', '.join(models)}"
            raise WireError("model_not_found", message, param=param)
        if bare in chosen:
            raise WireError("invalid_request", f"{bare!r} is named twice", param=param)
        here = models[bare].info.revision
        if revision and revision != here and models[bare].state == "READY":
            raise WireError("model_not_found", f"{bare!r} has the revision {here!r} here", param=param)
        chosen[bare] = models[bare]
    return list(chosen.values())


class Scoring:
    """The samples of one request in the hands of its models; leaving its `with` block takes back what is not done."""

    def __init__(self, models: Sequence[ServedModel], parsed: Parsed, *, deadline: float):
        """Submit every sound sample to every model.

        Args:
            models: Of the server.
            parsed: The request and its samples.
            deadline: On the monotonic clock.

        Raises:
            WireError: A model does not take them.
        """
        self._models = models
        self._request = parsed.request
        count = len(parsed.samples)
        self._errors: list[WireError | None] = [None] * count
        self._futures: list[list[asyncio.Future[Scored]]] = [[] for _ in range(count)]
        self._finished: asyncio.Queue[int] = asyncio.Queue()
        self._open = [0] * count  # futures that are not done
        try:
            self._submit(parsed.samples, deadline)
        except BaseException:
            self._cancel()
            raise

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cancel()

    async def finished(self) -> AsyncIterator[int]:
        """Yield the items as they are done.

        Raises:
            WireError: Something went wrong that is no item's own fault.
        """
        waiting = 0
        for index, futures in enumerate(self._futures):
            if futures:
                waiting += 1
            else:
                yield index
        for _ in range(waiting):
            index = await self._finished.get()
            for scored in self._answers(index):
                if scored.error is not None and scored.error.code not in ITEM_CODES:
                    raise scored.error
            yield index

    def result(self, index: int) -> dict[str, Any]:
        """Return what is told of an item that is done."""
        item = self._request.items[index]
        scores: dict[str, float] = {}
        components: dict[str, Mapping[str, Any]] = {}
        for model, scored in zip(self._models, self._answers(index), strict=False):  # none where it was no sample
            if scored.score is not None:
                scores[model.name] = scored.score
                if "components" in self._request.returns:
                    components[model.name] = scored.components
        error = self._error(index)
        return {
            "index": index,
            "id": item.id,
            "status": "ok" if error is None else "error",
            "scores": scores,
            "components": components,
            "error": None if error is None else error.body(),
        }

    def outcome(self, results: Sequence[Mapping[str, Any]]) -> Outcome:
        """Return everything, once all items are done.

        Args:
            results: Of `result`, in the order of the items.
        """
        answers = [scored for index in range(len(results)) for scored in self._answers(index)]
        errors = (self._error(index) for index in range(len(results)))
        return Outcome(
            results=results,
            models=[
                {"name": model.name, "revision": model.info.revision, "preproc": model.info.preproc}
                for model in self._models
            ],
            batch_size=max((scored.batch_size for scored in answers), default=0),
            queue_ms=max((scored.queue_ms for scored in answers), default=0.0),
            compute_ms=max((scored.compute_ms for scored in answers), default=0.0),
            error=next((error for error in errors if error is not None), None),
        )

    def outcomes(self) -> Mapping[tuple[str, str], int]:
        """Count the items by model and outcome, which is `ok` or an error code."""
        found: Counter[tuple[str, str]] = Counter()
        for index, error in enumerate(self._errors):
            if error is not None:
                found.update((model.name, error.code) for model in self._models)
                continue
            for model, scored in zip(self._models, self._answers(index), strict=True):
                found[model.name, "ok" if scored.error is None else scored.error.code] += 1
        return found

    def _submit(self, samples: Sequence[Read], deadline: float) -> None:
        items = self._request.items
        for index, sample in enumerate(samples):
            self._errors[index] = (
                sample if isinstance(sample, WireError) else self._missing(items[index], sample, index)
            )
        self._refuse_large(samples)
        if any(model.info.groupwise for model in self._models):
            self._spread_to_groups()
        sound = [
            (index, sample)
            for index, sample in enumerate(samples)
            if self._errors[index] is None and isinstance(sample, Sample)
        ]
        for model in self._models if sound else ():
            try:
                futures = model.submit(
                    [sample for _, sample in sound], deadline=deadline, priority=self._request.priority
                )
            except WireError as error:
                raise _renumbered(error, [index for index, _ in sound]) from error
            for (index, _), future in zip(sound, futures, strict=True):
                self._watch(index, future)

    def _refuse_large(self, samples: Sequence[Read]) -> None:
        """Fail the items, or the groups, that are more than a model takes in one call; the others go on."""
        for model in self._models:
            units: dict[object, dict[int, Sample]] = {}
            for index, sample in enumerate(samples):
                if self._errors[index] is None and isinstance(sample, Sample):
                    name = sample.group if model.info.groupwise and sample.group is not None else index
                    units.setdefault(name, {})[index] = sample
            for unit in units.values():
                why = model.too_large(list(unit.values()))
                for index in unit if why is not None else ():
                    param = f"items[{index}]"
                    self._errors[index] = WireError("invalid_item", f"{param}: {why}", param=param)

    def _watch(self, index: int, future: "asyncio.Future[Scored]") -> None:
        def done(_: "asyncio.Future[Scored]") -> None:
            self._open[index] -= 1
            if not self._open[index]:
                self._finished.put_nowait(index)

        self._futures[index].append(future)
        self._open[index] += 1
        future.add_done_callback(done)

    def _missing(self, item: Item, sample: Sample, index: int) -> WireError | None:
        has = {
            "prompt": item.prompt is not None,
            "image": sample.image is not None,
            "video": sample.video is not None,
            "condition_images": sample.condition_images is not None,
            "condition_videos": sample.condition_videos is not None,
            "metadata": item.meta is not None,
        }
        for model in self._models:
            for field in model.info.required_fields:
                if not has[field]:
                    param = f"items[{index}].{'meta' if field == 'metadata' else field}"
                    return WireError("invalid_item", f"{param}: absent, and {model.name} needs it", param=param)
        return None

    def _spread_to_groups(self) -> None:
        """Fail the whole group of an item that is no sample: the others would be compared without it."""
        groups: dict[str, int] = {}
        for index, error in enumerate(self._errors):
            group = self._request.items[index].group_id
            if error is not None and group is not None:
                groups.setdefault(group, index)
        for index, item in enumerate(self._request.items):
            first = groups.get(item.group_id) if item.group_id is not None else None
            if first is not None and self._errors[index] is None:
                message = f"items[{first}] of the same group {item.group_id!r} is no sample, so it was not scored"
                self._errors[index] = WireError("invalid_item", message, param=f"items[{index}].group_id")

    def _answers(self, index: int) -> list[Scored]:
        return [future.result() for future in self._futures[index]]

    def _error(self, index: int) -> WireError | None:
        own = self._errors[index]
        return own or next((scored.error for scored in self._answers(index) if scored.error is not None), None)

    def _cancel(self) -> None:
        for futures in self._futures:
            for future in futures:
                future.cancel()


def _renumbered(error: WireError, items: Sequence[int]) -> WireError:
    """Let an error that counts the samples given to a model count the items of the request instead."""
    found = _ITEM.match(error.param or "")
    if found is None:
        return error
    param = f"items[{items[int(found[1])]}]{found[2]}"
    return WireError(error.code, error.message, param=param, retry_after_ms=error.retry_after_ms)
