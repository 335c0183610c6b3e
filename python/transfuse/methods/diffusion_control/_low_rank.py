"""Low-rank adapters (LoRA) on one shared model: several of them, one at a time, by a switch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import near_matches
from transfuse.methods._attention_layers import find_attention


class LowRank(NamedTuple):
    """up @ down, added to a weight (out, in): down (r, in), up (out, r)."""

    down: Tensor
    up: Tensor


# (ending of the one, ending of the other, what the layer's name ends in before them)
_ENDINGS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
_PREFIXES = ("base_model.model.", "unet.")


def read_low_rank(state: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """A LoRA state dict as layer name -> (down, up), whoever wrote it.

    Understands the names of peft and of diffusers' present and former formats. ``alpha`` entries
    are folded in as alpha / rank.

    Raises:
        ValueError: A name of neither format, or half a pair.

    Example:
        >>> state = {"unet.a.to_q.lora_A.weight": torch.zeros(2, 3),
        ...          "unet.a.to_q.lora_B.weight": torch.zeros(4, 2)}
        >>> list(read_low_rank(state))
        ['a.to_q']
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, part = _split(key)
        halves.setdefault(name, {})[part] = tensor
    result = {}
    for name, parts in halves.items():
        missing = [part for part in ("down", "up") if part not in parts]
        if missing:
            raise ValueError(f"state: layer {name!r} has no {' and no '.join(missing)} matrix")
        up = parts["up"]
        if "alpha" in parts:
            up = up * (float(parts["alpha"]) / parts["down"].shape[0])
        result[name] = LowRank(parts["down"], up)
    return result


def _split(key: str) -> tuple[str, str]:
    """``"unet.a.to_q.lora_A.weight"`` -> ``("a.to_q", "down")``."""
    for down, up in _ENDINGS:
        for ending, part in ((down, "down"), (up, "up")):
            if key.endswith(ending):
                return _layer_name(key.removesuffix(ending)), part
    if key.endswith(".alpha"):
        return _layer_name(key.removesuffix(".alpha")), "alpha"
    raise ValueError(f"state: expected names of a LoRA state dict, got {key!r}")


def _layer_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    name = name.replace(".processor.", ".").removesuffix("_lora")
    return name + ".0" if re.search(r"\.to_out$", name) else name


def new_low_rank(
    model: nn.Module, rank: int = 16, *, generator: torch.Generator | None = None
) -> dict[str, LowRank]:
    """Fresh adapters for all attention projections: down N(0, 1/rank^2), up zero.

    Raises:
        ValueError: No attention layer with linear projections, or a rank below 1.
    """
    _checks.positive_int("rank", rank)
    result = {}
    for name, layer in find_attention(model, self_only=False).items():
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear) and path.split(".")[0].startswith("to_"):
                weight = module.weight
                down = torch.randn(rank, module.in_features, generator=generator) / rank
                up = torch.zeros(module.out_features, rank)
                result[f"{name}.{path}"] = LowRank(down.to(weight), up.to(weight))
    if not result:
        raise ValueError(f"{type(model).__name__} has no attention layer with linear projections")
    return result


def _runs_fused(layer: nn.Module) -> bool:
    """Whether a diffusers layer runs one fused projection instead of to_q, to_k and to_v."""
    processor: Any = getattr(layer, "processor", None)
    while hasattr(processor, "previous"):
        processor = processor.previous
    return type(processor).__name__.startswith("Fused")


