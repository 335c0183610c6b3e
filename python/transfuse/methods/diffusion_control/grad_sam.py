"""Enhancing Conditional Image Generation with Explainable Latent Space Manipulation ("Grad-SAM").

Kshitij Pathania; 2024; arXiv 2408.16232; official code
kshitij79/CS-7476-Improvements-in-DIffusion-Model.

With A_l (H, N, L) the softmax weights of cross-attention layer l and e (C, H, W) the denoiser's
output, the importance of an output element for subject s is

    S_ls[c, i, j] = sum_{h, q} A_l[h, q, s] phi(d e[c, i, j] / d A_l[h, q, s]),

phi = |.| (paper) or max(., 0) (code), A_l taken as an independent input of what follows the layer.
Scores become masks (:func:`make_mask`), and at a few steps the latent keeps what a mask covers and
takes the rest from a noised reference: z <- M z + (1 - M) (sqrt(a) z_ref + sqrt(1 - a) noise).

How the Jacobian is had: out = A v is linear in A, so only the subjects' columns enter the
graph, as a perturbation d (H, N, n) of weight zero that adds d v_s to the layer's output. The
columns of A themselves are exp(logit - lse). No map and no gradient of one is formed.

Deviations from the official code, all deliberate:

- Every row of the Jacobian is an exact one-hot row. The released code feeds random normal rows to
  the batched product, so that each score mixes eight neighbours with random signs.
- Subjects are positions in the text encoder's tokens, sub-words summed (:func:`subject_tokens`);
  the code counts words of the sentence.
- phi is the paper's absolute value (``phi="relu"`` is the code's), masks follow the paper
  (``rule="official"``: what the code's smoothing amounts to; ``rule="mean"``: an older one;
  ``rule="aggregated"``: for scores of ``mode="aggregated"``).
- Elements outside a mask are overwritten by one ``where``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods._attention_columns import attention_columns
from transfuse.methods._attention_layers import (
    attention_scale,
    head_count,
    masked_source,
    run_projected_attention,
    select_attention,
)
from transfuse.methods._attention_patch import (
    ModelPatch,
    PatchHandle,
)
from transfuse.methods.diffusion_control._ddim import add_noise
from transfuse.methods.diffusion_control._jacobian_scores import (
    attention_jacobian_scores,
    check_phi,
    column_scores,
    rectify,
    reverse_scores,
)
from transfuse.methods.diffusion_control._subjects import (
    Subjects,
    blend_latents,
    make_mask,
    subject_columns,
    subject_tokens,
)
from transfuse.ops import attend_with_lse

__all__ = [
    "GradSAM",
    "GradSAMOptions",
    "Scores",
    "add_noise",
    "attention_columns",
    "attention_jacobian_scores",
    "blend_latents",
    "column_scores",
    "keep_subjects",
    "make_mask",
    "subject_tokens",
]

_MODES = ("exact", "fast", "aggregated")


@dataclass(frozen=True, kw_only=True)
class GradSAMOptions:
    """Options of :class:`GradSAM`.

    Args:
        phi: ``"abs"`` (paper) or ``"relu"`` (code).
        mode: ``"exact"``: every row of the Jacobian. ``"fast"``: the gradient of the output's sum
            alone, each query's importance read at its own place, the same for all channels; a
            thousand times cheaper and another quantity. ``"aggregated"``: as cheap; the attention
            maps themselves, averaged over the layers of one size with the share that each has in
            the gradient of the output's sum, an older alternative of the code.
        chunk: Rows of the Jacobian computed at once; memory grows with it.

    Raises:
        ValueError, TypeError: A value outside its range.
    """

    phi: str = "abs"
    mode: str = "exact"
    chunk: int = 32

    def __post_init__(self) -> None:
        check_phi(self.phi)
        if self.mode not in _MODES:
            raise ValueError(f"mode: expected one of {', '.join(_MODES)}, got {self.mode!r}")
        _checks.positive_int("chunk", self.chunk)

    def attach(self, model: nn.Module, *, layers: Sequence[int | str] | None = None) -> GradSAM:
        """Patch a model with these options: ``GradSAM(model, options=self, ...)``."""
        return GradSAM(model, layers=layers, options=self)


class Scores(NamedTuple):
    """Scores (B, layers, subjects, C, H, W) and the output (B, C, H, W) they are of; no graph.

    In mode ``"aggregated"`` all layers of one number of tokens are one."""

    scores: Tensor
    output: Tensor


class _Record(NamedTuple):
    weights: Tensor  # (B, H, N, n), no graph
    delta: Tensor  # the same, zero, a leaf of the graph


class _ColumnLayer:
    """The replacement on one cross-attention layer: adds a perturbation of weight zero."""

    plain = False

    def __init__(self, owner: GradSAM, name: str) -> None:
        self.name = name
        self.previous: Any = None
        self._owner = owner

    @property
    def idle(self) -> bool:
        return not self._owner.scoring

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        arguments = (hidden_states, encoder_hidden_states, attention_mask, temb)
        if self.idle:
            return self.previous(attn, *arguments)
        if encoder_hidden_states is None:
            raise ValueError(
                f"layer {self.name!r} received no context: scores are those of cross-attention"
            )
        # From here on there is something to differentiate; what came before costs no graph. The
        # caller's mode comes back when score() ends.
        torch.set_grad_enabled(True)
        result = self.previous(attn, *arguments)
        context, mask = encoder_hidden_states, attention_mask
        below = self.previous
        while hasattr(below, "previous"):  # references appended to the text have a softmax apart
            if hasattr(below, "text_part") and not below.idle:
                context, mask = below.text_part(context, mask)
            below = below.previous

        def core(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            scale = attention_scale(attn)
            columns = self._owner.columns(self.name, key.shape[2]).to(query.device)
            with torch.no_grad():
                lse = attend_with_lse(query, masked_source(key, value, mask), scale=scale).lse
                weights = attention_columns(query, key, columns, lse, scale=scale, mask=mask)
            delta = torch.zeros_like(weights, dtype=query.dtype, requires_grad=True)
            self._owner.record(self.name, _Record(weights, delta))
            chosen = value.detach().index_select(2, columns)
            return delta @ chosen.repeat_interleave(head_count(attn) // value.shape[1], dim=1)

        # Linear in the perturbation, which is zero: subtracting its own value leaves its derivative
        # and adds nothing to the result.
        shift = run_projected_attention(attn, core, hidden_states.detach(), context, mask, temb)
        return result + (shift - shift.detach())


@register(
    title="Enhancing Conditional Image Generation with Explainable Latent Space Manipulation",
    authors=("Kshitij Pathania",),
    year=2024,
    venue="arXiv",
    arxiv="2408.16232",
    repository="https://github.com/kshitij79/CS-7476-Improvements-in-DIffusion-Model",
    kind="patch",
    ops=("attend_with_lse",),
)
class GradSAM(ModelPatch):
    """Scores which elements of a denoiser's output depend on which words of the prompt.

    Constructing it patches the chosen layers; :meth:`remove`, or leaving ``with``, restores the
    model exactly. Outside :meth:`score` the model runs as before.

    Args:
        model: A diffusers UNet, an LDM UNet, or any module whose attention layers expose to_q,
            to_k, to_v, to_out and a head count.
        layers: Cross-attention layers: names and decoder block numbers; None: the last one of the
            decoder, as released.
        options: See :class:`GradSAMOptions`.

    Raises:
        ValueError: No cross-attention, a layer that matches nothing, or a layer whose present
            processor does more than plain attention.

    Notes:
        Install it after other patches: it runs what lies below it (references of EasyRef, say) and
        adds the perturbation to that.

    Example:
        >>> class Layer(nn.Module):
        ...     heads, is_cross_attention = 2, True
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in "qkvo")
        ...     def forward(self, x, context):
        ...         split = lambda y: y.unflatten(-1, (2, 4)).transpose(1, 2)
        ...         q, k, v = split(self.to_q(x)), split(self.to_k(context)), self.to_v(context)
        ...         out = (q @ k.mT / 2).softmax(-1) @ split(v)
        ...         return self.to_out(out.transpose(1, 2).flatten(2))
        >>> layer, x, text = Layer(), torch.randn(1, 9, 8), torch.randn(1, 5, 8)
        >>> with GradSAM(layer) as patch:
        ...     call = lambda: layer(x, text).mT.unflatten(2, (3, 3))
        ...     result = patch.score(call, [[1], [2, 3]])
        >>> result.scores.shape, make_mask(result.scores).shape
        (torch.Size([1, 1, 2, 8, 3, 3]), torch.Size([1, 8, 3, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int | str] | None = None,
        options: GradSAMOptions | None = None,
    ) -> None:
        self.options = GradSAMOptions() if options is None else options
        self._model = model
        self._subjects: Subjects | None = None
        self._raw_subjects: Sequence[int | Sequence[int]] = ()
        self._records: dict[str, _Record] = {}
        chosen = select_attention(model, layers, cross=True, default_count=1)
        self._handle = PatchHandle(
            {name: (layer, _ColumnLayer(self, name)) for name, layer in chosen.items()}
        )
        self._hooks = (model.register_forward_pre_hook(self._before_forward, with_kwargs=True),)

    @property
    def scoring(self) -> bool:
        """Whether :meth:`score` is running."""
        return self._subjects is not None

    def score(self, call: Callable[[], Tensor], subjects: Sequence[int | Sequence[int]]) -> Scores:
        """Runs the model once and scores its output.

        Args:
            call: Runs the patched model once, on the conditional half alone, and returns its
                output (B, C, H, W).
            subjects: Token positions (see :func:`subject_tokens`), the same for all samples.

        Returns:
            :class:`Scores`. Works where gradients are switched off around it.

        Raises:
            ValueError, TypeError: Subjects that do not fit, or an output of another shape.
            RuntimeError: The patch has been removed, a layer did not run exactly once, or the call
                gave no graph (it ran in inference mode by itself).
        """
        if not self._handle.installed:
            raise RuntimeError("the patch has been removed from the model")
        if self.scoring:
            raise RuntimeError("score: already running")
        self._raw_subjects, self._subjects = subjects, subject_columns(subjects)
        self._records = {}
        try:
            with torch.inference_mode(False), torch.no_grad():
                output = call()
                with torch.enable_grad():
                    return self._scores(output)
        finally:
            self._subjects, self._records = None, {}

    def _scores(self, output: Tensor) -> Scores:
        output = _checks.tensor("output of call", output, ("B", "C", "H", "W"))
        missing = [name for name in self.layers if name not in self._records]
        if missing:
            raise RuntimeError(
                f"layers {', '.join(missing)} were not reached: the call did not run the model, or "
                "another patch lies over this one; install GradSAM last"
            )
        if not output.requires_grad:
            raise RuntimeError(
                "the output of call carries no graph: run it outside torch.inference_mode and "
                "without detaching"
            )
        records = [self._records[name] for name in self.layers]
        for record in records:
            if record.delta.shape[0] != output.shape[0]:
                raise RuntimeError(
                    f"a layer ran on {record.delta.shape[0]} samples, the output has "
                    f"{output.shape[0]}: score one half of a guided batch"
                )
        if self.options.mode == "aggregated":
            return Scores(self._aggregated(output, records), output.detach())
        rule = self._fast if self.options.mode == "fast" else self._exact
        scores = torch.stack(rule(output, records), dim=1)  # (B, layers, n, C, H, W)
        member = self._subjects.member.to(scores)  # type: ignore[union-attr]
        return Scores(torch.einsum("sn,blnchw->blschw", member, scores), output.detach())

    def _exact(self, output: Tensor, records: list[_Record]) -> list[Tensor]:
        weights, deltas = [r.weights for r in records], [r.delta for r in records]
        return reverse_scores(output, weights, deltas, self.options.phi, self.options.chunk)

    def _fast(self, output: Tensor, records: list[_Record]) -> list[Tensor]:
        gradients = torch.autograd.grad(output.sum(), [r.delta for r in records], allow_unused=True)
        maps = []
        for record, gradient in zip(records, gradients, strict=True):
            amount = record.weights
            gradient = torch.zeros_like(amount) if gradient is None else gradient.to(amount.dtype)
            own = (amount * rectify(gradient, self.options.phi)).sum(1).mT  # (B, n, N)
            grid = _grid(own.shape[2], output.shape[2], output.shape[3])
            own = nn.functional.interpolate(own.unflatten(2, grid), size=output.shape[2:])
            maps.append(own[:, :, None].expand(-1, -1, output.shape[1], -1, -1))
        return maps

    def _aggregated(self, output: Tensor, records: list[_Record]) -> Tensor:
        gradients = torch.autograd.grad(output.sum(), [r.delta for r in records], allow_unused=True)
        member = self._subjects.member  # type: ignore[union-attr]
        sizes: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for record, gradient in zip(records, gradients, strict=True):
            amount = record.weights
            gradient = torch.zeros_like(amount) if gradient is None else gradient.to(amount.dtype)
            own = member.to(amount)
            part = torch.einsum("sn,bhqn->bs", own, rectify(gradient, self.options.phi))
            seen = torch.einsum("sn,bhqn->bsq", own, amount) / amount.shape[1]
            sizes.setdefault(amount.shape[2], []).append((part, seen))
        maps = []
        for tokens, layers in sizes.items():
            total = torch.stack([part for part, _ in layers]).sum(0)
            # Where no layer has a part in the output, nothing is seen: zero, not NaN.
            share = [torch.where(total > 0, part / total, 0.0) for part, _ in layers]
            pairs = zip(share, layers, strict=True)
            mixed = torch.stack([w[..., None] * seen for w, (_, seen) in pairs]).sum(0)
            mixed = mixed.unflatten(2, _grid(tokens, output.shape[2], output.shape[3]))
            mixed = nn.functional.interpolate(mixed, size=output.shape[2:])
            maps.append(mixed[:, :, None].expand(-1, -1, output.shape[1], -1, -1))
        return torch.stack(maps, dim=1)

    def columns(self, name: str, tokens: int) -> Tensor:
        """Columns asked for, checked against a layer's number of context tokens."""
        try:
            return subject_columns(self._raw_subjects, tokens).columns
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    def record(self, name: str, record: _Record) -> None:
        """What a layer leaves behind while scoring."""
        if name in self._records:
            raise RuntimeError(f"layer {name!r} ran twice: score one call of the model at a time")
        self._records[name] = record

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict):
        """Inference tensors cannot be part of a graph: take copies while scoring."""
        if not self.scoring:
            return None

        def usable(value):
            inference = isinstance(value, Tensor) and value.is_inference()
            return value.clone() if inference else value

        args = tuple(usable(value) for value in args)
        return args, {name: usable(value) for name, value in kwargs.items()}

    def __repr__(self) -> str:
        state = "installed" if self.installed else "removed"
        return (
            f"GradSAM({type(self._model).__name__}, {len(self.layers)} layers, {state}, "
            f"phi={self.options.phi!r}, mode={self.options.mode!r})"
        )


