"""RAU-Net on a UNet with lists of down and up blocks: where its devices are, and their hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.methods._attention_layers import find_attention, layers_named

SUPPORTED = (
    "supported are UNets of diffusers with self-attention from the first down block on (Stable "
    "Diffusion 1.x, 2.x) or from the second on (SDXL, SDXL-Turbo)"
)

Size = tuple[int, int]

# Arguments of the model with features of a T2I-Adapter, and of a ControlNet.
_RESIDUALS = (
    "down_intrablock_additional_residuals",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
)


@dataclass(frozen=True, kw_only=True)
class UNetLayout:
    """Where HiDiffusion acts in a UNet.

    Args:
        model: Row of the table of steps, see ``rau_schedule``.
        windows: Names of self-attention layers, or of modules whose layers are all meant.
        strided: Number of the down block whose downsampler halves once more.
        pooled: Number of the down block that is pooled after its first layer.
    """

    model: str
    windows: tuple[str, ...]
    strided: int
    pooled: int


def find_layout(model: nn.Module) -> UNetLayout:
    """The layout of a known UNet, by its structure.

    Raises:
        ValueError: No self-attention, or a structure that is not known.
    """
    found = find_attention(model, self_only=True)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no self-attention layer "
            "(a module with to_q, to_k, to_v, to_out and a head count)"
        )
    wayout = f"{SUPPORTED}; for another model give layers=[...] and raunet=False, or layout="
    down, up = getattr(model, "down_blocks", None), getattr(model, "up_blocks", None)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no down_blocks and up_blocks: {wayout}")
    levels = [i for i in range(len(down)) if layers_named(f"down_blocks.{i}", found)]
    first = levels[0] if levels else None
    if first not in (0, 1) or len(down) != len(up) or len(down) < 2:
        where = "in no down block" if first is None else f"from down block {first} on"
        raise ValueError(
            f"{type(model).__name__} has {len(down)} down blocks, {len(up)} up blocks and "
            f"self-attention {where}: {wayout}"
        )
    places = (f"down_blocks.{first}", f"up_blocks.{len(down) - 1 - first}")
    windows = tuple(place for place in places if layers_named(place, found))
    return UNetLayout(
        model="sd15" if first == 0 else "sdxl", windows=windows, strided=first, pooled=1
    )


def pool_features(x: Tensor) -> Tensor:
    """Means of 2 x 2 cells of (B, C, H, W); cells at an odd edge are means of what is there."""
    return F.avg_pool2d(x, kernel_size=2, ceil_mode=True)


def restore_features(x: Tensor, size: Size) -> Tensor:
    """(B, C, h, w) back to a height and width, bicubic without antialiasing."""
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


class StridedDownsampler:
    """The convolution of a downsampler at stride 4, padding 2, dilation 2, while ``active()``.

    Same weights. Adapters that run convolutions of their own beside it are widened with it.

    Args:
        downsampler: Module with a 3 x 3 convolution of stride 2 and padding 1.
        active: Whether it acts in the present call.
    """

    def __init__(self, downsampler: nn.Module, active: Callable[[], bool]) -> None:
        self._active = active
        self._widened: list[tuple[nn.Conv2d, tuple[Any, ...]]] = []
        self._hooks = (
            downsampler.register_forward_pre_hook(self._widen),
            downsampler.register_forward_hook(self._narrow, always_call=True),
        )

    def _widen(self, downsampler: nn.Module, args: tuple[Any, ...]) -> None:
        self._restore()  # an interrupt leaves a call without its second hook
        if self._active():
            for layer in _convolutions(downsampler):
                self._widened.append((layer, (layer.stride, layer.padding, layer.dilation)))
                layer.stride, layer.padding, layer.dilation = (4, 4), (2, 2), (2, 2)

    def _narrow(self, downsampler: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for layer, was in self._widened:
            layer.stride, layer.padding, layer.dilation = was
        self._widened = []

    def remove(self) -> None:
        """Take it off."""
        self._restore()
        for hook in self._hooks:
            hook.remove()


def check_downsampler(name: str, downsampler: nn.Module) -> None:
    """Refuse a downsampler that is not a 3 x 3 convolution of stride 2 and zero padding 1.

    Raises:
        ValueError: Naming the block.
    """
    if len(_convolutions(downsampler)) == 0:
        raise ValueError(
            f"{name}: RAU-Net needs a downsampler with a 3 x 3 convolution of stride 2 and zero "
            "padding 1; choose raunet=False"
        )


def check_upsampler(name: str, upsampler: nn.Module) -> None:
    """Refuse an upsampler that cannot be told its output size.

    Raises:
        ValueError: Naming the block.
    """
    if list(inspect.signature(upsampler.forward).parameters)[1:2] != ["output_size"]:
        raise ValueError(
            f"{name}: RAU-Net needs upsamplers that take an output_size; choose raunet=False"
        )


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d)
        and (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (2, 2), (1, 1))
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
    ]


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A layer's output with its first tensor changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


class RAUNet:
    """Both devices on a model; before each call :meth:`begin` says which of them act.

    Args:
        model: UNet with ``down_blocks`` and ``up_blocks``; block i from below mirrors block i.
        layout: Where.

    Raises:
        ValueError: A structure the devices do not fit.
    """

    def __init__(self, model: Any, layout: UNetLayout) -> None:
        self._down, self._up = list(model.down_blocks), list(model.up_blocks)
        self._layout = layout
        self._strided = self._pooled = False
        self._skips: list[Size] = []
        self._middle: Size = (0, 0)
        self._pooled_size: Size | None = None
        parameters = inspect.signature(model.forward).parameters
        self._residuals = [name for name in _RESIDUALS if name in parameters]
        self._check()
        down, up = self._down[layout.pooled], self._up[-1 - layout.pooled]
        entry = _layers(down)[0]
        leave = _layers(up)[len(down.resnets) - 1]
        self._parts: list[Any] = [
            StridedDownsampler(self._down[layout.strided].downsamplers[0], lambda: self._strided),
            entry.register_forward_hook(self._pool),
            leave.register_forward_hook(self._leave),
        ]
        left = sum(len(block.resnets) for block in self._up)
        for block in self._up[:-1]:
            left -= len(block.resnets)
            for upsampler in _list(block, "upsamplers"):
                self._parts.append(
                    upsampler.register_forward_pre_hook(functools.partial(self._to_skip, left))
                )

    def _check(self) -> None:
        layout, count = self._layout, len(self._down)
        for name in ("strided", "pooled"):
            if not 0 <= getattr(layout, name) < count:
                raise ValueError(
                    f"layout: {name} expected one of {count} down blocks, "
                    f"got {getattr(layout, name)}"
                )
        for i, block in enumerate(self._down):
            mirrored = self._up[count - 1 - i]
            if len(mirrored.resnets) != len(block.resnets) + 1 or not block.resnets:
                raise ValueError(
                    f"RAU-Net needs up blocks with one resnet more than the mirrored down block, "
                    f"got {len(mirrored.resnets)} in up_blocks.{count - 1 - i} and "
                    f"{len(block.resnets)} in down_blocks.{i}; choose raunet=False"
                )
            for downsampler in _list(block, "downsamplers"):
                check_downsampler(f"down_blocks.{i}", downsampler)
            for upsampler in _list(mirrored, "upsamplers"):
                check_upsampler(f"up_blocks.{count - 1 - i}", upsampler)
        strided = _list(self._down[layout.strided], "downsamplers")
        if not strided:
            raise ValueError(
                f"RAU-Net needs a downsampler in down_blocks.{layout.strided}; choose raunet=False"
            )
        for hook in strided[0]._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), StridedDownsampler):
                raise ValueError("the model has a RAU-Net already; remove() that one first")

    def begin(self, size: Size, *, strided: bool, pooled: bool) -> None:
        """Set which devices act in the call that follows, on a latent of this size."""
        self._strided, self._pooled = strided, pooled
        self._skips, self._middle = self._sizes(size)

    @property
    def active(self) -> bool:
        """Whether a device acts in the present call."""
        return self._strided or self._pooled

    def _sizes(self, size: Size) -> tuple[list[Size], Size]:
        """Height and width of every skip connection, the input's first, and of the middle."""
        sizes = [size]
        for i, block in enumerate(self._down):
            for j in range(len(block.resnets)):
                if self._pooled and i == self._layout.pooled and j == 0:
                    size = _parts(size, 2)
                sizes.append(size)
            if _list(block, "downsamplers"):
                size = _parts(size, 4 if self._strided and i == self._layout.strided else 2)
                sizes.append(size)
        return sizes, size

    def _pool(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._pooled:
            return None

        def pool(x: Tensor) -> Tensor:
            self._pooled_size = (x.shape[-2], x.shape[-1])
            return pool_features(x)

        return _first(output, pool)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._pooled or self._pooled_size is None:
            return None
        size = self._pooled_size
        return _first(output, lambda x: restore_features(x, size))

    def _to_skip(self, left: int, upsampler: nn.Module, args: tuple[Any, ...]) -> Any:
        """Give an upsampler the size of the skip connection that its output will meet."""
        if not self.active:
            return None
        return args[0], self._skips[left - 1]

    def fit_residuals(self, given: dict[str, Any]) -> dict[str, Any]:
        """A ControlNet's residuals at the sizes of this call.

        Args:
            given: Arguments of the model by name.

        Raises:
            ValueError: Residuals of an adapter, which lie inside the resized blocks, or too few.
        """
        if not self.active or not self._residuals:
            return {}
        inside, skips, middle = (given.get(name) for name in _RESIDUALS)
        if inside is not None or (skips is not None and middle is None):
            raise ValueError(
                "RAU-Net resizes features inside the blocks, to which a T2I-Adapter adds its own: "
                "use it with raunet=False"
            )
        if skips is None or middle is None:
            return {}
        if len(skips) != len(self._skips):
            raise ValueError(
                f"{_RESIDUALS[1]}: expected {len(self._skips)} residuals (one per skip "
                f"connection), got {len(skips)}"
            )
        fitted = tuple(_fit(x, size) for x, size in zip(skips, self._skips, strict=True))
        return {_RESIDUALS[1]: fitted, _RESIDUALS[2]: _fit(middle, self._middle)}

    def remove(self) -> None:
        """Take everything off."""
        for part in self._parts:
            part.remove()
        self._parts = []


def _layers(block: Any) -> list[Any]:
    """What follows the resnets of a block one by one: its attentions, or the resnets themselves."""
    attentions = _list(block, "attentions")
    return attentions if attentions else list(block.resnets)


def _list(block: Any, name: str) -> list[Any]:
    """The modules of one of a block's lists; none where it has no such list."""
    found = getattr(block, name, None)
    return [] if found is None else list(found)


def _parts(size: Size, divisor: int) -> Size:
    return -(-size[0] // divisor), -(-size[1] // divisor)


def _fit(residual: Tensor, size: Size) -> Tensor:
    return residual if residual.shape[-2:] == size else restore_features(residual, size)