class LowRankAdapters(nn.Module):
    """Several LoRAs on one model: y = W x + scale * up (down x) for the one in use, if any.

    The model's weights are not touched and not copied. :meth:`remove`, or leaving ``with``, takes
    the adapters off; the matrices stay, as parameters.

    Args:
        model: The model.
        adapters: One mapping layer name -> (down, up) for each LoRA (see :func:`read_low_rank`);
            layers must be ``nn.Linear``.
        scale: Factor of every adapter.

    Raises:
        ValueError: A layer that is not there, or matrices that do not fit it.
        TypeError: A layer that is not linear.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> pair = LowRank(torch.ones(1, 3), torch.ones(4, 1))
        >>> x = torch.ones(1, 3)
        >>> with LowRankAdapters(model, [{"0": pair}]) as adapters:
        ...     with adapters.using(0):
        ...         adapted = model(x)
        >>> (adapted - model(x)).detach().round()
        tensor([[3., 3., 3., 3.]])
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Mapping[str, LowRank | tuple[Tensor, Tensor]]],
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = _checks.number("scale", scale)
        self._current: int | None = None
        self._count = len(adapters)
        modules = dict(model.named_modules())
        self._names: dict[str, int] = {}
        self.pairs = nn.ModuleList()
        found: dict[str, dict[str, nn.ParameterList]] = {}
        for number, adapter in enumerate(adapters):
            for name, pair in adapter.items():
                self._check(number, name, pair, modules)
                own = nn.ParameterList([x.detach().clone() for x in pair])
                found.setdefault(name, {})[str(number)] = own
        self._hooks = []
        for name, own_pairs in found.items():
            self._names[name] = len(self.pairs)
            self.pairs.append(nn.ModuleDict(own_pairs))
            self._hooks.append(modules[name].register_forward_hook(self._hook(self._names[name])))

    @staticmethod
    def _check(number: int, name: str, pair: Any, modules: dict[str, nn.Module]) -> None:
        if name not in modules:
            linear = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
            raise ValueError(f"adapters[{number}]: no layer {name!r}; {near_matches(name, linear)}")
        layer = modules[name]
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"adapters[{number}]: expected a linear layer at {name!r}, "
                f"got {type(layer).__name__}"
            )
        if "." in name and _runs_fused(modules[name.rpartition(".")[0]]):
            raise ValueError(
                f"adapters[{number}]: the projections at {name!r} are fused, and a fused layer "
                "does not run it; unfuse them first"
            )
        down, up = pair
        expected = layer.in_features, layer.out_features
        if down.ndim != 2 or up.ndim != 2 or (down.shape[1], up.shape[0]) != expected:
            fits = False
        else:
            fits = down.shape[0] == up.shape[1]
        if not fits:
            raise ValueError(
                f"adapters[{number}][{name!r}]: expected down (r, {expected[0]}) and up "
                f"({expected[1]}, r), got {tuple(down.shape)} and {tuple(up.shape)}"
            )

    def _hook(self, place: int):
        def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            own: Any = self.pairs[place]
            if self._current is None or str(self._current) not in own:
                return None
            down, up = own[str(self._current)]
            low = nn.functional.linear(args[0], down.to(output.dtype))
            return output + self.scale * nn.functional.linear(low, up.to(output.dtype))

        return after

    def __len__(self) -> int:
        """Number of adapters."""
        return self._count

    @property
    def current(self) -> int | None:
        """The adapter in use."""
        return self._current

    @contextlib.contextmanager
    def using(self, number: int | None) -> Iterator[LowRankAdapters]:
        """Context in which one adapter (or with None, none) is in use.

        Raises:
            ValueError: A number out of range.
            RuntimeError: The adapters have been removed.
        """
        if number is not None and not 0 <= number < self._count:
            raise ValueError(f"number: expected an adapter in [0, {self._count}), got {number}")
        if number is not None and not self.installed:
            raise RuntimeError("the adapters have been removed from the model")
        before, self._current = self._current, number
        try:
            yield self
        finally:
            self._current = before

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self._names)

    @property
    def installed(self) -> bool:
        """Whether the adapters are on the model."""
        return bool(self._hooks) or not self._names

    def remove(self) -> None:
        """Take the adapters off. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> LowRankAdapters:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"LowRankAdapters({self._count} adapters, {len(self._names)} layers)"
