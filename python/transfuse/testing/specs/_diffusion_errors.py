"""Calls that the sampling ops must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch

from transfuse.ops import DDIM, DDPM, Euler, Predict
from transfuse.testing.spec import BadCase

_X = torch.zeros(2, 3, 4)


def _cfg(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    arguments: dict[str, object] = {
        "sample": _X,
        "cond": _X,
        "uncond": _X,
        "update": DDIM(alpha=0.5, alpha_next=0.6),
        "scale": 2.0,
        **changes,
    }

    def call(op: Callable[..., object]) -> object:
        given = dict(arguments)
        leading = [given.pop(n) for n in ("sample", "cond", "uncond", "update")]
        return op(*leading, **given)

    return BadCase(name, call, error, match)


_SHARED = (
    _cfg("cond class", TypeError, "cond: expected a tensor, got None", cond=None),
    _cfg("cond integer", TypeError, "cond: expected float32.* got int64", cond=_X.long()),
    _cfg("cond sparse", TypeError, "cond: expected a dense", cond=_X.to_sparse()),
    _cfg("cond rank", ValueError, r"cond: expected shape \(B, \.\.\.\)", cond=torch.zeros(())),
    _cfg("sample class", TypeError, "sample: expected a tensor", sample=None),
    _cfg("sample shape", ValueError, r"sample: expected shape \(2, 3, 4\)", sample=_X[:1]),
    _cfg("sample dtype", TypeError, "sample: expected dtype float32", sample=_X.double()),
    _cfg("uncond class", TypeError, "uncond: expected a tensor, got 1.0", uncond=1.0),
    _cfg("uncond missing", ValueError, "uncond: expected a tensor", uncond=None),
    _cfg("uncond shape", ValueError, "uncond: expected shape", uncond=_X[:, :1]),
    _cfg("uncond device", ValueError, "uncond: expected device", uncond=_X.to("meta")),
    _cfg("update class", TypeError, "update: expected a Predict, DDIM", update="ddim"),
    _cfg(
        "alpha range",
        ValueError,
        r"update.alpha: expected a number in \(0, 1\), got 1.0",
        update=DDIM(alpha=1.0, alpha_next=1.0),
    ),
    _cfg(
        "alpha values",
        ValueError,
        r"update.alpha: expected a number in \(0, 1\), got 2.0",
        update=DDIM(alpha=torch.tensor([0.5, 2.0]), alpha_next=1.0),
    ),
    _cfg(
        "alpha shape",
        ValueError,
        r"update.alpha: expected a number or a tensor of shape \(2,\)",
        update=DDIM(alpha=torch.full((3,), 0.5), alpha_next=1.0),
    ),
    _cfg(
        "alpha dtype",
        TypeError,
        "update.alpha: expected dtype float32",
        update=DDIM(alpha=torch.full((2,), 0.5, dtype=torch.float16), alpha_next=1.0),
    ),
    _cfg(
        "alpha_next NaN",
        ValueError,
        "update.alpha_next: expected a finite number",
        update=DDIM(alpha=0.5, alpha_next=float("nan")),
    ),
    _cfg(
        "eta negative",
        ValueError,
        "update.eta: expected a number of at least 0",
        update=DDIM(alpha=0.5, alpha_next=0.6, eta=-0.1),
    ),
    _cfg(
        "eta large",
        ValueError,
        "update.eta: expected a variance of at most",
        update=DDIM(alpha=0.5, alpha_next=0.6, eta=9.0),
        noise=_X,
    ),
    _cfg(
        "eta upwards",
        ValueError,
        "update.alpha_next: expected at least update.alpha",
        update=DDIM(alpha=0.5, alpha_next=0.4, eta=0.5),
        noise=_X,
    ),
    _cfg(
        "noise missing",
        ValueError,
        "noise: expected a tensor",
        update=DDIM(alpha=0.5, alpha_next=0.6, eta=0.5),
    ),
    _cfg("noise shape", ValueError, "noise: expected shape", noise=_X[:1]),
    _cfg(
        "variance",
        ValueError,
        "update.variance: expected one of 'small', 'large'",
        update=DDPM(alpha=0.5, alpha_next=0.6, variance="learned"),
        noise=_X,
    ),
    _cfg(
        "ddpm upwards",
        ValueError,
        "update.alpha_next: expected at least update.alpha",
        update=DDPM(alpha=0.5, alpha_next=0.4),
        noise=_X,
    ),
    _cfg(
        "sigma",
        ValueError,
        r"update.sigma: expected a number in \(0, inf\), got 0.0",
        update=Euler(sigma=0.0, sigma_next=0.0),
    ),
    _cfg(
        "sigma_next",
        ValueError,
        r"update.sigma_next: expected a number in \[0, inf\), got -1.0",
        update=Euler(sigma=1.0, sigma_next=-1.0),
    ),
    _cfg("prediction", ValueError, "prediction: expected one of 'epsilon'", prediction="noise"),
    _cfg("scale class", TypeError, "scale: expected a Python number, got 'high'", scale="high"),
    _cfg("scale infinite", ValueError, "scale: expected a finite number", scale=float("inf")),
    _cfg("scale shape", ValueError, "scale: expected a number or a tensor", scale=torch.ones(2, 1)),
    _cfg("rescale range", ValueError, r"rescale: expected a number in \[0, 1\]", rescale=1.5),
)

CFG_ERRORS = (
    *_SHARED,
    _cfg("backend", ValueError, "backend: expected one of", backend="fast"),
)
ORIGINAL_ERRORS = (
    *_SHARED,
    _cfg("no level", ValueError, "update.alpha: expected a number", update=Predict()),
)
COSINE_ERRORS = (
    *_SHARED,
    _cfg("no uncond", ValueError, "uncond: expected a tensor", uncond=None, scale=1.0),
    _cfg("space", ValueError, "space: expected one of 'prediction', 'original'", space="x0"),
    _cfg(
        "no level",
        ValueError,
        "update.alpha: expected a number",
        update=Predict(),
        space="original",
    ),
)


def _noise(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    arguments: dict[str, object] = {
        "sample": _X, "noise": _X, "alpha": 0.6, "sigma": 0.8, **changes
    }  # fmt: skip

    def call(op: Callable[..., object]) -> object:
        given = dict(arguments)
        return op(given.pop("sample"), given.pop("noise"), **given)

    return BadCase(name, call, error, match)


NOISE_ERRORS = (
    _noise("sample class", TypeError, "sample: expected a tensor, got None", sample=None),
    _noise("sample integer", TypeError, "sample: expected float32", sample=_X.long()),
    _noise("sample rank", ValueError, "sample: expected shape", sample=torch.zeros(())),
    _noise("noise class", TypeError, "noise: expected a tensor", noise=0.0),
    _noise("noise shape", ValueError, "noise: expected shape", noise=_X[:1]),
    _noise("noise dtype", TypeError, "noise: expected dtype", noise=_X.half()),
    _noise("alpha class", TypeError, "alpha: expected a Python number", alpha=None),
    _noise("alpha NaN", ValueError, "alpha: expected a finite number", alpha=float("nan")),
    _noise("sigma shape", ValueError, "sigma: expected a number or a tensor", sigma=torch.ones(3)),
    _noise(
        "sigma values",
        ValueError,
        "sigma: expected a number in",
        sigma=torch.tensor([0.5, float("inf")]),
    ),
)
