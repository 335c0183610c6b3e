"""DiffStyler: Diffusion-based Localized Image Style Transfer.

Shaoxu Li; 2024; arXiv 2403.18461; official code lishaoxu1994/DiffStyler, which its author calls
older than the last version of the paper.

One LoRA for each style, one mask for each region. The content's noisy latents x_t^src come from
DDIM inversion under the empty prompt. At every sampling step the base model and each LoRA run on
[x_t^src ; x_t ; x_t] with [empty ; negative ; prompt], and while injection lasts

    q_j <- rho_t q_src + (1 - rho_t) q_j,   k_j <- rho_t k_src + (1 - rho_t) k_j   (values stay own)

in the decoder's self-attention, rho_t = min(1, 2 t / 1000), and the residual branch of one resnet
is replaced by the source's. The noises are put together by the masks,

    e <- e_base;   e[m_l] <- e_l[m_l]  in order,

then guidance, then one DDIM step. Outside all masks the base reconstructs the content.

Deviations from the official code, all deliberate:

- The source's q, k and features are those of the base model, computed once a step, as the paper
  describes them; the LoRA passes then run on two thirds. ``source="self"`` is the code: each LoRA
  computes the source with its own weights. A step costs 3 + 2 L samples instead of 3 + 3 L.
- LoRAs are switched on one shared model; the code copies the model for each.
- The schedule is that of the script: base in all steps, LoRA features in the first 60 % and
  attention in the first 50 %; ``rate="hard"`` (rho = 1) is plug-and-play diffusion.
- Source tensors are detached and nothing is blended in place.
- Masks are averaged over areas and cut at 1/2; the code counts any touched pixel. Soft masks and
  ``overlap="normalised"`` are extensions. Without masks the base samples alone; the code fails.
- A missing latent is an error that names its label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import near_matches, register
from transfuse.methods._attention_layers import (
    select_attention,
)
from transfuse.methods._attention_patch import (
    ModelPatch,
    PatchHandle,
    SelfAttentionLayer,
)
from transfuse.methods.diffusion_control._ddim import (
    ddim_invert_step,
    ddim_reverse_step,
    inversion_schedule,
    reverse_schedule,
)
from transfuse.methods.diffusion_control._injected_self_attention import (
    inject_features,
    injected_self_attention,
)
from transfuse.methods.diffusion_control._low_rank import (
    LowRank,
    LowRankAdapters,
    new_low_rank,
    read_low_rank,
)
from transfuse.methods.diffusion_control._region_masks import OVERLAPS, fuse_noise, region_masks

__all__ = [
    "DiffStyler",
    "DiffStylerOptions",
    "Injection",
    "LowRank",
    "LowRankAdapters",
    "Texts",
    "fuse_noise",
    "inject_features",
    "injected_self_attention",
    "invert",
    "new_low_rank",
    "read_low_rank",
    "region_masks",
    "stylize",
]

_DEFAULT_LAYER_COUNT = 8
# The residual branch's last convolution in the second resnet of the second decoder block.
_DEFAULT_FEATURES = ("up_blocks.1.resnets.1.conv2", "output_blocks.4.0.out_layers")

# (latent (B, C, H, W), time label, text (B, T, C')) -> noise (B, C, H, W)
Predict = Callable[[Tensor, int, Tensor], Tensor]


class Injection(NamedTuple):
    """What one step injects: rho and whether features are replaced, in the base and in LoRAs.

    A rate of None, as opposed to 0, means that attention is outside its schedule; both are plain.
    """

    base_rate: float | None
    base_features: bool
    style_rate: float | None
    style_features: bool


@dataclass(frozen=True, kw_only=True)
class DiffStylerOptions:
    """Options of :class:`DiffStyler`.

    Args:
        source: Whose view of the content is injected: the ``"base"`` model's (paper), or each
            LoRA's own (``"self"``, code).
        rate: ``"ramp"``: rho = min(1, 2 t / T); ``"hard"``: 1.
        base_attention, base_features, style_attention, style_features: Shares of the steps, the
            noisiest first, in which each is injected, in [0, 1].
        overlap: Of :func:`fuse_noise`.
        lora_scale: Factor of the LoRAs.
        backend: Backend of ``transfuse.ops.attend``; None chooses.

    Raises:
        ValueError: A value outside its range.
    """

    source: str = "base"
    rate: str = "ramp"
    base_attention: float = 1.0
    base_features: float = 1.0
    style_attention: float = 0.5
    style_features: float = 0.6
    overlap: str = "last_wins"
    lora_scale: float = 1.0
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("source", ("base", "self")),
            ("rate", ("ramp", "hard")),
            ("overlap", OVERLAPS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name in ("base_attention", "base_features", "style_attention", "style_features"):
            share = _checks.number(name, getattr(self, name))
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {share}")
        _checks.number("lora_scale", self.lora_scale)

    def rho(self, label: int, num_train_steps: int = 1000) -> float:
        """The rate at a time label."""
        return 1.0 if self.rate == "hard" else min(1.0, 2 * label / num_train_steps)

    def injection(
        self, number: int, num_steps: int, label: int, num_train_steps: int = 1000
    ) -> Injection:
        """What step ``number`` (from 0, noisiest first) of ``num_steps`` injects.

        Example:
            >>> DiffStylerOptions().injection(26, 50, 461)
            Injection(base_rate=0.922, base_features=True, style_rate=None, style_features=True)
        """

        def within(share: float) -> bool:
            return number < round(share * num_steps)

        rate = self.rho(label, num_train_steps)
        return Injection(
            rate if within(self.base_attention) else None,
            within(self.base_features),
            rate if within(self.style_attention) else None,
            within(self.style_features),
        )

    def attach(self, model: nn.Module, *, layers: Sequence[int | str] | None = None) -> DiffStyler:
        """Patch a model with these options and no LoRA: ``DiffStyler(model, options=self)``."""
        return DiffStyler(model, layers=layers, options=self)


class Texts(NamedTuple):
    """Prompt embeddings (1 or n, T, C): the empty and the negative prompt, one for each LoRA."""

    empty: Tensor
    negative: Tensor
    prompts: Sequence[Tensor] = ()


class _Pass(NamedTuple):
    """One run of the model: what is injected, from where, and whether the source is kept."""

    rate: float | None
    features: bool
    stored: bool  # the source is in the store, not in the batch
    keep: bool


class _StyledLayer(SelfAttentionLayer):
    _owner: DiffStyler
    reason = "queries and keys are injected into self-attention"

    @property
    def idle(self) -> bool:
        return self._owner.current is None


@register(
    title="DiffStyler: Diffusion-based Localized Image Style Transfer",
    authors=("Shaoxu Li",),
    year=2024,
    venue="arXiv",
    arxiv="2403.18461",
    repository="https://github.com/lishaoxu1994/DiffStyler",
    kind="patch",
    ops=("attend",),
)
class DiffStyler(ModelPatch):
    """Localised style transfer with one LoRA for each region, on one shared model.

    Constructing it patches the chosen layers and puts the LoRAs on; :meth:`remove`, or leaving
    ``with``, restores the model exactly. Outside :meth:`fused_noise` the model runs as before.

    Args:
        model: A diffusers UNet, an LDM UNet, or any module whose attention layers expose to_q,
            to_k, to_v, to_out and a head count.
        loras: One mapping layer name -> (down, up) for each style; see :func:`read_low_rank`.
        layers: Self-attention layers: names and decoder block numbers; None: the last eight of the
            decoder (blocks 4-11 of Stable Diffusion 1.x and 2.x), or all if there are fewer.
        features: Names of modules whose output is the residual branch of a resnet before its
            shortcut is added; None: that of the second resnet of the second decoder block, if the
            model has it.
        options: See :class:`DiffStylerOptions`.

    Raises:
        ValueError: No self-attention, a name that matches nothing, LoRA matrices that do not fit,
            or a layer whose present processor does more than plain attention.

    Example:
        >>> class Layer(nn.Module):
        ...     heads = 2
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in "qkvo")
        ...     def forward(self, x):
        ...         raise NotImplementedError("the patch computes it")
        >>> layer, text = Layer(), torch.zeros(1, 1, 8)
        >>> def predict(z, label, text):
        ...     return layer(z.flatten(2).mT).mT.view_as(z)
        >>> z = torch.randn(2, 1, 8, 3, 3)
        >>> with torch.no_grad(), DiffStyler(layer) as styler:
        ...     step = styler.options.injection(0, 50, 981)
        ...     texts = Texts(text, text)
        ...     noise = styler.fused_noise(predict, *z, 981, texts=texts, injection=step)
        >>> noise.shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        loras: Sequence[Mapping[str, LowRank | tuple[Tensor, Tensor]]] = (),
        *,
        layers: Sequence[int | str] | None = None,
        features: Sequence[str] | None = None,
        options: DiffStylerOptions | None = None,
    ) -> None:
        self.options = DiffStylerOptions() if options is None else options
        self._model = model
        self._pass: _Pass | None = None
        self._store: dict[str, tuple[Tensor, ...]] = {}
        modules = dict(model.named_modules())
        if features is None:
            features = [name for name in _DEFAULT_FEATURES if name in modules]
        elif isinstance(features, str):
            raise TypeError(f"features: expected a sequence of names, got the string {features!r}")
        for name in features:
            if name not in modules:
                raise ValueError(f"features: no module {name!r}; {near_matches(name, modules)}")
        chosen = select_attention(model, layers, default_count=_DEFAULT_LAYER_COUNT)
        self.adapters = LowRankAdapters(model, loras, scale=self.options.lora_scale)
        try:
            self._handle = PatchHandle(
                {name: (layer, _StyledLayer(self, name)) for name, layer in chosen.items()}
            )
        except ValueError:
            self.adapters.remove()
            raise
        self.features = tuple(features)
        self._hooks = tuple(
            modules[name].register_forward_hook(self._feature_hook(name)) for name in features
        )

    @property
    def current(self) -> _Pass | None:
        """What the run of the model under way injects; None outside :meth:`fused_noise`."""
        return self._pass

    @contextlib.contextmanager
    def _running(self, current: _Pass, adapter: int | None) -> Iterator[None]:
        self._pass = current
        try:
            with self.adapters.using(adapter):
                yield
        finally:
            self._pass = None

    def fused_noise(
        self,
        predict: Predict,
        latent: Tensor,
        source: Tensor,
        label: int,
        *,
        texts: Texts,
        injection: Injection,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Noise of base and LoRAs put together by their regions, before guidance.

        Args:
            predict: Runs the patched model once; see :data:`Predict`.
            latent: (n, C, H, W) latent being generated.
            source: (n, C, H, W) content latent at the same label.
            label: Time label.
            texts: :class:`Texts`, one prompt for each LoRA.
            injection: See :meth:`DiffStylerOptions.injection`.
            masks: (L, H, W), one for each LoRA, at latent resolution; None without LoRAs.

        Returns:
            (2 n, C, H, W): unconditional, then conditional.

        Raises:
            ValueError: Counts or shapes that do not fit.
            RuntimeError: The patch has been removed.
        """
        if not self.installed:
            raise RuntimeError("the patch has been removed from the model")
        count = len(self.adapters)
        if masks is None:
            masks = torch.zeros(0, *latent.shape[2:], dtype=torch.bool)
        for name, given in (("masks", masks), ("texts.prompts", texts.prompts)):
            if len(given) != count:
                raise ValueError(f"{name}: expected {count} (one for each LoRA), got {len(given)}")
        if source.shape != latent.shape:
            raise ValueError(
                f"source: expected the shape of latent {tuple(latent.shape)}, "
                f"got {tuple(source.shape)}"
            )
        n = latent.shape[0]
        shared = self.options.source == "base"
        wanted = injection.style_rate is not None or injection.style_features
        keep = shared and count > 0 and wanted
        thirds = torch.cat([source, latent, latent])
        text = self._texts(n, texts.empty, texts.negative, texts.empty)
        self._store = {}
        try:
            base = _Pass(injection.base_rate, injection.base_features, False, keep)
            with self._running(base, None):
                whole = predict(thirds, label, text)
            styled = []
            for number, prompt in enumerate(texts.prompts):
                own = _Pass(injection.style_rate, injection.style_features, shared, False)
                with self._running(own, number):
                    if shared:
                        text = self._texts(n, texts.negative, prompt)
                        styled.append(predict(thirds[n:], label, text))
                    else:
                        text = self._texts(n, texts.empty, texts.negative, prompt)
                        styled.append(predict(thirds, label, text)[n:])
        finally:
            self._store = {}
        return fuse_noise(whole[n:], styled, masks, overlap=self.options.overlap)

    @staticmethod
    def _texts(n: int, *parts: Tensor) -> Tensor:
        for part in parts:
            _checks.tensor("texts", part, ("B", "T", "C"))
            if part.shape[0] not in (1, n):
                raise ValueError(f"texts: expected batch 1 or {n}, got {tuple(part.shape)}")
        return torch.cat([part.expand(n, -1, -1) for part in parts])

    def run_layer(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float | None,
    ) -> Tensor:
        """Attention of one patched layer in the present run, on split heads (B, H, N, D).

        Raises:
            ValueError: A batch that does not hold what the run expects; the message names the
                layer.
        """
        current = self._pass
        source, n = None, None
        rate = 0.0 if current is None or current.rate is None else current.rate
        try:
            if current is None or (current.stored and current.rate is None):
                n = query.shape[0]
            elif current.stored:
                if name not in self._store:
                    raise ValueError("the source did not run")
                stored_query, stored_key = self._store[name]
                source = stored_query.to(query), stored_key.to(key)
            else:
                n = self._third(query)
                if current.keep:
                    self._store[name] = query[:n].detach(), key[:n].detach()
            return injected_self_attention(
                query,
                key,
                value,
                rate=rate,
                n_source=n,
                source=source,
                mask=mask,
                scale=scale,
                backend=self.options.backend,
            )
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    @staticmethod
    def _third(batch: Tensor) -> int:
        if batch.shape[0] % 3 or batch.shape[0] == 0:
            raise ValueError(
                "expected a batch of three thirds (source, unconditional, conditional), "
                f"got {batch.shape[0]} rows"
            )
        return batch.shape[0] // 3

    def _feature_hook(self, name: str):
        def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            current = self._pass
            if current is None:
                return None
            try:
                if current.stored:
                    if not current.features:
                        return None
                    if name not in self._store:
                        raise ValueError("the source did not run")
                    return inject_features(output, source=self._store[name][0])
                n = self._third(output)
                if current.keep:
                    self._store[name] = (output[:n].detach(),)
                return inject_features(output, n_source=n) if current.features else None
            except ValueError as error:
                raise ValueError(f"features {name!r}: {error}") from error

        return after

    def remove(self) -> None:
        """Restore the model; the adapters' matrices stay. A second call does nothing."""
        self.adapters.remove()
        super().remove()

    def __repr__(self) -> str:
        state = "installed" if self.installed else "removed"
        return (
            f"DiffStyler({type(self._model).__name__}, {len(self.layers)} layers, {state}, "
            f"{len(self.adapters)} LoRAs, source={self.options.source!r}, "
            f"rate={self.options.rate!r})"
        )


@torch.no_grad()
def invert(
    predict: Predict,
    content: Tensor,
    empty: Tensor,
    *,
    alphas_cumprod: Tensor,
    labels: Sequence[int],
    num_steps: int = 999,
    prediction: str = "epsilon",
) -> dict[int, Tensor]:
    """Noisy latents of the content at the labels of sampling, by DDIM inversion.

    Args:
        predict: See :data:`Predict`; the unpatched or idle model.
        content: (n, C, H, W) clean latent.
        empty: (1 or n, T, C) embedding of the empty prompt.
        alphas_cumprod: (num_train_steps,).
        labels: Labels whose latents are kept; nothing else is stored.
        num_steps: Steps of inversion; noise is evaluated with the label of each step's end.
        prediction: ``"epsilon"`` or ``"v_prediction"``.

    Returns:
        Label -> latent.

    Raises:
        ValueError: A label that inversion does not pass.
    """
    alphas = alphas_cumprod.tolist()
    steps = inversion_schedule(num_steps, variant="diffusers", num_train_steps=len(alphas))
    passed = {step.end for step in steps}
    absent = sorted(set(labels) - passed)
    if absent:
        raise ValueError(
            f"labels: inversion in {num_steps} steps does not pass {absent}; it passes every "
            f"label from 1 with {len(alphas) - 1} steps"
        )
    text = empty.expand(content.shape[0], -1, -1)
    latent, kept = content, {}
    for step in steps:
        output = predict(latent, step.label, text)
        latent = ddim_invert_step(
            latent,
            output,
            alpha=alphas[step.start],
            alpha_next=alphas[step.end],
            prediction=prediction,
        ).sample
        if step.end in labels:
            kept[step.end] = latent
    return kept


@torch.no_grad()
def stylize(
    styler: DiffStyler,
    predict: Predict,
    sources: Mapping[int, Tensor],
    *,
    texts: Texts,
    masks: Sequence[Tensor] | Tensor = (),
    alphas_cumprod: Tensor,
    num_steps: int = 50,
    guidance: float = 10.5,
    prediction: str = "epsilon",
) -> Tensor:
    """Sampling of the whole method, from the content's noisiest latent.

    Args:
        styler: Patch on the model that ``predict`` calls.
        predict: See :data:`Predict`.
        sources: Label -> content latent (n, C, H, W); see :func:`invert`.
        texts: :class:`Texts`. The official negative prompt is "ugly, blurry, black, low res,
            unrealistic".
        masks: One for each LoRA, any resolution; see :func:`region_masks`.
        alphas_cumprod: (num_train_steps,).
        num_steps: DDIM steps.
        guidance: Scale s of e_u + s (e_c - e_u), after fusion.
        prediction: ``"epsilon"`` or ``"v_prediction"``.

    Returns:
        (n, C, H, W).

    Raises:
        ValueError: Masks or texts that do not fit the LoRAs.
        KeyError: A label without a source latent; the message names it.
    """
    guidance = _checks.number("guidance", guidance)
    alphas = alphas_cumprod.tolist()
    schedule = reverse_schedule(num_steps, num_train_steps=len(alphas))
    for step in schedule:
        if step.label not in sources:
            raise KeyError(
                f"sources: no latent for time label {step.label}; there are {sorted(sources)}"
            )
    latent = sources[schedule[0].label]
    regions = region_masks(masks, (latent.shape[2], latent.shape[3])).to(latent.device)
    for number, step in enumerate(schedule):
        injection = styler.options.injection(number, num_steps, step.label, len(alphas))
        fused = styler.fused_noise(
            predict,
            latent,
            sources[step.label],
            step.label,
            texts=texts,
            injection=injection,
            masks=regions,
        )
        free, conditional = fused.chunk(2)
        output = free + guidance * (conditional - free)
        latent = ddim_reverse_step(
            latent,
            output,
            alpha=alphas[step.start],
            alpha_next=alphas[step.end],
            prediction=prediction,
        ).sample
    return latent
