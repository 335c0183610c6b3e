"""Multi-shift windows on an attention layer: the token grid, the shift, and the replacement."""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks
from transfuse.methods._attention_layers import attention_scale, run_projected_attention
from transfuse.methods._attention_patch import refuse_hidden
from transfuse.ops import window_attention

SHIFTS = 4
VARIANTS = ("paper", "official")
ODD = ("exact", "resize")

Size = tuple[int, int]


def check_shift(name: str, value: object) -> int:
    """A number of one of the four shifts.

    Raises:
        ValueError: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < SHIFTS:
        raise ValueError(f"{name}: expected 0, 1, 2 or 3, got {value!r}")
    return value


def msw_shift(size: Size, index: int, *, variant: str = "paper") -> Size:
    r"""Rows and columns by which the windows of a token grid are moved.

    .. math:: k\,(\lfloor w_y / 4\rfloor, \lfloor w_x / 4\rfloor),\quad
              (w_y, w_x) = (\lceil H / 2\rceil, \lceil W / 2\rceil)

    Args:
        size: Height and width of the grid.
        index: k, 0 to 3.
        variant: ``"official"`` moves no axis where the rows would not move, as the official code,
            which differs if H < 7 and W >= 7.

    Returns:
        (rows, columns).

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> msw_shift((6, 16), 1), msw_shift((6, 16), 1, variant="official")
        ((0, 2), (0, 0))
    """
    check_shift("index", index)
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    rows, columns = (index * (-(-side // 2) // 4) for side in size)
    return (0, 0) if variant == "official" and rows == 0 else (rows, columns)


def token_grid(latent: Size, tokens: int) -> Size:
    """Height and width of the grid of so many tokens: the latent's, divided and rounded up.

    Raises:
        ValueError: No divisor gives so many.
    """
    for divisor in range(1, max(latent) + 1):
        height, width = (-(-side // divisor) for side in latent)
        if height * width <= tokens:
            break
    if height * width != tokens:
        raise ValueError(
            f"a latent of {latent[0]} x {latent[1]} has no grid of {tokens} tokens; the nearest is "
            f"{height} x {width}"
        )
    return height, width


def resize_tokens(x: Tensor, size: Size, to: Size) -> Tensor:
    """Tokens (B, N, C) of one grid on another, bicubic without antialiasing."""
    image = x.transpose(1, 2).unflatten(2, size)
    image = F.interpolate(image, size=to, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2)


class Windows(Protocol):
    """What a windowed layer asks its owner."""

    def grid(self, name: str, hidden_states: Tensor) -> Size: ...

    def shift(self, name: str) -> int: ...


class BlockTokens:
    """How many tokens the module around a layer received, for layers whose input others shorten."""

    def __init__(self, block: nn.Module) -> None:
        self.count: int | None = None
        self._hooks = (
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        self.count = x.shape[1] if isinstance(x, Tensor) and x.dim() == 3 else None

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.count = None

    def remove(self) -> None:
        """Take it off."""
        for hook in self._hooks:
            hook.remove()


class WindowedLayer:
    """The replacement on one layer: its self-attention in four shifted windows."""

    idle = False
    plain = False

    def __init__(
        self,
        name: str,
        windows: Windows,
        block: BlockTokens | None,
        *,
        odd: str,
        variant: str,
        backend: str | None,
    ) -> None:
        self.name = name
        self.previous: Any = None
        self._windows = windows
        self._block = block
        self._odd = odd
        self._variant = variant
        self._backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        self._check(encoder_hidden_states, attention_mask, hidden_states)
        refuse_hidden(self)
        size = self._windows.grid(self.name, hidden_states)
        grid = size
        if self._odd == "resize":
            grid = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        shift = msw_shift(grid, self._windows.shift(self.name), variant=self._variant)

        def core(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return window_attention(
                query,
                key,
                value,
                size=grid,
                shift=shift,
                scale=attention_scale(attn),
                backend=self._backend,
            )

        if grid == size:
            return run_projected_attention(attn, core, hidden_states, None, None, temb)
        if hidden_states.ndim != 3 or getattr(attn, "residual_connection", False):
            raise ValueError(
                f"layer {self.name!r}: odd='resize' needs a layer on (B, N, C) without a residual "
                "of its own; choose odd='exact'"
            )
        larger = resize_tokens(hidden_states, size, grid)
        out = run_projected_attention(attn, core, larger, None, None, temb)
        return resize_tokens(out, grid, size)

    def _check(self, context: Tensor | None, mask: Tensor | None, x: Tensor) -> None:
        if context is not None:
            raise ValueError(
                f"layer {self.name!r} received a context: it is cross-attention, and windows are "
                "for self-attention; leave it out of layers"
            )
        if mask is not None:
            raise ValueError(
                f"layer {self.name!r} received an attention mask: it speaks of all tokens, and a "
                "window sees a quarter of them; leave the layer out or choose windows=False"
            )
        tokens = None if self._block is None else self._block.count
        if tokens is not None and x.ndim == 3 and x.shape[1] != tokens:
            raise RuntimeError(
                f"layer {self.name!r}: {tokens} tokens enter its block and {x.shape[1]} its "
                "attention, so something in between (token merging?) took them off their grid, "
                "which windows need; use the two on different layers"
            )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse an option that is none of the choices (ValueError)."""
    _checks.choice(name, value, {choice: i for i, choice in enumerate(choices)})
