"""What maps of a network's layers have in common: how they are called, and what calls mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from transfuse.methods.saliency._targets import Targets


class LayerMaps(ABC):
    """Maps of some layers of a network, and one that is made of them.

    Args:
        model: Called as ``model(x)``; returns (B, K) logits, an object with ``logits``, or what
            the targets are a function of.
        layers: Names of its modules.
        reshape: A function that makes (B, C, *S) of what the layers put out; None: nothing to make.
        backend: Of the op that gives a layer's map.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        reshape: Callable[[Tensor], Tensor] | None,
        backend: str | None,
    ) -> None:
        self.model, self.layers = model, tuple(layers)
        self.reshape, self.backend = reshape, backend

    def raw(self, x: Tensor, targets: Targets = None) -> list[Tensor]:
        """One map (B, *S) of each layer at its own size, before ReLU and before it is scaled.

        Args:
            x: (B, ...), the batch.
            targets: Classes: None (the most likely), an integer, or one for each sample; or a
                function of the model's output that gives the score, a number or one per sample.

        Raises:
            TypeError, ValueError: What cannot be explained; the message says why.
        """
        return self._raw(x, targets)

    def __call__(
        self,
        x: Tensor,
        targets: Targets = None,
        *,
        normalize: str | None = "minmax",
        size: str | int | Sequence[int] | None = "input",
    ) -> Tensor:
        """The finished map: enlarged, scaled, of all layers together.

        Args:
            x: (B, ...), the batch.
            targets: As of :meth:`raw`.
            normalize: ``"minmax"``, ``"max"`` or None, see ``transfuse.ops.finish_map``.
            size: ``"input"`` (that of x), None (that of the layer), or integers.

        Returns:
            (B, *size) on the device of x, float32 (float64 for float64).

        Raises:
            TypeError, ValueError: What cannot be explained; the message says why.
        """
        return self._together(x, targets, normalize, size)

    @abstractmethod
    def _raw(self, x: Tensor, targets: Targets) -> list[Tensor]: ...

    @abstractmethod
    def _together(
        self,
        x: Tensor,
        targets: Targets,
        normalize: str | None,
        size: str | int | Sequence[int] | None,
    ) -> Tensor: ...
