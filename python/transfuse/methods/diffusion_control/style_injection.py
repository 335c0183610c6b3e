"""Style Injection in Diffusion: A Training-free Approach for Adapting Large-scale Diffusion Models
for Style Transfer ("StyleID").

Jiwoo Chung, Sangeek Hyun, Jae-Pil Heo; CVPR 2024; arXiv 2312.09008; official code jiwoogit/StyleID.

Content and style latents are DDIM-inverted; at every time label t and chosen self-attention layer
the content run leaves its queries q_c, the style run its keys and values k_s, v_s. Sampling starts
at the content's inverted latent with the style's channel statistics (AdaIN),

    z = sigma_s (z_c - mu_c) / sigma_c + mu_s,

and replaces self-attention in the chosen layers by

    q~ = gamma q_c + (1 - gamma) q,      out = softmax(T q~ k_s^T / sqrt(D)) v_s.

T > 1 sharpens: it multiplies the logits, whose spread the foreign keys lower. It applies whenever
a query or keys and values are injected; a call with nothing to inject is plain attention.

Deviations from the official code, all deliberate:

- gamma and T are real numbers (the diffusers script parses them as integers) and are checked.
- AdaIN statistics are per sample, with 1e-4 added to sigma_c, as in the diffusers version; the LDM
  version pools the batch and adds nothing (``statistics="batch"``).
- Every stored label is injected. The LDM version drops its first sampling step altogether
  (``skip=1`` of :func:`stylize`).
- Default layers are the last six decoder self-attentions: blocks 6-11 of Stable Diffusion 1.x and
  2.x, as in the LDM version (the diffusers version ships 7-11). A model with fewer takes them all.
- A label or layer without stored features is an error, not silently plain attention
  (``missing="plain"`` gives the official behaviour).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transfuse._registry import register
from transfuse.methods._attention_layers import (
    masked_source,
    select_attention,
)
from transfuse.methods._attention_patch import (
    ModelPatch,
    PatchHandle,
    SelfAttentionLayer,
)
from transfuse.methods.diffusion_control._ddim import (
    DDIMStep,
    Transition,
    ddim_invert_step,
    ddim_reverse_step,
    inversion_schedule,
    reverse_schedule,
    time_label,
)
from transfuse.methods.diffusion_control._feature_store import (
    Features,
    FeatureStore,
    MemoryReport,
)
from transfuse.methods.diffusion_control._model_calls import RecordedCalls
from transfuse.ops import Blend, adain, attend

__all__ = [
    "DDIMStep",
    "FeatureStore",
    "StyleInjectionOptions",
    "StyleInjector",
    "Transition",
    "adain_latent",
    "ddim_invert_step",
    "ddim_reverse_step",
    "inject",
    "inversion_schedule",
    "reverse_schedule",
    "stylize",
]

_DEFAULT_LAYER_COUNT = 6
_TIME_ARGUMENTS = ("timestep", "timesteps")


def _check_gamma(gamma: object) -> None:
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma: expected a number in [0, 1], got {gamma!r}")


def _check_temperature(temperature: object) -> None:
    real = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not real or not 0 < temperature < math.inf:  # type: ignore[operator]
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")


@dataclass(frozen=True, kw_only=True)
class StyleInjectionOptions:
    """Options of :class:`StyleInjector`.

    Args:
        gamma: Share of the content query in [0, 1]; 0.75 keeps structure, 0.3 gives more style.
        temperature: Logit multiplier T > 0 of injected attention.
        missing: What a layer does at a label without features: ``"refuse"`` or run ``"plain"``.
        storage: ``"features"`` keeps the captured tensors; ``"recompute"`` keeps only the model's
            inputs and runs the model on them again when their label is injected: two more forward
            passes per step, memory for one step.
        store_dtype: Floating dtype of stored features; None keeps the model's.
        store_device: Device of stored features; None leaves them on the model's.
        pin_memory: Pin features stored on the CPU when there is a CUDA device.
        backend: Backend of ``transfuse.ops.attend``; None chooses.

    Raises:
        ValueError: A value outside its range.
    """

    gamma: float = 0.75
    temperature: float = 1.5
    missing: str = "refuse"
    storage: str = "features"
    store_dtype: torch.dtype | None = None
    store_device: torch.device | str | None = None
    pin_memory: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)
        _check_temperature(self.temperature)
        for name, choices in (
            ("missing", ("refuse", "plain")),
            ("storage", ("features", "recompute")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        self.new_store()  # checks the storage options

    def new_store(self) -> FeatureStore:
        """An empty feature store with these storage options."""
        return FeatureStore(
            dtype=self.store_dtype, device=self.store_device, pin_memory=self.pin_memory
        )

    def attach(
        self, model: nn.Module, *, layers: Sequence[int | str] | None = None
    ) -> StyleInjector:
        """Patch a model with these options: ``StyleInjector(model, options=self, ...)``."""
        return StyleInjector(model, layers=layers, options=self)


def _check_features(query: Tensor, name: str, feature: Tensor, *, tokens: bool) -> None:
    same_heads = feature.ndim == 4 and query.ndim == 4 and feature.shape[1] == query.shape[1]
    valid = (
        same_heads
        and feature.shape[0] in (1, query.shape[0])
        and (name == "value_style" or feature.shape[3] == query.shape[3])
        and (not tokens or feature.shape[2] == query.shape[2])
    )
    if not valid:
        axes = "(1 or B, H, N, D)" if tokens else "(1 or B, H, M, D)"
        raise ValueError(
            f"{name}: expected {axes} to fit the query {tuple(query.shape)}, "
            f"got {tuple(feature.shape)}"
        )


def inject(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    query_content: Tensor | None = None,
    key_style: Tensor | None = None,
    value_style: Tensor | None = None,
    gamma: float = 0.75,
    temperature: float = 1.5,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Style-injected attention: softmax(T q~ k_s^T scale) v_s, q~ = gamma q_c + (1 - gamma) q.

    Args:
        query: (B, H, N, D) query of the latent being generated.
        key: (B, H, M, D) own key; used, and needed, only where no style key is given.
        value: (B, H, M, Dv) own value, as ``key``.
        query_content: (1 or B, H, N, D) content query, or None for no blend.
        key_style: (1 or B, H, M, D) style key, or None. M may differ from N.
        value_style: (1 or B, H, M, Dv) style value; given exactly when ``key_style`` is.
        gamma: Weight of the content query in [0, 1]; 0 and 1 use one source bit for bit.
        temperature: Logit multiplier T > 0; ignored when nothing is injected.
        mask: Mask of the own keys (bool, True = may attend, or additive float), broadcastable to
            (B, H, N, M). Refused beside style keys, which it does not describe.
        scale: Logit scale; None is 1/sqrt(D).
        backend: Backend of ``transfuse.ops.attend``.

    Returns:
        (B, H, N, Dv).

    Raises:
        ValueError: gamma or temperature out of range, shapes that do not fit, half a style pair,
            or a mask beside style keys.

    Notes:
        One call of ``attend``: the blend happens in the kernel, sources of batch 1 are read by
        every sample, and no (N, M) map or repeated source exists.

    Reference:
        arXiv 2312.09008, equations 6 and 7.

    Example:
        >>> q, k, v = torch.randn(3, 2, 2, 6, 4).unbind()
        >>> inject(q, query_content=q[:1], key_style=k[:1], value_style=v[:1]).shape
        torch.Size([2, 2, 6, 4])
    """
    _check_gamma(gamma)
    _check_temperature(temperature)
    if (key_style is None) != (value_style is None):
        raise ValueError("key_style and value_style: expected both or neither")
    blend = None
    if query_content is not None:
        _check_features(query, "query_content", query_content, tokens=True)
        blend = Blend(query_content, gamma)
    if key_style is not None and value_style is not None:
        if mask is not None:
            raise ValueError("mask: describes the own keys and cannot be used with style keys")
        _check_features(query, "key_style", key_style, tokens=False)
        _check_features(query, "value_style", value_style, tokens=False)
        key, value = key_style, value_style
    if key is None or value is None:
        raise ValueError("key and value: needed when no style key and value are given")
    injected = query_content is not None or key_style is not None
    source = masked_source(key, value, mask, temperature=temperature if injected else 1.0)
    return attend(query, source, blend=blend, scale=scale, backend=backend)