def _grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a layer's tokens, from the output's aspect ratio."""
    rows = round(math.sqrt(tokens * height / width))
    if rows < 1 or tokens % rows or rows * width != (tokens // rows) * height:
        raise ValueError(
            f"layers: {tokens} tokens do not form a grid of the ratio {height} x {width} of the "
            "output, which modes 'fast' and 'aggregated' read places from"
        )
    return rows, tokens // rows


@torch.no_grad()
def keep_subjects(
    patch: GradSAM,
    predict: Callable[[Tensor, int], Tensor],
    step: Callable[[Tensor, int, Tensor], Tensor],
    latent: Tensor,
    reference: Tensor,
    *,
    subjects: Sequence[int | Sequence[int]],
    labels: Sequence[int],
    alphas_cumprod: Tensor,
    noise: Tensor,
    at: Collection[int] = (5, 18, 28),
    predict_unconditional: Callable[[Tensor, int], Tensor] | None = None,
    guidance: float = 8.0,
    rule: str = "paper",
) -> Tensor:
    """The whole method: sampling in which masked-out elements are taken from a reference.

    At a step of ``at`` the scores are those of the step before it, on that step's input; the
    overwrite follows that step's update, at the noise level of the step to come.

    Args:
        patch: Patch on the model that ``predict`` calls.
        predict: (latent, label) -> noise under the prompt, by one call of the model.
        step: (noise, label, latent) -> the sampler's next latent.
        latent: (B, C, H, W) start, pure noise as released.
        reference: (1 or B, C, H, W) clean latent of the reference image.
        subjects: Token positions of the subjects.
        labels: Time labels in the order visited (50 steps at strength 0.9 visit 45).
        alphas_cumprod: (num_train_steps,).
        noise: The shape of ``reference``, one draw for all steps.
        at: Numbers of the visited steps (from 0) whose input is overwritten. Those past the last
            step have no effect; 0, which no step precedes, is refused.
        predict_unconditional: The same without prompt; None: no guidance.
        guidance: Scale s of e_u + s (e_c - e_u).
        rule: Of :func:`make_mask`.

    Returns:
        (B, C, H, W) latent after the last step.

    Raises:
        ValueError: A step number below 1, labels outside the schedule, shapes that do not fit.
    """
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in at):
        raise ValueError(f"at: expected numbers of steps from 1, got {sorted(at)}")
    guidance = _checks.number("guidance", guidance)
    alphas = alphas_cumprod.tolist()
    if any(not 0 <= label < len(alphas) for label in labels):
        raise ValueError(f"labels: expected labels in [0, {len(alphas)}), got {list(labels)}")
    for number, label in enumerate(labels):
        following = number + 1
        manipulate = following in at and following < len(labels)
        mask = None
        if manipulate:
            result = patch.score(lambda z=latent, t=label: predict(z, t), subjects)  # type: ignore[misc]
            mask, output = make_mask(result.scores, rule=rule), result.output
        else:
            output = predict(latent, label)
        if predict_unconditional is not None:
            free = predict_unconditional(latent, label)
            output = free + guidance * (output - free)
        latent = step(output, label, latent)
        if mask is not None:
            background = add_noise(reference, noise, alphas[labels[following]])
            latent = blend_latents(latent, background.to(latent.dtype), mask)
    return latent
