"""Task vectors: what fine-tuning changed, as tensors or as pairs of low-rank factors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.methods.model_merging import _state_dicts as states_of
from transfuse.methods.model_merging._state_dicts import Names
from transfuse.ops import multi_dot, multi_norm


class TaskVector(Mapping[str, Tensor]):
    r"""The difference of two checkpoints, by name.

    .. math:: \tau = \theta_{\text{fine}} - \theta_{\text{pre}}

    Args:
        pre: a state dict, or any mapping of names to tensors.
        fine: one of the same names and shapes.
        dtype: to keep the differences in (float16 as published); None: that of ``pre``.
        keep: names to leave out (heads), or a function that says so.
        name: of the task.

    Raises:
        TypeError, ValueError: other names or shapes (with a list), quantised weights.

    Notes:
        Floating tensors only. Differences are taken in float32 and rounded once. ``+``, ``-``, and
        ``*`` with numbers give task vectors; so do :meth:`of` and the ``name`` of the first.

    Example:
        >>> import torch
        >>> one = TaskVector({"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])})
        >>> float((2.0 * one - one).norm())
        5.0
    """

    def __init__(
        self,
        pre: Mapping[str, Tensor],
        fine: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        keep: Names = (),
        name: str | None = None,
    ) -> None:
        states = states_of.check_states("states", [pre, fine])
        names = states_of.plan(states, keep, lambda name: True).merged
        tied = states_of.Tied()
        self._tensors: dict[str, Tensor] = {}
        for key in names:
            first = tied.original(key, pre[key])
            if first != key:
                self._tensors[key] = self._tensors[first]
                continue
            wide = torch.promote_types(pre[key].dtype, torch.float32)
            change = fine[key].detach().to(wide) - pre[key].detach().to(wide)
            self._tensors[key] = change.to(pre[key].dtype if dtype is None else dtype)
        self.name = name

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, name: str | None = None) -> TaskVector:
        """From differences that are at hand."""
        made = cls.__new__(cls)
        for key, tensor in tensors.items():
            _checks.floating(f"tensors[{key!r}]", _checks.dense(f"tensors[{key!r}]", tensor))
        made._tensors, made.name = dict(tensors), name
        return made

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        numbers = sum(t.numel() for t in self._tensors.values())
        return f"TaskVector({self.name!r}, {len(self)} tensors, {numbers} numbers)"

    def _with(self, other: object, join: Callable[[Tensor, Tensor], Tensor]) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        same_names([self, other])
        return TaskVector.of({n: join(t, other[n]) for n, t in self.items()}, name=self.name)

    def __add__(self, other: object) -> TaskVector:
        return self._with(other, torch.add)

    def __sub__(self, other: object) -> TaskVector:
        return self._with(other, torch.sub)

    def __mul__(self, factor: float) -> TaskVector:
        factor = _checks.number("factor", factor)
        return TaskVector.of({n: t * factor for n, t in self.items()}, name=self.name)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def dot(self, other: TaskVector) -> Tensor:
        """Inner product, 0-dimensional."""
        same_names([self, other])
        return multi_dot(list(self.values()), [other[n] for n in self])

    def norm(self) -> Tensor:
        """Euclidean norm, 0-dimensional."""
        return multi_norm(list(self.values()))


class LowRankPair(NamedTuple):
    """A change ``scale * up @ down`` of a weight: down (r, n), up (o, r)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    def expand(self) -> Tensor:
        """The product, (o, n)."""
        return self.scale * (self.up @ self.down)


class LowRankTaskVector(Mapping[str, LowRankPair]):
    """A task vector whose tensors are products of two factors (LoRA), which stay apart.

    Args:
        pairs: by the name of the weight.
        name: of the task.

    Raises:
        TypeError, ValueError: factors that do not fit.

    Example:
        >>> import torch
        >>> pair = LowRankPair(torch.ones(1, 3), torch.ones(2, 1), 0.5)
        >>> LowRankTaskVector({"w": pair})["w"].expand().tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    def __init__(self, pairs: Mapping[str, LowRankPair], *, name: str | None = None) -> None:
        self._pairs: dict[str, LowRankPair] = {}
        for key, pair in pairs.items():
            down = _checks.tensor(f"{key}.down", pair.down, ("r", "n"))
            up = _checks.tensor(f"{key}.up", pair.up, ("o", "r"))
            for part, tensor in (("down", down), ("up", up)):
                _checks.floating(f"{key}.{part}", tensor)
            _checks.size(f"{key}.up", up, 1, down.shape[0], "the rank")
            scale = _checks.number(f"{key}.scale", pair.scale)
            self._pairs[key] = LowRankPair(down.detach(), up.detach(), scale)
        self.name = name

    def __getitem__(self, name: str) -> LowRankPair:
        return self._pairs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return f"LowRankTaskVector({self.name!r}, {len(self)} pairs)"

    def expand(self) -> TaskVector:
        """The same with its products formed."""
        return TaskVector.of({n: p.expand() for n, p in self.items()}, name=self.name)


_FACTOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$"
)


def adapter_task_vector(
    state: Mapping[str, Tensor],
    *,
    alpha: float,
    rank_stabilised: bool = False,
    name: str | None = None,
) -> LowRankTaskVector:
    """A task vector from the state dict of a LoRA adapter, as peft stores it.

    Args:
        state: keys ``base_model.model.<module>.lora_A.weight`` (r, n) and ``...lora_B.weight``
            (o, r), with an adapter's name before ``weight`` or without.
        alpha: ``lora_alpha`` of the adapter's configuration.
        rank_stabilised: ``use_rslora``: scale by alpha / sqrt(r) and not alpha / r.
        name: of the task.

    Raises:
        ValueError: keys that are no factors of linear layers, or a factor without the other.

    Example:
        >>> import torch
        >>> key = "base_model.model.layer.lora_{}.weight"
        >>> state = {key.format("A"): torch.ones(2, 3), key.format("B"): torch.ones(4, 2)}
        >>> vector = adapter_task_vector(state, alpha=4)
        >>> vector["layer.weight"].scale, tuple(vector["layer.weight"].shape)
        (2.0, (4, 3))
    """
    alpha = _checks.number("alpha", alpha)
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in state.items():
        match = _FACTOR.match(key)
        if match is None or tensor.dim() != 2:
            strange.append(key)
            continue
        found.setdefault(match["module"], {})[match["side"]] = tensor
    strange += [f"{module} (one factor)" for module, sides in found.items() if len(sides) != 2]
    if strange or not found:
        raise ValueError(
            "state: expected pairs of lora_A and lora_B matrices of linear layers, got "
            f"{strange[:8] if strange else 'no keys'}"
        )
    pairs = {}
    for module, sides in found.items():
        rank = sides["A"].shape[0]
        scale = alpha / (rank**0.5 if rank_stabilised else rank)
        pairs[f"{module}.weight"] = LowRankPair(sides["A"], sides["B"], scale)
    return LowRankTaskVector(pairs, name=name)


def same_names(vectors: list) -> None:
    """All vectors have the names and shapes of the first.

    Raises:
        ValueError: with a list of the differences.
    """
    first = vectors[0]
    problems = []
    for i, vector in enumerate(vectors[1:], 1):
        problems += [f"{n} is missing in vector {i}" for n in first if n not in vector]
        problems += [f"{n} is in vector {i} and not in vector 0" for n in vector if n not in first]
        problems += [
            f"{n} in vector {i} has shape {tuple(vector[n].shape)}, in vector 0 "
            f"{tuple(first[n].shape)}"
            for n in first
            if n in vector and vector[n].shape != first[n].shape
        ]
    states_of.refuse(problems)