class _InjectionLayer(SelfAttentionLayer):
    _owner: StyleInjector
    reason = "style injection works on self-attention"

    @property
    def idle(self) -> bool:
        return self._owner.mode is None


@register(
    title="Style Injection in Diffusion: A Training-free Approach for Adapting Large-scale "
    "Diffusion Models for Style Transfer",
    authors=("Jiwoo Chung", "Sangeek Hyun", "Jae-Pil Heo"),
    year=2024,
    venue="CVPR",
    arxiv="2312.09008",
    repository="https://github.com/jiwoogit/StyleID",
    kind="patch",
    ops=("attend", "adain"),
)
class StyleInjector(ModelPatch):
    """Captures and injects self-attention features of a denoising model.

    Constructing it patches the chosen layers; :meth:`remove`, or leaving ``with``, restores the
    model exactly. Outside the two modes the model runs its original attention.

    Args:
        model: A diffusers UNet, an LDM UNet, or any module whose attention layers expose to_q,
            to_k, to_v, to_out and a head count.
        layers: Self-attention layers to use: names (of a layer or of a module that contains some)
            and decoder block numbers counted from 0, as the paper counts them. None: the last six
            self-attention layers of the decoder (blocks 6-11 of Stable Diffusion 1.x), or all of
            them if there are fewer. In a model without a decoder, numbers are positions among its
            self-attention layers and the default is the last six of those.
        options: See :class:`StyleInjectionOptions`.

    Raises:
        ValueError: No self-attention, a layer that matches nothing, or a layer whose present
            processor does more than plain attention.

    Notes:
        Features are stored by integer time label. It is read from the model's ``timestep`` (or
        ``timesteps``) argument; for a model without one, call :meth:`at` before the model.

    Example:
        >>> class Layer(nn.Module):
        ...     heads = 2
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in "qkvo")
        ...     def forward(self, x):
        ...         raise NotImplementedError("the injector computes it")
        >>> model, x = nn.Sequential(Layer()), torch.randn(1, 5, 8)
        >>> with torch.no_grad(), StyleInjector(model).at(1) as injector:
        ...     for role in ("content", "style"):
        ...         with injector.capture(role):
        ...             _ = model(x)
        ...     with injector.inject():
        ...         y = model(x)
        >>> y.shape
        torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int | str] | None = None,
        options: StyleInjectionOptions | None = None,
    ) -> None:
        self.options = StyleInjectionOptions() if options is None else options
        self.store = self.options.new_store()
        self._model = model
        self._mode: str | None = None
        self._steps: frozenset[int] | None = None
        self._label: int | None = None
        self._recorded = RecordedCalls()
        self._replaying = False
        parameters = list(inspect.signature(model.forward).parameters)
        # (name, position) of the argument that carries the time label
        self._time_argument = next(
            ((name, parameters.index(name)) for name in _TIME_ARGUMENTS if name in parameters), None
        )
        chosen = select_attention(model, layers, default_count=_DEFAULT_LAYER_COUNT)
        self._handle = PatchHandle(
            {name: (layer, _InjectionLayer(self, name)) for name, layer in chosen.items()}
        )
        self._hooks = (model.register_forward_pre_hook(self._before_forward, with_kwargs=True),)

    @property
    def mode(self) -> str | None:
        """``"content"``, ``"style"``, ``"inject"``, or None outside the contexts."""
        return self._mode

    def at(self, label: int) -> StyleInjector:
        """Set the time label by hand, for a model whose forward has no timestep argument."""
        self._label = time_label(label)
        return self

    def capture(self, role: str) -> contextlib.AbstractContextManager[StyleInjector]:
        """Context in which model calls store the features of ``"content"`` or ``"style"``.

        Content calls leave their queries, style calls their keys and values. A label captured
        again is overwritten; :meth:`clear` forgets.

        Raises:
            ValueError: Unknown role.
            RuntimeError: Another mode is active, or the patch has been removed.
        """
        if role not in ("content", "style"):
            raise ValueError(f"role: expected 'content' or 'style', got {role!r}")
        return self._enter(role, None)

    def inject(
        self, *, steps: Collection[int] | None = None
    ) -> contextlib.AbstractContextManager[StyleInjector]:
        """Context in which model calls use the stored features.

        Args:
            steps: Time labels at which to inject; at others the layers run plainly. None: at
                every label, and a label without features is an error (see ``missing``).

        Raises:
            RuntimeError: Another mode is active, or the patch has been removed.
        """
        return self._enter("inject", None if steps is None else frozenset(map(time_label, steps)))

    @contextlib.contextmanager
    def _enter(self, mode: str, steps: frozenset[int] | None) -> Iterator[StyleInjector]:
        if not self._handle.installed:
            raise RuntimeError("the patch has been removed from the model")
        if self._mode is not None:
            raise RuntimeError(f"cannot enter {mode!r}: mode {self._mode!r} is active")
        self._mode, self._steps = mode, steps
        try:
            yield self
        finally:
            self._mode, self._steps = None, None

    def clear(self, role: str | None = None) -> None:
        """Forget what was captured for one role, or for both."""
        self.store.clear(role)
        self._recorded.clear(role)

    def memory(self) -> MemoryReport:
        """Bytes held: content queries, style keys and values, recorded model inputs."""
        return self.store.memory()._replace(recorded=self._recorded.nbytes())

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._mode is None:
            return
        if self._time_argument is not None:
            name, position = self._time_argument
            if name in kwargs:
                self._label = time_label(kwargs[name])
            elif position < len(args):
                self._label = time_label(args[position])
        if self.options.storage != "recompute" or self._replaying:
            return
        label = self._current_label()
        if self._mode != "inject":
            self._recorded.put(self._mode, label, args, kwargs)
        elif self._steps is None or label in self._steps:
            self._replay(label)

    def _replay(self, label: int) -> None:
        """Fill the store with the features of one label by running the recorded calls again."""
        mode = self._mode
        self.store.clear()
        self._replaying = True
        try:
            with torch.no_grad():
                for role in ("content", "style"):
                    call = self._recorded.get(role, label)
                    if call is not None:
                        self._mode, self._label = role, label
                        self._model(*call.args, **call.kwargs)
        finally:
            self._mode, self._label, self._replaying = mode, label, False

    def _current_label(self) -> int:
        if self._label is None:
            raise RuntimeError(
                f"{type(self._model).__name__}.forward received no timestep: "
                "set the time label with at(label) before calling the model"
            )
        return self._label

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
        """Attention of one patched layer in the present mode, on split heads (B, H, N, D).

        Called by the patch; use it directly to drive a layer that no patch fits.

        Raises:
            ValueError: Features are missing or do not fit; the message names the layer.
        """
        label = self._current_label()
        backend = self.options.backend
        if self._mode in ("content", "style"):
            if self.options.storage == "features" or self._replaying:
                self.store.put(self._mode, label, name, query=query, key=key, value=value)
            return inject(query, key, value, mask=mask, scale=scale, backend=backend)
        if self._mode is None or (self._steps is not None and label not in self._steps):
            return inject(query, key, value, mask=mask, scale=scale, backend=backend)
        features = self.store.get(label, name, like=query)
        if self.options.missing == "refuse":
            self._check_complete(name, label, query, features)
        try:
            return inject(
                query,
                key,
                value,
                query_content=features.query,
                key_style=features.key,
                value_style=features.value,
                gamma=self.options.gamma,
                temperature=self.options.temperature,
                mask=mask,
                scale=scale,
                backend=backend,
            )
        except ValueError as error:
            raise ValueError(f"layer {name!r} at time label {label}: {error}") from error

    def _check_complete(self, name: str, label: int, query: Tensor, features: Features) -> None:
        # A run that was never captured is a choice (keys and values alone, say); one captured at
        # other labels or layers is a mistake that plain attention would hide.
        known = self._recorded if self.options.storage == "recompute" else self.store
        labels = {role: known.labels(role) for role in ("content", "style")}
        absent = [
            role
            for role, part in (("content", features.query), ("style", features.key))
            if part is None and (labels[role] or not any(labels.values()))
        ]
        if absent:
            roles = " or ".join(absent)
            raise ValueError(
                f"layer {name!r} (query {tuple(query.shape)}): no {roles} features at time label "
                f"{label}; captured labels: content {list(labels['content'])}, style "
                f"{list(labels['style'])}. Capture with the same labels and layers, name the "
                "labels to inject (inject(steps=...)), or choose missing='plain'"
            )

    def __repr__(self) -> str:
        state = "installed" if self.installed else "removed"
        return (
            f"StyleInjector({type(self._model).__name__}, {len(self.layers)} layers, {state}, "
            f"gamma={self.options.gamma}, temperature={self.options.temperature}, {self.store!r})"
        )


def adain_latent(
    content: Tensor, style: Tensor, *, statistics: str = "sample", eps: float | None = None
) -> Tensor:
    """Initial latent: the content's inverted latent with the style's channel mean and deviation.

    sigma_s (z_c - mu_c) / (sigma_c + eps) + mu_s, with unbiased sigma.

    Args:
        content: (B, C, H, W) inverted latent of the content.
        style: (1 or B, C, H', W') inverted latent of the style.
        statistics: ``"sample"``: over (H, W) of each sample; ``"batch"``: over (B, H, W) together,
            as the LDM version does. The latter mixes the images of a batch.
        eps: Added to sigma_c. None: 1e-4 for ``"sample"``, 0 for ``"batch"`` (the official
            values). A constant channel becomes the style's mean with either.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: Unknown statistics, or shapes that do not fit.

    Example:
        >>> z = adain_latent(torch.randn(1, 4, 8, 8), 3 * torch.randn(1, 4, 8, 8) + 1)
        >>> z.shape
        torch.Size([1, 4, 8, 8])
    """
    if statistics not in ("sample", "batch"):
        raise ValueError(f"statistics: expected 'sample' or 'batch', got {statistics!r}")
    if content.ndim != 4 or style.ndim != 4 or style.shape[1] != content.shape[1]:
        raise ValueError(
            "content and style: expected (B, C, H, W) and (1 or B, C, H', W'), got "
            f"{tuple(content.shape)} and {tuple(style.shape)}"
        )
    if statistics == "batch":
        return adain(content, style, dims=(0, 2, 3), eps=0.0 if eps is None else eps)
    if style.shape[0] not in (1, content.shape[0]):
        raise ValueError(f"style: expected batch 1 or {content.shape[0]}, got {style.shape[0]}")
    return adain(content, style, dims=(-2, -1), eps=1e-4 if eps is None else eps)


@torch.no_grad()
def stylize(
    injector: StyleInjector,
    predict: Callable[[Tensor, int], Tensor],
    content: Tensor,
    style: Tensor,
    *,
    alphas_cumprod: Tensor,
    num_steps: int = 50,
    variant: str = "ldm",
    prediction: str = "epsilon",
    statistics: str = "sample",
    skip: int = 0,
) -> Tensor:
    """The whole method: invert both latents, start from their AdaIN, sample with injection.

    Args:
        injector: Patch on the model that ``predict`` calls. What it held is forgotten first.
        predict: (latent, time label) -> noise or v of the same shape, by one call of the model
            with the empty prompt and without guidance.
        content: (B, C, H, W) clean latent of the content image.
        style: (1 or B, C, H', W') clean latent of the style image.
        alphas_cumprod: (num_train_steps,) cumulative alphas of the noise schedule.
        num_steps: Steps S of inversion and of sampling.
        variant: ``"ldm"`` or ``"diffusers"``; see :func:`inversion_schedule`.
        prediction: ``"epsilon"`` or ``"v_prediction"``.
        statistics: Of :func:`adain_latent`.
        skip: Number of first sampling steps left out; the LDM version leaves out 1.

    Returns:
        (B, C, H, W) stylised latent.

    Raises:
        ValueError: Arguments that do not fit, or ``skip`` outside [0, num_steps).

    Notes:
        3 num_steps model calls, 5 num_steps - 2 skip with ``storage="recompute"``. Deterministic.
    """
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip < num_steps:
        raise ValueError(f"skip: expected an integer in [0, {num_steps}), got {skip!r}")
    if alphas_cumprod.ndim != 1:
        raise ValueError(
            f"alphas_cumprod: expected (num_train_steps,), got {tuple(alphas_cumprod.shape)}"
        )
    train_steps = alphas_cumprod.shape[0]
    alphas = alphas_cumprod.tolist()
    upward = inversion_schedule(num_steps, variant=variant, num_train_steps=train_steps)
    downward = reverse_schedule(num_steps, num_train_steps=train_steps)

    def move(latent: Tensor, step: Transition, rule: Callable[..., DDIMStep]) -> Tensor:
        output = predict(latent, step.label)
        start, end = alphas[step.start], alphas[step.end]
        return rule(latent, output, alpha=start, alpha_next=end, prediction=prediction).sample

    injector.clear()
    inverted = {}
    for role, latent in (("content", content), ("style", style)):
        with injector.capture(role):
            for step in upward:
                latent = move(latent, step, ddim_invert_step)
        inverted[role] = latent
    latent = adain_latent(inverted["content"], inverted["style"], statistics=statistics)
    with injector.inject():
        for step in downward[skip:]:
            latent = move(latent, step, ddim_reverse_step)
    return latent
