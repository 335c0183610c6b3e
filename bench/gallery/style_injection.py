"""Style injection on two photographs, as one picture: what gamma and the temperature T do.

``python -m transfuse.bench.gallery.style_injection --out style_injection.png``

No pretrained network is involved. The tokens are pixels of a shrunken photograph: queries and keys
are unit-norm 5 x 5 grey patches with their mean removed, values are RGB, the logit scale is 8. So
the picture shows the attention of the method at work, not what a diffusion model makes of it.

The image being generated is stood in for by the content's queries with noise: gamma then mixes the
clean content query back in, as the method does with the queries stored during inversion.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.methods.diffusion_control.style_injection import adain_latent, inject

from ..cases import Unavailable
from ..inputs import photo

CONTENT, STYLE = "china", "flower"
TEMPERATURES = (1.0, 1.5, 3.0)
GAMMAS = (0.0, 0.3, 0.75, 1.0)
LOGIT_SCALE = 8.0
NOISE = 0.2
PATCH = 5
NOTE = (
    "No pretrained network: attention between the pixels of two photographs. Queries and keys are "
    "unit-norm 5 x 5 grey patches without their mean,\nvalues are RGB, the logit scale is 8; the "
    "own query q is the content's query with noise, in place of an image under way."
)
QUIET, STRONG = "#bbbbbb", "#d62728"


class Tokens(NamedTuple):
    """A photograph as tokens: patches (1, 1, N, 25) for queries and keys, RGB (1, 1, N, 3)."""

    patches: Tensor
    rgb: Tensor


def shrink(name: str, size: tuple[int, int]) -> Tensor:
    """The centre of a photograph at the aspect ratio of ``size``, averaged down: (1, 3, *size)."""
    picture = photo(name).permute(2, 0, 1)[None]
    height, width = picture.shape[-2:]
    unit = min(height / size[0], width / size[1])
    cut = round(size[0] * unit), round(size[1] * unit)
    top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
    window = picture[..., top : top + cut[0], left : left + cut[1]]
    return F.adaptive_avg_pool2d(window, size)


def tokens(name: str, size: tuple[int, int], *, dtype: torch.dtype = torch.float32) -> Tokens:
    """Queries (or keys) and values of a photograph, one token per pixel of the shrunken picture."""
    picture = shrink(name, size).to(dtype)
    grey = F.pad(picture.mean(1, keepdim=True), (PATCH // 2,) * 4, mode="reflect")
    patches = F.unfold(grey, PATCH).mT
    patches = F.normalize(patches - patches.mean(-1, keepdim=True), dim=-1)
    return Tokens(patches[:, None], picture.flatten(2).mT[:, None])


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from error

    content, style = tokens(CONTENT, size), tokens(STYLE, size)
    own = noisy(content.patches)
    recoloured = adain_latent(shrink(CONTENT, size), shrink(STYLE, size))

    columns = len(GAMMAS)
    figure = Figure(figsize=(11.4, 9.3), facecolor="white")
    figure.suptitle(
        r"Style injection:  softmax$(T\,\tilde{q}\,k_{style}^{\top})\,v_{style}$   with   "
        r"$\tilde{q} = \gamma\,q_{content} + (1-\gamma)\,q$",
        fontsize=15,
        y=0.985,
    )
    figure.text(0.5, 0.917, NOTE, ha="center", fontsize=9, color="#555555", linespacing=1.4)
    axes = figure.subplots(1 + len(TEMPERATURES), columns)
    figure.subplots_adjust(
        left=0.045, right=0.99, top=0.885, bottom=0.035, wspace=0.05, hspace=0.13
    )

    def show(axis, image: Tensor, title: str, *, frame: str = QUIET) -> None:
        pixels = image.reshape(*size, 3) if image.shape[-1] == 3 else image[0].permute(1, 2, 0)
        axis.imshow(pixels.clamp(0, 1).float().numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=9.5, pad=4)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_color(frame)
            spine.set_linewidth(0.8 if frame == QUIET else 2.4)

    show(axes[0, 0], content.rgb, f"content ({CONTENT}.jpg, {size[0]} x {size[1]} tokens)")
    show(axes[0, 1], style.rgb, f"style ({STYLE}.jpg, {size[0]} x {size[1]} tokens)")
    show(axes[0, 2], recoloured, "AdaIN alone (pixel colours)")

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
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.bench.gallery.style_injection",
        description="Draw style injection on two photographs over gamma and T.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG to write")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(64, 96),
        metavar=("ROWS", "COLUMNS"),
        help="tokens per photograph",
    )
    parser.add_argument("--backend", help="backend of transfuse.ops.attend")
    args = parser.parse_args(argv)
    if min(args.size) <= PATCH:
        parser.error(f"--size: expected more than {PATCH} rows and columns")
    try:
        figure = draw(tuple(args.size), backend=args.backend)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    figure.savefig(args.out, format="png", dpi=88, pil_kwargs={"optimize": True})
    print(f"{args.out}: {args.out.stat().st_size // 1024} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
