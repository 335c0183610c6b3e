"""One batch differentiated once, so that each product costs a pass through a graph that is there.

Reverse over reverse: the graph of the gradient is built and kept, and a product is the gradient of
<gradient, vector>. Compared with forward over reverse nothing of the point itself is computed again
for a second vector, and ops need no vmap rule.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from transfuse.ops._bilinear_layers import BilinearLayers, Passes

T = TypeVar("T")

_UNSUPPORTED = re.compile(r"derivative for aten::(\w+) is not implemented")


class Linearisation(Protocol):
    """A batch's matrix at a point.

    ``value`` is a number the batch and the parameters determine (the loss), ``saved_bytes`` what
    the kept graph holds beside the parameters.
    """

    value: float
    saved_bytes: int

    def add_product(
        self, vector: Sequence[Tensor], into: Sequence[Tensor], *, weight: float
    ) -> None:
        """Adds weight x matrix x vector to ``into``; both have one tensor for each parameter."""

    def form(self, vector: Sequence[Tensor]) -> Tensor:
        """vector^T matrix vector, a float64 0-dim tensor."""


def make_leaves(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters as leaves of a new graph, sharing their memory."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def add_weighted(
    gradients: Sequence[Tensor | None], into: Sequence[Tensor], *, weight: float
) -> None:
    """into += weight x gradients, where there is a gradient."""
    pairs = [(a, g) for a, g in zip(into, gradients, strict=True) if g is not None]
    if len(pairs) > 0:
        sums, terms = zip(*pairs, strict=True)
        torch._foreach_add_(list(sums), list(terms), alpha=weight)


def recorded(
    build: Callable[[AbstractContextManager], T], known: Sequence[Tensor], passes: Passes
) -> tuple[T, int]:
    """What ``build`` returns, and the bytes that the graphs it leaves behind hold.

    ``build`` gets a context in which layers are those of :mod:`_bilinear_layers`. Losses that take
    torch.func gradients themselves cannot be counted, and checkpointed ones are computed again
    outside of any context, where their layers must be the same: both are built by torch alone, and
    count as too large to be kept.
    """
    with torch.enable_grad(), explained():
        try:
            with SavedBytes(known) as saved:
                result = build(BilinearLayers(passes))
            return result, saved.count
        except CheckpointError:
            pass
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
        return build(nullcontext()), sys.maxsize


class SavedBytes:
    """Counts what graphs built inside it hold; memory of ``known`` tensors does not count."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.count = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.count += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)


@contextmanager
def explained() -> Iterator[None]:
    """Says what to do where torch has no second derivative.

    Raises:
        NotImplementedError: an operation inside has none.
    """
    try:
        yield
    except RuntimeError as error:
        match = _UNSUPPORTED.search(str(error))
        if match is None:
            raise
        name = match[1]
        if "attention" in name:
            raise NotImplementedError(
                f"torch's fused attention has no second derivative ({name}): call "
                "transfuse.ops.attend in its place, or run loss_fn under "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            ) from error
        raise NotImplementedError(
            f"an operation of the loss has no second derivative: {name}"
        ) from error


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def without_randomness(name: str, device: torch.device) -> Iterator[None]:
    """Refuses code that draws from torch's global generators, and gives their states back.

    Raises:
        ValueError: numbers were drawn.
    """
    before = _random_states(device)
    yield
    if not all(map(torch.equal, before, _random_states(device))):
        torch.random.set_rng_state(before[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(before[1], device)
        raise ValueError(
            f"{name}: expected a function of parameters and batch, got one that draws random "
            "numbers (dropout in training mode?); call model.eval() first, or pass check=False"
        )
