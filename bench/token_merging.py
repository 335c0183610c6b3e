"""Benchmarks of token merging: matching, merging, unmerging, and what they are for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from transfuse.ops import KV, MergePlan, attend, match_tokens, merge_tokens, unmerge_tokens
from transfuse.ops._merge_plan import segments_of

from .cases import GRAD, Case, Setup, Target, Tensors, Workload
from .inputs import normal

MATMUL_FLOOR = "the products of all sources with all destinations at the measured peak"
COPY_FLOOR = "tokens read once and the result written once, at the measured copy bandwidth"
PROBE = 16  # channels of the tokens by which plans are compared

# Stable Diffusion 1.5 at 512 x 512: its largest self-attention, two images for guidance.
BATCH, SIDE, CHANNELS, HEADS = 2, 64, 320, 8
TOKENS, MERGED = SIDE * SIDE, SIDE * SIDE // 2
# ViT-B/16 at 224 x 224, as in the ToMe paper.
VIT_BATCH, VIT_TOKENS, VIT_CHANNELS, VIT_METRIC, VIT_MERGED = 8, 197, 768, 64, 16


def _destinations() -> torch.Tensor:
    rows = torch.arange(0, SIDE, 2)
    return (rows[:, None] * SIDE + rows).flatten()


def _tomesd(metric: torch.Tensor):
    import tomesd.merge

    return tomesd.merge.bipartite_soft_matching_random2d(
        metric, SIDE, SIDE, 2, 2, MERGED, no_rand=True
    )


# ---- matching ----------------------------------------------------------------------------------


def _eager_rows(metric, source, destination, merged):
    """The row of every token: what a plan is, in a few lines of eager torch."""
    unit = F.normalize(metric, dim=-1)
    scores = unit[:, source] @ unit[:, destination].mT
    best, index = scores.max(-1)
    chosen = best.topk(merged, dim=-1).indices
    batch, kept = metric.shape[0], source.numel() - merged
    stays = torch.ones_like(index, dtype=torch.bool).scatter_(1, chosen, False)
    target = kept + index
    of_source = torch.where(stays, stays.cumsum(1) - 1, target)
    rows = torch.empty((batch, metric.shape[1]), dtype=torch.int64, device=metric.device)
    rows[:, source] = of_source
    rows[:, destination] = kept + torch.arange(destination.numel(), device=metric.device)
    return rows


def _eager_merge(x, rows, count):
    places = rows[..., None].expand(-1, -1, x.shape[2])
    total = x.new_zeros((x.shape[0], count, x.shape[2])).scatter_add_(1, places, x)
    sizes = x.new_zeros((x.shape[0], count)).scatter_add_(1, rows, torch.ones_like(x[..., 0]))
    return total / sizes[..., None]


def _eager_unmerge(y, rows):
    return y.gather(1, rows[..., None].expand(-1, -1, y.shape[2]))


def _match_case(setup: Setup) -> Workload:
    generator = setup.generator()
    metric = normal(
        BATCH, TOKENS, CHANNELS, generator=generator, dtype=setup.dtype, device=setup.device
    )
    tensors = {
        "metric": metric,
        "probe": metric[..., :PROBE].float().contiguous(),
        "destination": _destinations().to(setup.device),
    }
    is_source = torch.ones(TOKENS, dtype=torch.bool)
    is_source[_destinations()] = False
    tensors["source"] = is_source.nonzero()[:, 0].to(setup.device)

    def loss(probe, restored):
        # Rounded as the metric is: its precision decides between plans that are almost as good.
        lost = (restored - probe).square().mean((1, 2))
        return lost.to(setup.dtype) if probe.dtype == torch.float32 else lost

    def ours(t: Tensors) -> torch.Tensor:
        plan = match_tokens(t["metric"], MERGED, size=(SIDE, SIDE), backend=setup.backend)
        y = merge_tokens(t["probe"], plan, backend=setup.backend)
        return loss(t["probe"], unmerge_tokens(y, plan, backend=setup.backend))

    def eager(t: Tensors) -> torch.Tensor:
        rows = _eager_rows(t["metric"], t["source"], t["destination"], MERGED)
        return loss(t["probe"], _eager_unmerge(_eager_merge(t["probe"], rows, MERGED), rows))

    def tomesd(t: Tensors) -> torch.Tensor:
        merge, unmerge = _tomesd(t["metric"])
        return loss(t["probe"], unmerge(merge(t["probe"])))

    cells = TOKENS // 4
    return Workload(
        tensors=tensors,
        ours=ours,
        reference=eager,
        expressions={"eager": eager, "tomesd": tomesd},
        yardstick=None,
        flops=2 * BATCH * (TOKENS - cells) * cells * CHANNELS,
        bytes=metric.numel() * metric.element_size(),
        floor_note=MATMUL_FLOOR,
        inputs=f"normal; compared by the mean square of what merging {PROBE} channels loses, which "
        "every candidate merges and unmerges for that",
        shape={"metric": [BATCH, TOKENS, CHANNELS], "merged": MERGED, "size": [SIDE, SIDE]},
    )


# ---- merging and unmerging ---------------------------------------------------------------------


def _plan_like_tomesd(metric: torch.Tensor) -> tuple[MergePlan, Callable, Callable]:
    """tomesd's own plan, rows in its order, for us to use: both then give the same rows."""
    merge, unmerge = _tomesd(metric)
    numbers = torch.arange(MERGED, device=metric.device, dtype=torch.float64)
    rows = unmerge(numbers[None, :, None].expand(BATCH, -1, -1).contiguous())[..., 0].long()
    plan = MergePlan(rows, *segments_of(rows, torch.zeros_like(rows, dtype=torch.bool), MERGED))
    return plan, merge, unmerge


