"""The weights of a policy: what is trained, and the named snapshots `ref`, `old` and `ema` beside it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Snapshot = Literal["ref", "old", "ema"]
LAGGED: tuple[Literal["old", "ema"], ...] = ("old", "ema")


class PolicyWeights:
    """Trainable parameters theta and their snapshots.

    `old` and `ema` are copies of theta that follow it at their own pace. `ref` never moves: for LoRA it is the network
    with its adapters off, for full fine-tuning a copy of the first weights.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        *,
        reference: Callable[[], AbstractContextManager[None]] | None = None,
    ):
        """Take snapshots of the weights as they are.

        Args:
            trainable: The parameters to train, by name.
            reference: Enters the reference network; None keeps a copy of the weights for it.
        """
        self.trainable = dict(trainable)
        self._reference = reference
        self._snapshots: dict[str, list[Tensor]] = {name: self._copy() for name in LAGGED}
        if reference is None:
            self._snapshots["ref"] = self._copy()

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters in a fixed order."""
        return list(self.trainable.values())

    @contextmanager
    def using(self, snapshot: Snapshot) -> Iterator[None]:
        """Let the network compute with a snapshot; only without gradients, theta is back on leaving.

        Raises:
            RuntimeError: Gradients are enabled: they would flow into the wrong weights.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(f"weights.using({snapshot!r}) needs torch.no_grad(): a snapshot is never trained")
        if snapshot == "ref" and self._reference is not None:
            with self._reference():
                yield
            return
        theta = [parameter.data for parameter in self.parameters()]
        for parameter, value in zip(self.parameters(), self._snapshots[snapshot], strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters(), theta, strict=True):
                parameter.data = value

    @torch.no_grad()
    def follow(self, snapshot: Literal["old", "ema"], *, decay: float) -> None:
        """Move a snapshot towards theta: s <- decay * s + (1 - decay) * theta."""
        theta = [parameter.data for parameter in self.parameters()]
        torch._foreach_lerp_(self._snapshots[snapshot], theta, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Return theta, `old` and `ema` as flat tensors named `theta.<parameter>` and so on, for an exact resume."""
        state = {f"theta.{name}": parameter.data for name, parameter in self.trainable.items()}
        for snapshot in LAGGED:
            state |= {
                f"{snapshot}.{name}": value
                for name, value in zip(self.trainable, self._snapshots[snapshot], strict=True)
            }
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            KeyError: A parameter is missing: the state is of another model.
            ValueError: A parameter has another shape or is none of the model's: the state is of another size, LoRA
                rank or choice of LoRA targets.
        """
        surplus = sorted(set(state) - set(self.state()))
        if surplus:
            raise ValueError(f"{surplus[0]} is in the state and not in the model")
        for name, parameter in self.trainable.items():
            found = state[f"theta.{name}"].shape
            if found != parameter.shape:
                raise ValueError(f"{name} is {list(found)} in the state and {list(parameter.shape)} in the model")
        for index, (name, parameter) in enumerate(self.trainable.items()):
            parameter.copy_(state[f"theta.{name}"])
            for snapshot in LAGGED:
                self._snapshots[snapshot][index].copy_(state[f"{snapshot}.{name}"])

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.trainable.values()]
