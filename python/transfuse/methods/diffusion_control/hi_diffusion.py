"""HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained Diffusion
Models.

Shen Zhang, Zhaowei Chen, Zhenyu Zhao, Yuhao Chen, Yao Tang, Jiajun Liang; ECCV 2024; arXiv
2311.17528; official code megvii-research/HiDiffusion.

Two changes let a UNet work above its training resolution without repeated objects, and faster.

MSW-MSA: the shallowest self-attention layers attend within 2 x 2 windows of an H x W token grid,
(w_y, w_x) = (ceil(H/2), ceil(W/2)), moved by k (floor(w_y/4), floor(w_x/4)) with k drawn from
{0, 1, 2, 3} for every layer and call. Token (y, x) is in window

    (((y - s_y) mod H) div w_y, ((x - s_x) mod W) div w_x);

the move is cyclic, and tokens that come round an edge attend to those they meet there.

RAU-Net, in some of the first steps of a run: one downsampling convolution (3 x 3, stride 2, padding
1) runs with the same weights at stride 4, padding 2, dilation 2, and the way up returns to the size
of the skip connection at once; and one down block is pooled 2 x 2 after its first layer, and its
mirror image brought back bicubically. ``rau_schedule`` is the table of steps.

Deviations from the official code, all deliberate:

- Odd grids are cut exactly (H - w_y rows in the last window). ``odd="resize"`` resizes them
  bicubically to even ones and back, as there.
- Windows move along each axis by itself. ``variant="official"`` moves none where the rows do not.
- Shifts come from a private generator, not from torch's global one.
- The step is looked up in the run's timesteps, not counted by three counters of UNet calls.
- SDXL and SD are told apart by the levels with attention, not by names of modules and of
  repositories; SDXL-Turbo, which has the structure of SDXL, must be named (``model=``).
- Attention masks and T2I-Adapters are refused where they cannot be followed. ControlNet residuals
  are resized for every pipeline. Ending ControlNet after 60 % of the steps, as the official code
  does, is the pipeline's ``control_guidance_end=0.6``.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transfuse._registry import register
from transfuse.methods._attention_layers import select_attention
from transfuse.methods._attention_patch import ModelPatch, PatchHandle
from transfuse.methods.diffusion_control._rau_net import (
    RAUNet,
    UNetLayout,
    find_layout,
    pool_features,
    restore_features,
)
from transfuse.methods.diffusion_control._rau_schedule import (
    MODELS,
    RAUSchedule,
    RunSteps,
    rau_schedule,
    time_value,
)
from transfuse.methods.diffusion_control._shifted_windows import (
    ODD,
    SHIFTS,
    VARIANTS,
    BlockTokens,
    Size,
    WindowedLayer,
    check_choice,
    check_shift,
    msw_shift,
    resize_tokens,
    token_grid,
)

__all__ = [
    "HiDiffusion",
    "HiDiffusionOptions",
    "RAUSchedule",
    "UNetLayout",
    "msw_shift",
    "pool_features",
    "rau_schedule",
    "resize_tokens",
    "restore_features",
    "token_grid",
]

_TIME_ARGUMENTS = ("timestep", "timesteps")
_REDRAW = ("call", "timestep")
_INPAINTING_CHANNELS = 9
_REMEMBERED = 10_000  # calls; a server runs for ever


@dataclass(frozen=True, kw_only=True)
class HiDiffusionOptions:
    """Options of :class:`HiDiffusion`.

    Args:
        raunet: Use RAU-Net.
        windows: Use windowed attention.
        model: Row of the table of steps, ``"sd15"``, ``"sd21"``, ``"sdxl"`` or ``"sdxl_turbo"``.
            None: the layout's (an SDXL-Turbo looks like an SDXL).
        aggressive: See :func:`rau_schedule`. None: not for models with 9 input channels
            (inpainting).
        controlnet: See :func:`rau_schedule`.
        schedule: (height and width of the latent, number of steps) -> :class:`RAUSchedule`,
            instead of the table.
        layout: Where to act in a model whose structure is not known. None: found by structure.
        shift: The same shift 0 to 3 for every layer and call. None: drawn.
        redraw: Draw shifts for every ``"call"`` of the model, or only when the ``"timestep"`` has
            changed: then both halves of guidance by separate calls have the same ones.
        odd: ``"exact"`` or ``"resize"``, see the module.
        variant: ``"paper"`` or ``"official"``, see the module.
        seed: Of the private generator.
        backend: Backend of ``transfuse.ops.window_attention``; None chooses.

    Raises:
        TypeError, ValueError: An option that does not fit.
    """

    raunet: bool = True
    windows: bool = True
    model: str | None = None
    aggressive: bool | None = None
    controlnet: bool = False
    schedule: Callable[[Size, int], RAUSchedule] | None = None
    layout: UNetLayout | None = None
    shift: int | None = None
    redraw: str = "call"
    odd: str = "exact"
    variant: str = "paper"
    seed: int = 0
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("redraw", _REDRAW), ("odd", ODD), ("variant", VARIANTS)):
            check_choice(name, getattr(self, name), choices)
        if self.model is not None:
            check_choice("model", self.model, MODELS)
        if self.shift is not None:
            check_shift("shift", self.shift)
        if self.schedule is not None and not callable(self.schedule):
            raise TypeError(f"schedule: expected a callable, got {self.schedule!r}")
        if not self.raunet and not self.windows:
            raise ValueError("raunet and windows: expected at least one of them")

    def attach(self, model: nn.Module, *, layers: Sequence[int | str] | None = None) -> HiDiffusion:
        """``HiDiffusion(model, self, layers=layers)``: what ``patch`` of an integration calls."""
        return HiDiffusion(model, self, layers=layers)


@dataclass
class _Call:
    """What the parts of one call of the model share."""

    latent: Size
    shifts: dict[str, int]


@register(
    title="HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained "
    "Diffusion Models",
    authors=(
        "Shen Zhang",
        "Zhaowei Chen",
        "Zhenyu Zhao",
        "Yuhao Chen",
        "Yao Tang",
        "Jiajun Liang",
    ),
    year=2024,
    venue="ECCV",
    arxiv="2311.17528",
    repository="https://github.com/megvii-research/HiDiffusion",
    kind="patch",
    ops=("window_attention",),
)
class HiDiffusion(ModelPatch):
    """Windows the shallow self-attention of a UNet and resizes its deep features in early steps.

    Constructing it patches the model; :meth:`remove`, or leaving ``with``, restores it exactly.

    Args:
        model: A UNet of diffusers with the structure of Stable Diffusion 1.x, 2.x or SDXL; with
            ``layers`` and ``raunet=False`` any module whose input is (B, C, H, W).
        options: See :class:`HiDiffusionOptions`.
        layers: Self-attention layers to window, as names (of a layer or of a module that contains
            some) or numbers of decoder blocks. None: those of the finest level with attention, down
            and up.

    Raises:
        ValueError: No self-attention, an unknown structure, a layer that matches nothing, or one
            whose present processor does more than plain attention.

    Notes:
        RAU-Net must know the run: :meth:`follow` a pipeline or scheduler, or :meth:`set_timesteps`.
        ``transfuse.integrations.diffusers.patch(pipe, HiDiffusionOptions())`` follows the pipeline.
        Any batch, and any height and width; the layer is called through its model, which says how
        large the latent is. Windowed attention costs a quarter of the global one.

    Example:
        >>> class Layer(nn.Module):
        ...     heads = 2
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in "qkvo")
        ...     def forward(self, x):
        ...         raise NotImplementedError("the patch computes it")
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = Layer()
        ...     def forward(self, sample):
        ...         y = self.layer(sample.flatten(2).mT)
        ...         return y.mT.unflatten(2, sample.shape[2:])
        >>> options = HiDiffusionOptions(raunet=False)
        >>> with torch.no_grad(), HiDiffusion(Net(), options, layers=["layer"]) as windows:
        ...     y = windows.model(torch.randn(1, 8, 9, 12))
        >>> y.shape, len(windows.drawn)
        (torch.Size([1, 8, 9, 12]), 1)
    """

    def __init__(
        self,
        model: nn.Module,
        options: HiDiffusionOptions | None = None,
        *,
        layers: Sequence[int | str] | None = None,
    ) -> None:
        self.options = HiDiffusionOptions() if options is None else options
        self.model = model
        options = self.options
        layout = options.layout
        if layout is None and (options.raunet or (options.windows and layers is None)):
            layout = find_layout(model)
        self._layout = layout
        chosen: dict[str, nn.Module] = {}
        if options.windows:
            where = layout.windows if layers is None and layout is not None else layers
            chosen = select_attention(model, where, default_count=None)
        elif layers is not None:
            raise ValueError("layers: chooses the windowed layers, and windows is False")
        self._signature = inspect.signature(model.forward)
        names = list(self._signature.parameters)
        self._sample_argument = names[0]
        self._time_argument = next((name for name in _TIME_ARGUMENTS if name in names), None)
        if self._time_argument is None and (options.raunet or options.redraw == "timestep"):
            raise ValueError(
                f"{type(model).__name__}.forward has no timestep: choose raunet=False and "
                "redraw='call'"
            )
        self._generator = torch.Generator().manual_seed(options.seed)
        self._run = RunSteps()
        self._drawn: deque[tuple[int, ...]] = deque(maxlen=_REMEMBERED)
        self._replayed: Iterator[tuple[int, ...]] | None = None
        self._last_time: float | None = None
        self._call: _Call | None = None
        blocks = {name: _surrounding(model, name) for name in chosen}
        self._handle = PatchHandle(
            {
                name: (
                    layer,
                    WindowedLayer(
                        name,
                        self,
                        blocks[name],
                        odd=options.odd,
                        variant=options.variant,
                        backend=options.backend,
                    ),
                )
                for name, layer in chosen.items()
            }
        )
        self._hooks = tuple(block for block in blocks.values() if block is not None)
        self._raunet: RAUNet | None = None
        try:
            if options.raunet and layout is not None:
                self._raunet = RAUNet(model, layout)
                self._hooks = (*self._hooks, self._raunet)
        except BaseException:
            self.remove()
            raise
        begin = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._hooks = (*self._hooks, begin)

    # ---- the run --------------------------------------------------------------------------------

    def follow(self, source: Any) -> HiDiffusion:
        """Take the steps of each run from a pipeline's scheduler, or from a scheduler.

        A run that starts within the list (image-to-image) counts from where the scheduler says it
        begins, as the official code does; with one that does not say (DDIM), from the list's first
        step. :meth:`set_timesteps` decides.

        Raises:
            TypeError: Neither.
        """
        self._run.follow(source)
        return self

    def set_timesteps(self, timesteps: Tensor | Sequence[float]) -> HiDiffusion:
        """Give the timesteps of the run that follows, in any order.

        Raises:
            ValueError, TypeError: Empty, or not a list of numbers.
        """
        self._run.set(timesteps)
        return self

    def schedule(self, latent: Size, steps: int) -> RAUSchedule:
        """The steps in which RAU-Net acts for a latent (H, W) and a number of steps.

        Raises:
            ValueError: RAU-Net is not in use.
            TypeError: The schedule of the options gave something else.
        """
        options, layout = self.options, self._layout
        if layout is None or not options.raunet:
            raise ValueError("schedule: raunet is False")
        if options.schedule is not None:
            made = options.schedule(latent, steps)
            if not isinstance(made, RAUSchedule):
                raise TypeError(f"schedule: expected it to return a RAUSchedule, got {made!r}")
            return made
        aggressive = options.aggressive
        if aggressive is None:
            aggressive = _input_channels(self.model) != _INPAINTING_CHANNELS
        return rau_schedule(
            layout.model if options.model is None else options.model,
            latent,
            steps,
            aggressive=aggressive,
            controlnet=options.controlnet,
        )

    # ---- the shifts -----------------------------------------------------------------------------

    @property
    def drawn(self) -> tuple[tuple[int, ...], ...]:
        """Shifts of each of the last 10000 calls: one number per layer, in order of ``layers``."""
        return tuple(self._drawn)

    def replay(self, shifts: Sequence[Sequence[int]]) -> HiDiffusion:
        """Use these shifts, such as another run's ``drawn``, for the calls that follow.

        Args:
            shifts: For each call one number 0 to 3 per layer. More calls than entries are an error.

        Raises:
            ValueError: An entry that does not fit.
        """
        rows = [tuple(check_shift("shifts", k) for k in row) for row in shifts]
        for row in rows:
            if len(row) != len(self.layers):
                raise ValueError(
                    f"shifts: expected {len(self.layers)} numbers per call (one per layer), "
                    f"got {len(row)}"
                )
        self._replayed = iter(rows)
        return self

    def _draw(self, time: float | None) -> tuple[int, ...]:
        count, options = len(self.layers), self.options
        if self._replayed is not None:
            row = next(self._replayed, None)
            if row is None:
                raise RuntimeError("replay: the shifts are used up")
            return row
        if options.shift is not None:
            return (options.shift,) * count
        if options.redraw == "timestep" and self._drawn and time == self._last_time:
            return self._drawn[-1]
        return tuple(torch.randint(SHIFTS, (count,), generator=self._generator).tolist())

    # ---- a call ---------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self._signature.bind_partial(*args, **kwargs)
        sample = bound.arguments.get(self._sample_argument)
        if not isinstance(sample, Tensor) or sample.dim() != 4:
            got = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise ValueError(f"HiDiffusion needs a model input of shape (B, C, H, W), got {got}")
        latent = (sample.shape[2], sample.shape[3])
        time = None
        if self._time_argument is not None and (
            self._raunet is not None or self.options.redraw == "timestep"
        ):
            if self._time_argument not in bound.arguments:
                raise ValueError("HiDiffusion needs a model that is called with a timestep")
            time = time_value(bound.arguments[self._time_argument])
        replaced = None
        if self._raunet is not None and time is not None:
            step, steps = self._run.at(time)
            schedule = self.schedule(latent, steps)
            self._raunet.begin(
                latent, strided=step in schedule.strided, pooled=step in schedule.pooled
            )
            fitted = self._raunet.fit_residuals(bound.arguments)
            if fitted:
                bound.arguments.update(fitted)
                replaced = (bound.args, bound.kwargs)
        row = self._draw(time)
        self._drawn.append(row)
        self._last_time = time
        self._call = _Call(latent, dict(zip(self.layers, row, strict=True)))
        return replaced

    def grid(self, name: str, hidden_states: Tensor) -> Size:
        """Height and width of the tokens of a layer in the present call."""
        if hidden_states.ndim == 4:
            return hidden_states.shape[2], hidden_states.shape[3]
        if self._call is None:
            raise RuntimeError(
                f"layer {name!r} was called without its model, whose input says how large the "
                "image is"
            )
        try:
            return token_grid(self._call.latent, hidden_states.shape[1])
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    def shift(self, name: str) -> int:
        """Number of the shift of a layer in the present call."""
        return 0 if self._call is None else self._call.shifts[name]

    def __repr__(self) -> str:
        state = "installed" if self.installed else "removed"
        raunet = "without RAU-Net" if self._layout is None or not self.options.raunet else "RAU-Net"
        return (
            f"HiDiffusion({type(self.model).__name__}, {len(self.layers)} windowed layers, "
            f"{raunet}, {state})"
        )


def _surrounding(model: nn.Module, name: str) -> BlockTokens | None:
    """Watches the module around a layer, if that is a block of its own."""
    parent = name.rpartition(".")[0]
    return BlockTokens(model.get_submodule(parent)) if parent else None


def _input_channels(model: nn.Module) -> int | None:
    """Channels that the model's first convolution takes."""
    return getattr(getattr(model, "conv_in", None), "in_channels", None)