def _pair_case(unmerging: bool) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        from .peers import require

        require("tomesd")
        generator = setup.generator()

        def draw(tokens: int) -> torch.Tensor:
            shape = (BATCH, tokens, CHANNELS)
            return normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)

        plan, merge, unmerge = _plan_like_tomesd(draw(TOKENS))
        given = MERGED if unmerging else TOKENS
        tensors = {"x": draw(given), GRAD: draw(TOKENS + MERGED - given), "rows": plan.rows}
        if unmerging:
            ours = lambda t: unmerge_tokens(t["x"], plan, backend=setup.backend)  # noqa: E731
            eager = lambda t: _eager_unmerge(t["x"], t["rows"])  # noqa: E731
            theirs = unmerge
        else:
            ours = lambda t: merge_tokens(t["x"], plan, backend=setup.backend)  # noqa: E731
            eager = lambda t: _eager_merge(t["x"], t["rows"], MERGED)  # noqa: E731
            theirs = merge
        moved = (TOKENS + MERGED) * BATCH * CHANNELS
        return Workload(
            tensors=tensors,
            ours=ours,
            reference=eager,
            expressions={"eager": eager, "tomesd": lambda t: theirs(t["x"])},
            yardstick=None,
            differentiable=("x",),
            flops=BATCH * TOKENS * CHANNELS,
            bytes=moved * tensors["x"].element_size() * (1 if setup.mode == "forward" else 2),
            floor_note=COPY_FLOOR,
            inputs="normal; the plan is tomesd's own, with its rows in its order",
            shape={"x": [BATCH, given, CHANNELS], "merged": MERGED},
        )

    return make


# ---- what it is for ----------------------------------------------------------------------------


