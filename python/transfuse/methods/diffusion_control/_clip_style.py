"""Style images for a clip, and the clip in their style, as the StyleFool attacks make them.

Colour proximity: the dominant colour of a clip and of each pool image by median cut, as points of
the HSV cone (r V S cos H, r V S sin H, h (1 - V)), r = 50, h = 50 sqrt(3). Stylisation: per frame,
content + Gram + temporal + total-variation losses on given features, by L-BFGS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

CONE_RADIUS = 50.0
CONE_HEIGHT = 50.0 * math.sqrt(3.0)
WEIGHTS = {"content": 50.0, "style": 10.0, "temporal": 1e3, "variation": 1e-3}

# (B, 3, H, W) -> feature maps by name
Features = Callable[[Tensor], Mapping[str, Tensor]]


def dominant_color(image: Tensor, *, colors: int = 8) -> Tensor:
    """Mean RGB (3,) of the fullest box of a median cut into ``colors`` boxes.

    Args:
        image: (..., 3, H, W) in [0, 1].
        colors: number of boxes; each cut halves the box with the widest channel.
    """
    pixels = image.movedim(-3, -1).reshape(-1, 3).double()
    if pixels.shape[0] == 0:
        raise ValueError(f"image: expected pixels, got shape {tuple(image.shape)}")
    boxes = [pixels]
    while len(boxes) < colors:
        spreads = [(box.amax(0) - box.amin(0)).max().item() for box in boxes]
        widest = max(range(len(boxes)), key=lambda b: (spreads[b], -b))
        box = boxes[widest]
        if spreads[widest] == 0.0:
            break
        channel = int((box.amax(0) - box.amin(0)).argmax())
        # At the median value, so that equal colours stay together.
        middle = box[:, channel].median()
        low = box[:, channel] <= middle
        if bool(low.all()):
            low = box[:, channel] < middle
        boxes[widest : widest + 1] = [box[low], box[~low]]
    fullest = max(range(len(boxes)), key=lambda b: (boxes[b].shape[0], -b))
    return boxes[fullest].mean(0)


def cone_point(rgb: Tensor) -> Tensor:
    """A colour (3,) in [0, 1] as a point of the HSV cone (3,)."""
    red, green, blue = (float(c) for c in rgb)
    value = max(red, green, blue)
    chroma = value - min(red, green, blue)
    if chroma == 0.0:
        hue = 0.0
    elif value == red:
        hue = ((green - blue) / chroma) % 6.0
    elif value == green:
        hue = (blue - red) / chroma + 2.0
    else:
        hue = (red - green) / chroma + 4.0
    angle = hue * math.pi / 3.0
    # V S is the chroma.
    return torch.tensor(
        [
            CONE_RADIUS * chroma * math.cos(angle),
            CONE_RADIUS * chroma * math.sin(angle),
            CONE_HEIGHT * (1.0 - value),
        ],
        dtype=torch.float64,
    )


def rank_styles(
    clip: Tensor, pool: Sequence[Tensor], *, confidences: Sequence[float] | None = None
) -> list[int]:
    """Numbers of pool images (or clips) by colour proximity to a clip, nearest first.

    Args:
        clip: (T, 3, H, W) in [0, 1].
        pool: images (..., 3, H, W).
        confidences: of a targeted attack: the model's confidence in the target class for each pool
            entry; the distance is divided by it.

    Returns:
        A permutation; ties to the lower number.
    """
    own = cone_point(dominant_color(clip))
    gaps = [float((cone_point(dominant_color(image)) - own).norm()) for image in pool]
    if confidences is not None:
        if len(confidences) != len(pool):
            raise ValueError(f"confidences: expected {len(pool)} numbers, got {len(confidences)}")
        gaps = [g / max(c, 1e-12) for g, c in zip(gaps, confidences, strict=True)]
    return sorted(range(len(pool)), key=lambda i: gaps[i])


def gram(feature: Tensor) -> Tensor:
    """Gram matrices (B, C, C) of feature maps (B, C, H, W), over C H W."""
    flat = feature.flatten(2)
    return flat @ flat.mT / (flat.shape[1] * flat.shape[2])


def _variation(x: Tensor) -> Tensor:
    return (x[..., 1:, :] - x[..., :-1, :]).square().sum() + (
        x[..., :, 1:] - x[..., :, :-1]
    ).square().sum()


def stylize_clip(
    clip: Tensor,
    style: Tensor,
    features: Features,
    *,
    content_layers: Sequence[str],
    style_layers: Sequence[str],
    weights: Mapping[str, float] | None = None,
    iterations: tuple[int, int] = (2000, 1000),
    warp: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """A clip in the style of an image, frame by frame.

    Args:
        clip: (T, 3, H, W) in [0, 1].
        style: (3, H', W') in [0, 1].
        features: network features by name, of (1, 3, H, W); the published choice is VGG-19.
        content_layers: names compared directly (relu4_2).
        style_layers: names compared by Gram matrix (relu1_1 ... relu5_1).
        weights: of ``"content"``, ``"style"``, ``"temporal"``, ``"variation"``; None: 50, 10, 1000,
            1e-3.
        iterations: L-BFGS iterations of the first frame and of the others.
        warp: ``warp(previous_result, t) -> (warped, confidence)``: the result of frame t - 1 moved
            along the flow to frame t, and a mask of where that is trusted. None: no motion. A clip
            of one frame has no temporal loss.

    Returns:
        (T, 3, H, W) in [0, 1]. Deterministic.
    """
    chosen = dict(WEIGHTS) if weights is None else dict(weights)
    if set(chosen) != set(WEIGHTS):
        raise ValueError(f"weights: expected {sorted(WEIGHTS)}, got {sorted(chosen)}")
    with torch.no_grad():
        wanted = {
            name: gram(f) for name, f in features(style[None]).items() if name in style_layers
        }
    frames: list[Tensor] = []
    for t in range(clip.shape[0]):
        frame = clip[t : t + 1]
        with torch.no_grad():
            content = {n: f for n, f in features(frame).items() if n in content_layers}
        previous = None
        if t > 0:
            previous = (frames[-1], torch.ones_like(frame)) if warp is None else warp(frames[-1], t)
        frames.append(
            _stylize_frame(
                frame, features, content, wanted, previous, chosen, iterations[0 if t == 0 else 1]
            )
        )
    return torch.cat(frames)


def _stylize_frame(
    frame: Tensor,
    features: Features,
    content: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    previous: tuple[Tensor, Tensor] | None,
    weights: Mapping[str, float],
    iterations: int,
) -> Tensor:
    x = (frame if previous is None else previous[0]).detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = features(x)
        loss = weights["variation"] * _variation(x)
        for name, want in content.items():
            loss = loss + weights["content"] * (found[name] - want).square().mean()
        for name, want in wanted.items():
            loss = loss + weights["style"] * (gram(found[name]) - want).square().sum()
        if previous is not None:
            warped, trust = previous
            loss = loss + weights["temporal"] * (trust * (x - warped).square()).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return x.detach().clamp(0.0, 1.0)
