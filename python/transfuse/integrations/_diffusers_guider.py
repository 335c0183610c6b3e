"""Adaptive guidance as a guider of diffusers' modular pipelines. Imports diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from transfuse.methods.diffusion_control.adaptive_guidance import AdaptiveGuidance


class AdaptiveGuider(BaseGuidance):
    """See ``transfuse.integrations.diffusers.adaptive_guider``."""

    # diffusers asks for lists.
    _input_predictions = ["pred_cond", "pred_uncond"]  # type: ignore[assignment]  # noqa: RUF012
    ignore_for_config = ["alphas_cumprod"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        threshold: float = 0.991,
        space: str = "original",
        reduce: str = "sample",
        min_guided_steps: int = 0,
        prediction: str = "epsilon",
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        alphas_cumprod: Tensor | None = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        if space == "original" and alphas_cumprod is None:
            raise ValueError(
                "alphas_cumprod: expected the scheduler's table (space='original' compares clean "
                "latents), got None"
            )
        self.guidance = AdaptiveGuidance(
            scale=guidance_scale,
            rescale=guidance_rescale,
            threshold=threshold,
            space=space,
            reduce=reduce,
            min_guided_steps=min_guided_steps,
            prediction=prediction,
        )
        self.alphas_cumprod = alphas_cumprod
        self._sample: Tensor | None = None
        self._hook: Any = None
        self._on = True

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Called by the pipeline at the beginning of each step; step 0 begins a trajectory."""
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self.guidance.reset()
            self._on = self.guidance.scale != 1.0

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Called before each model call: note the latent that the model is given."""
        super().prepare_models(denoiser)

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            named = kwargs.get("sample", kwargs.get("hidden_states"))
            self._sample = args[0] if args else named

        self._hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Called after each model call."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def prepare_inputs(self, data: Any) -> list:
        """One batch of inputs per evaluation."""
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, at, name) for at, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list:
        """One batch of inputs per evaluation."""
        names = self._input_predictions[: self.num_conditions]
        return [
            self._prepare_batch_from_block_state(input_fields, data, at, name)
            for at, name in enumerate(names)
        ]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction, and the decision on every sample."""
        pred = pred_cond
        if pred_uncond is not None:
            pred = self._guided(pred_cond, pred_uncond)
        self._sample = None
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @torch.no_grad()
    def _guided(self, cond: Tensor, uncond: Tensor) -> Tensor:
        guidance, sample, alpha = self.guidance, None, None
        if guidance.space == "original":
            if self._sample is None:
                raise RuntimeError("prepare_models was not called around the model")
            sample = self._sample
            label = int(torch.as_tensor(self._timestep).flatten()[0])
            alpha = float(self.alphas_cumprod[label])  # type: ignore[index]
        at = guidance.begin(cond.shape[0]).nonzero().flatten().to(cond.device)
        parts: list[Any] = [
            None if t is None else t.index_select(0, at) for t in (sample, cond, uncond)
        ]
        out = guidance.combine(self._step, *parts, alpha=alpha)
        self._on = bool(guidance.still_guided.any())
        return cond.index_copy(0, at, out)

    @property
    def is_conditional(self) -> bool:
        """Whether the next evaluation is the one with the condition."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Evaluations of this step."""
        return 2 if self._enabled and self._on and self._in_range() else 1

    def _in_range(self) -> bool:
        if self._num_inference_steps is None:
            return True
        first, last = (
            int(share * self._num_inference_steps) for share in (self._start, self._stop)
        )
        return first <= self._step < last