def _block_case(setup: Setup) -> Workload:
    """Self-attention of merged tokens against self-attention of all.

    Tokens of a 2 x 2 cell are equal, so that merging loses nothing and, with the logarithm of the
    sizes as bias, all candidates compute the same numbers. The time does not depend on that.
    """
    setup.need("attend")
    generator = setup.generator()
    cells = normal(
        BATCH, TOKENS // 4, CHANNELS, generator=generator, dtype=setup.dtype, device=setup.device
    )
    half = SIDE // 2
    image = cells.view(BATCH, half, 1, half, 1, CHANNELS).expand(-1, -1, 2, -1, 2, -1)
    is_source = torch.ones(TOKENS, dtype=torch.bool)
    is_source[_destinations()] = False
    tensors = {
        "x": image.reshape(BATCH, TOKENS, CHANNELS),
        "destination": _destinations().to(setup.device),
        "source": is_source.nonzero()[:, 0].to(setup.device),
    }

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    def ours(t: Tensors) -> torch.Tensor:
        backend = setup.backend
        plan = match_tokens(t["x"], MERGED, size=(SIDE, SIDE), backend=backend)
        y = heads(merge_tokens(t["x"], plan, backend=backend))
        bias = plan.sizes.to(torch.float32).log()[:, None, None, :]
        return unmerge_tokens(flat(attend(y, KV(y, y, bias=bias), backend=backend)), plan)

    def eager(t: Tensors) -> torch.Tensor:
        x = t["x"]
        rows = _eager_rows(x, t["source"], t["destination"], MERGED)
        y = heads(_eager_merge(x, rows, MERGED))
        ones = torch.ones_like(x[..., 0])
        sizes = x.new_zeros((BATCH, MERGED)).scatter_add_(1, rows, ones)
        out = F.scaled_dot_product_attention(y, y, y, attn_mask=sizes.log()[:, None, None, :])
        return _eager_unmerge(flat(out), rows)

    def plain(t: Tensors) -> torch.Tensor:
        x = heads(t["x"])
        return flat(F.scaled_dot_product_attention(x, x, x))

    quarter = TOKENS // 4
    return Workload(
        tensors=tensors,
        ours=ours,
        reference=plain,
        expressions={"sdpa": plain, "eager": eager},
        yardstick=None,
        flops=2 * BATCH * CHANNELS * ((TOKENS - quarter) * quarter + 2 * MERGED * MERGED),
        bytes=4 * tensors["x"].numel() * tensors["x"].element_size(),
        floor_note=MATMUL_FLOOR + ", and the attention of the merged tokens",
        inputs="normal, equal within cells of 2 x 2: merging with log-size bias is then exact",
        shape={"x": [BATCH, TOKENS, CHANNELS], "heads": HEADS, "merged": MERGED},
    )


