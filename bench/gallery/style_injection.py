"""Style injection on two photographs, as one picture: what gamma and the temperature T do.

``python -m transfuse.bench.gallery.style_injection --out style_injection.png``

No pretrained network is involved. The tokens are pixels of a shrunken photograph: queries and keys
are unit-norm 5 x 5 grey patches with their mean removed, values are RGB, the logit scale is 8. So
the picture shows the attention of the method at work, not what a diffusion model makes of it.

The image being generated is stood in for by the content's queries with noise: gamma then mixes the
clean content query back in, as the method does with the queries stored during inversion.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.methods.diffusion_control.style_injection import adain_latent, inject

from ..cases import Unavailable  # noqa: F401  (what it raises without its packages)
from ._pictures import (
    CONTENT,
    LOGIT_SCALE,
    QUIET,
    STRONG,
    STYLE,
    Tokens,
    new_figure,
    run,
    show,
    shrink,
    tokens,
)

TEMPERATURES = (1.0, 1.5, 3.0)
GAMMAS = (0.0, 0.3, 0.75, 1.0)
NOISE = 0.2
NOTE = (
    "No pretrained network: attention between the pixels of two photographs. Queries and keys are "
    "unit-norm 5 x 5 grey patches without their mean,\nvalues are RGB, the logit scale is 8; the "
    "own query q is the content's query with noise, in place of an image under way."
)


def noisy(patches: Tensor, *, seed: int = 0) -> Tensor:
    """The patches with Gaussian noise, unit-norm again: the query of a generation under way."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(patches.shape, generator=generator).to(patches)
    return F.normalize(patches + NOISE * noise, dim=-1)


def injected(
    content: Tokens,
    style: Tokens,
    *,
    gamma: float,
    temperature: float,
    own: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """RGB of the content's tokens, painted from the style's: (1, 1, N, 3)."""
    return inject(
        content.patches if own is None else own,
        query_content=content.patches,
        key_style=style.patches,
        value_style=style.rgb,
        gamma=gamma,
        temperature=temperature,
        scale=LOGIT_SCALE,
        backend=backend,
    )


def distance(out: Tensor, reference: Tensor) -> float:
    """Relative L2 distance of two results."""
    return ((out - reference).norm() / reference.norm()).item()


def draw(size: tuple[int, int], *, backend: str | None = None):
    """The picture as a matplotlib figure."""
    content, style = tokens(CONTENT, size), tokens(STYLE, size)
    own = noisy(content.patches)
    recoloured = adain_latent(shrink(CONTENT, size), shrink(STYLE, size))

    columns = len(GAMMAS)
    figure = new_figure(
        r"Style injection:  softmax$(T\,\tilde{q}\,k_{style}^{\top})\,v_{style}$   with   "
        r"$\tilde{q} = \gamma\,q_{content} + (1-\gamma)\,q$",
        NOTE,
        height=9.3,
        note_at=0.917,
    )
    axes = figure.subplots(1 + len(TEMPERATURES), columns)
    figure.subplots_adjust(
        left=0.045, right=0.99, top=0.885, bottom=0.035, wspace=0.05, hspace=0.13
    )

    show(axes[0, 0], content.rgb, size, f"content ({CONTENT}.jpg, {size[0]} x {size[1]} tokens)")
    show(axes[0, 1], style.rgb, size, f"style ({STYLE}.jpg, {size[0]} x {size[1]} tokens)")
    show(axes[0, 2], recoloured, size, "AdaIN alone (pixel colours)")

    chart = axes[0, 3]
    for row, (temperature, shade) in enumerate(
        zip(TEMPERATURES, ("#9ecae1", STRONG, "#08519c"), strict=True), start=1
    ):
        clean = injected(content, style, gamma=1.0, temperature=temperature, backend=backend)
        distances = []
        for column, gamma in enumerate(GAMMAS):
            out = injected(
                content, style, own=own, gamma=gamma, temperature=temperature, backend=backend
            )
            distances.append(distance(out, clean))
            show(
                axes[row, column],
                out,
                size,
                rf"$\gamma$ = {gamma:g}    contrast {out.std().item():.3f}    "
                f"off {distances[-1]:.3f}",
                frame=STRONG if (gamma, temperature) == (0.75, 1.5) else QUIET,
            )
        axes[row, 0].set_ylabel(f"T = {temperature:g}", fontsize=12)
        chart.plot(GAMMAS, distances, "o-", color=shade, ms=4, lw=1.6, label=f"T = {temperature:g}")
    chart.set_title(r"off: distance to the output at $\gamma$ = 1", fontsize=9.5, pad=4)
    chart.set_xticks(GAMMAS)
    chart.tick_params(labelsize=8, length=2)
    chart.set_xlabel(r"$\gamma$", fontsize=10, labelpad=-8)
    chart.set_ylim(bottom=0)
    place = chart.get_position()  # room for the tick labels inside the picture's own column
    chart.set_position([place.x0 + 0.028, place.y0 + 0.028, place.width - 0.03, 0.135])
    chart.spines[["top", "right"]].set_visible(False)
    chart.legend(frameon=False, fontsize=8.5)
    figure.text(
        0.5,
        0.012,
        "contrast: standard deviation of the RGB output; a larger T averages less over the style "
        "and keeps more of it.   Red: the defaults.",
        ha="center",
        fontsize=9,
        color="#555555",
    )
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.style_injection",
        description="Draw style injection on two photographs over gamma and T.",
    )


if __name__ == "__main__":
    sys.exit(main())