def _tome(metric: torch.Tensor, x: torch.Tensor, size: torch.Tensor):
    """Matching and merging as ToMe's published code for ViTs goes about it: alternate split,
    masked scores, argsort, gathers, scatters, a second pass for the sizes."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = metric[..., ::2, :], metric[..., 1::2, :]
    scores = a @ b.transpose(-1, -2)
    scores[..., 0, :] = -torch.inf
    node_max, node_idx = scores.max(dim=-1)
    edge = node_max.argsort(dim=-1, descending=True)[..., None]
    unmerged, source = edge[..., VIT_MERGED:, :], edge[..., :VIT_MERGED, :]
    target = node_idx[..., None].gather(dim=-2, index=source)
    unmerged = unmerged.sort(dim=1)[0]

    def total(values: torch.Tensor) -> torch.Tensor:
        src, dst = values[..., ::2, :], values[..., 1::2, :]
        batch, count, width = src.shape
        stays = src.gather(dim=-2, index=unmerged.expand(batch, count - VIT_MERGED, width))
        moves = src.gather(dim=-2, index=source.expand(batch, VIT_MERGED, width))
        dst = dst.scatter_reduce(-2, target.expand(batch, VIT_MERGED, width), moves, reduce="sum")
        return torch.cat([stays, dst], dim=1)

    merged, sizes = total(x * size), total(size)
    return merged / sizes, sizes


def _vit_case(setup: Setup) -> Workload:
    generator = setup.generator()

    def draw(*shape: int) -> torch.Tensor:
        return normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)

    tensors = {
        "metric": draw(VIT_BATCH, VIT_TOKENS, VIT_METRIC),
        "x": draw(VIT_BATCH, VIT_TOKENS, VIT_CHANNELS),
        "size": torch.ones((VIT_BATCH, VIT_TOKENS, 1), dtype=setup.dtype, device=setup.device),
    }

    def ours(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        backend = setup.backend
        plan = match_tokens(t["metric"], VIT_MERGED, protect=(0,), backend=backend)
        y = merge_tokens(t["x"], plan, weight=t["size"][..., 0], backend=backend)
        return y, merge_tokens(t["size"], plan, mode="sum", backend=backend)

    def published(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return _tome(t["metric"], t["x"], t["size"])

    half = VIT_TOKENS // 2
    item = tensors["x"].element_size()
    return Workload(
        tensors=tensors,
        ours=ours,
        reference=published,
        expressions={"separate": published},
        yardstick=None,
        flops=2 * VIT_BATCH * half * (VIT_TOKENS - half) * VIT_METRIC,
        bytes=item * VIT_BATCH * VIT_TOKENS * (2 * VIT_CHANNELS + VIT_METRIC),
        floor_note=COPY_FLOOR,
        inputs="normal",
        shape={
            "x": [VIT_BATCH, VIT_TOKENS, VIT_CHANNELS],
            "metric": [VIT_BATCH, VIT_TOKENS, VIT_METRIC],
            "merged": VIT_MERGED,
        },
    )


_PEERS = ("tomesd", "eager", "eager-compile")


def _tiny_case(setup: Setup) -> Workload:
    generator = setup.generator()

    def draw(tokens: int) -> torch.Tensor:
        return normal(1, tokens, 5, generator=generator, dtype=setup.dtype, device=setup.device)

    plan = match_tokens(draw(12), 4, backend=setup.backend)
    tensors = {"x": draw(12), GRAD: draw(8), "rows": plan.rows}
    eager = lambda t: _eager_merge(t["x"], t["rows"], 8)  # noqa: E731
    return Workload(
        tensors=tensors,
        ours=lambda t: merge_tokens(t["x"], plan, backend=setup.backend),
        reference=eager,
        expressions={"eager": eager},
        yardstick=None,
        differentiable=("x",),
        flops=60,
        bytes=100 * tensors["x"].element_size(),
        floor_note=COPY_FLOOR,
        inputs="normal",
        shape={"x": [1, 12, 5], "merged": 4},
    )


CASES = (
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_tiny_case,
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        modes=("forward", "backward", "full"),
        hidden=True,
    ),
    Case(
        name="merge",
        title="merging half of 4096 tokens of 320 channels",
        make=_pair_case(unmerging=False),
        targets=(
            Target(dtype="float32", bars={"tomesd": 10.0}, quick=3),
            Target(dtype="bfloat16", bars={"tomesd": 10.0}),
            Target(dtype="float32", mode="full"),
        ),
        peers=_PEERS,
        quick_peers=("tomesd", "eager"),
        modes=("forward", "backward", "full"),
    ),
    Case(
        name="unmerge",
        title="giving 2048 merged tokens of 320 channels back to 4096",
        make=_pair_case(unmerging=True),
        targets=(
            Target(dtype="float32", bars={"tomesd": 8.0}, quick=4),
            Target(dtype="bfloat16", bars={"tomesd": 8.0}),
            Target(dtype="float32", mode="full"),
        ),
        peers=_PEERS,
        quick_peers=("tomesd", "eager"),
        modes=("forward", "backward", "full"),
    ),
    Case(
        name="match",
        title="planning which 2048 of 4096 tokens of 320 channels to merge",
        make=_match_case,
        targets=(
            Target(dtype="float32", bars={"tomesd": 1.4}),
            Target(dtype="bfloat16", bars={"tomesd": 2.5}),
        ),
        peers=_PEERS,
        memory=True,
    ),
    Case(
        name="merged-block",
        title="self-attention of half the tokens (match, merge, attend, unmerge) and of all",
        make=_block_case,
        targets=(Target(dtype="float32", bars={"sdpa": 2.2}),),
        peers=("sdpa", "eager", "eager-compile"),
    ),
    Case(
        name="vit",
        title="ToMe in a ViT-B: match on the mean key, merge with sizes",
        make=_vit_case,
        targets=(Target(dtype="float32", bars={"separate": 2.0}, quick=5),),
        peers=("separate", "separate-compile"),
        quick_peers=("separate",),
    ),
)
