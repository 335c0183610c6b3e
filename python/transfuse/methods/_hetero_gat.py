"""Attention over the edges of heterogeneous graphs, in plain torch around ``attend``.

Nodes have types; edges have relations (source type, name, destination type). Graphs that share
their edges are batched by a leading dimension; others as PyG does it, as one graph of many parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks
from transfuse.ops import KV, attend

# (type of the source nodes, name, type of the destination nodes)
Relation = tuple[str, str, str]

_MAX_WIDTH = 256  # of one head's values in attend
# Logits of the dense form beyond which edges are handled one by one, where they are fewer.
_DENSE_ENTRIES = 1 << 14


class Edges(NamedTuple):
    """Edges of one relation, with what has to be read from them once."""

    pairs: Tensor  # (2, E) int64: sources, destinations
    sources: int  # number of source nodes needed: the highest plus one
    ends: int
    repeated: bool  # some edge is there more than once


def read_edges(name: str, pairs: Tensor | Sequence[Sequence[int]]) -> Edges:
    """Edges from (2, E) integers or from a sequence of E pairs (source, destination).

    Raises:
        ValueError, TypeError: Neither form, or negative entries.
    """
    if isinstance(pairs, Tensor):
        if pairs.ndim != 2 or pairs.shape[0] != 2:
            raise ValueError(f"{name}: expected (2, E), got {tuple(pairs.shape)}")
        if pairs.is_floating_point() or pairs.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, got {_checks.describe(pairs)}")
        index = pairs.to(torch.int64)
    else:
        entries = [tuple(pair) for pair in pairs]
        if any(len(pair) != 2 for pair in entries):
            raise ValueError(f"{name}: expected pairs (source, destination), got {entries}")
        index = torch.tensor(entries, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    if index.numel() == 0:
        return Edges(index, 0, 0, False)
    if int(index.min()) < 0:
        raise ValueError(f"{name}: expected entries from 0, got {int(index.min())}")
    sources, ends = (index.amax(1) + 1).tolist()
    repeated = int((index[0] * ends + index[1]).unique().numel()) < index.shape[1]
    return Edges(index, sources, ends, repeated)


def _key(relation: Relation) -> str:
    """The name of a relation's parameters, as PyG writes it: one name may join several types."""
    return "__".join(relation).replace(".", "_")


class _RelationWeights(nn.Module):
    """W (heads F, in), a_l and a_r (heads, F), bias (heads F) of one relation in one layer."""

    def __init__(self, width: int, out: int, heads: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads * out, width))
        self.attn_l = nn.Parameter(torch.empty(heads, out))
        self.attn_r = nn.Parameter(torch.empty(heads, out))
        self.bias = nn.Parameter(torch.zeros(heads * out))
        gain = nn.init.calculate_gain("relu")
        for parameter in (self.weight, self.attn_l, self.attn_r):
            nn.init.xavier_normal_(parameter, gain=gain, generator=generator)


class HeteroGATLayer(nn.Module):
    r"""One layer: for each relation t, a softmax over the edges of t that end in a node; summed.

    .. math:: f_u = W_t x_u, \quad
              e_{uv} = \mathrm{LeakyReLU}(\langle a_l, f_u \rangle
              + \langle a_r, f_v \rangle), \quad
              y_v = \sum_t \Bigl( \sum_u \mathrm{softmax}_u(e_{uv}) f_u + b_t \Bigr)

    per head. A node no edge of t ends in has b_t alone from t; a relation without edges, or without
    nodes of its types, is left out; types in which no relation ends are absent from the result.

    Args:
        width: Of all node features.
        out: F, per head.
        relations: The relations.
        heads: Number of heads.
        merge: ``"concat"``: (heads F); ``"mean"``: F.
        negative_slope: Of the LeakyReLU.
        generator: For the initial weights (Xavier normal; biases zero).
    """

    def __init__(
        self,
        width: int,
        out: int,
        relations: Sequence[Relation],
        *,
        heads: int = 1,
        merge: str = "concat",
        negative_slope: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("out", out), ("heads", heads)):
            _checks.positive_int(name, value)
        if merge not in ("concat", "mean"):
            raise ValueError(f"merge: expected concat or mean, got {merge!r}")
        keys = [_key(relation) for relation in relations]
        if not keys or len(set(keys)) != len(keys):
            raise ValueError(f"relations: expected distinct ones, at least one, got {keys}")
        self.relations = tuple(relations)
        self.width, self.out, self.heads, self.merge = width, out, heads, merge
        self.negative_slope = _checks.number("negative_slope", negative_slope)
        self.weights = nn.ModuleDict(
            {key: _RelationWeights(width, out, heads, generator) for key in keys}
        )

    def forward(
        self, nodes: Mapping[str, Tensor], edges: Mapping[Relation, Edges]
    ) -> dict[str, Tensor]:
        """Node type -> (B, N, width) to node type -> (B, N, heads F or F).

        Args:
            nodes: Features of every node type.
            edges: Relation -> :func:`read_edges` of its edges.

        Raises:
            ValueError: Edges of nodes that are not there.
        """
        arriving: dict[str, list[Relation]] = {}
        for relation in self.relations:
            source, _, end = relation
            has_edges = relation in edges and edges[relation].pairs.shape[1] > 0
            if has_edges and source in nodes and end in nodes:
                arriving.setdefault(end, []).append(relation)
        return {end: self._arrive(nodes, edges, own) for end, own in arriving.items()}

    def _arrive(
        self,
        nodes: Mapping[str, Tensor],
        edges: Mapping[Relation, Edges],
        relations: Sequence[Relation],
    ) -> Tensor:
        total: Tensor | None = None
        sources: list[KV] = []
        for relation in relations:
            source, name, end = relation
            weights: _RelationWeights = self.weights[_key(relation)]  # type: ignore[assignment]
            given = edges[relation]
            own, ends = nodes[source], nodes[end]
            _check_edges(name, given, own.shape[1], ends.shape[1])
            values = self._project(own, weights)  # (B, H, Nu, F)
            # Logits are float32 at least, whatever the features are.
            work = torch.float64 if values.dtype == torch.float64 else torch.float32
            ending = values if source == end else self._project(ends, weights)
            left = values.to(work) @ weights.attn_l[..., None].to(work)  # (B, H, Nu, 1)
            right = ending.to(work) @ weights.attn_r[..., None].to(work)
            entries = own.shape[1] * ends.shape[1]
            part = None
            if _dense_pays(entries, given.pairs.shape[1]):
                sources.append(self._dense(values, left, right, given, len(sources)))
            else:
                part = self._edge_by_edge(values, left, right, given.pairs)
            bias = weights.bias.view(self.heads, 1, self.out)
            total = bias if total is None else total + bias
            total = total if part is None else total + part
        first = nodes[relations[0][2]]
        if sources:
            total = total + self._attend(sources, first)  # type: ignore[operator]
        # The bias alone has the right shape only after broadcasting.
        result = total.expand(first.shape[0], -1, first.shape[1], -1)  # type: ignore[union-attr]
        if self.merge == "mean":
            return result.mean(1)
        return result.transpose(1, 2).flatten(2)

    def _project(self, x: Tensor, weights: _RelationWeights) -> Tensor:
        return F.linear(x, weights.weight).unflatten(-1, (self.heads, self.out)).transpose(1, 2)

    def _logits(self, left: Tensor, right: Tensor) -> Tensor:
        return F.leaky_relu(left + right, self.negative_slope)

    def _dense(self, values: Tensor, left: Tensor, right: Tensor, edges: Edges, group: int) -> KV:
        """One relation as keys and values: the logits are a bias, absent edges a mask."""
        logits = self._logits(left.transpose(-1, -2), right)  # (B, H, Nv, Nu)
        index = edges.pairs
        count = torch.zeros(logits.shape[-2:], dtype=logits.dtype, device=values.device)
        ones = torch.ones(index.shape[1], dtype=logits.dtype, device=values.device)
        count.index_put_((index[1], index[0]), ones, accumulate=True)
        if edges.repeated:  # an edge that is there k times counts k times
            logits = logits + count.clamp_min(1).log()
        parts, width = self._parts()
        padded = F.pad(values, (0, parts * width - self.out))
        folded = padded.unflatten(-1, (parts, width)).movedim(-2, 2).flatten(1, 2)
        key = folded.new_zeros(*folded.shape[:3], 1)
        bias = logits.repeat_interleave(parts, dim=1)
        return KV(key, folded, group=group, bias=bias, mask=count > 0)

    def _parts(self) -> tuple[int, int]:
        """Values of F are handled as heads of their own, of at most 256 each."""
        parts = -(-self.out // _MAX_WIDTH)
        return parts, -(-self.out // parts)

    def _attend(self, sources: list[KV], ends: Tensor) -> Tensor:
        parts, _ = self._parts()
        batch, count = ends.shape[:2]
        query = ends.new_zeros(batch, self.heads * parts, count, 1)
        query = query.to(sources[0].value.dtype)
        out = attend(query, sources).unflatten(1, (self.heads, parts))
        return out.movedim(2, -2).flatten(-2)[..., : self.out] if parts > 1 else out.squeeze(2)

    def _edge_by_edge(self, values: Tensor, left: Tensor, right: Tensor, index: Tensor) -> Tensor:
        """The same for large graphs: memory grows with edges, not with pairs of nodes."""
        source, end = index
        logits = self._logits(left[:, :, source, 0], right[:, :, end, 0])  # (B, H, E)
        shape = (*logits.shape[:2], right.shape[2])
        where = end.expand_as(logits)
        top = logits.new_full(shape, -math.inf)
        top = top.scatter_reduce(2, where, logits.detach(), "amax")
        weight = (logits - top.gather(2, where)).exp()
        mass = weight.new_zeros(shape).index_add(2, end, weight)
        weight = weight / mass.gather(2, where)
        moved = weight[..., None].to(values.dtype) * values[:, :, source]
        out = values.new_zeros(*shape, self.out)
        return out.index_add(2, end, moved)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.out}, heads={self.heads}, merge={self.merge!r}"


def _dense_pays(entries: int, edges: int) -> bool:
    """Whether all pairs of nodes are few enough to be treated at once."""
    return entries <= max(_DENSE_ENTRIES, 4 * edges)


def _check_edges(name: str, edges: Edges, sources: int, ends: int) -> None:
    for part, needed, bound in (
        ("sources", edges.sources, sources),
        ("destinations", edges.ends, ends),
    ):
        if needed > bound:
            raise ValueError(
                f"edges {name!r}: expected {part} below {bound} (nodes of that type), "
                f"got {needed - 1}"
            )


class HeteroGAT(nn.Module):
    """Two :class:`HeteroGATLayer` with a ReLU between: heads joined after the first, averaged
    after the second.

    Args:
        in_dim: Width of the features of all node types.
        hidden: Width per head of the first layer.
        out_dim: Width of the result.
        edges: (source type, relation, destination type) -> edges, (2, E) or E pairs. They are the
            default of :meth:`forward`; the relations are fixed.
        heads: Of the two layers.
        generator: For the initial weights.

    Raises:
        ValueError, TypeError: Relations or edges that are malformed.

    Example:
        >>> edges = {("paper", "cites", "paper"): [(0, 1), (2, 1)]}
        >>> HeteroGAT(4, 8, 6, edges)({"paper": torch.randn(3, 4)})["paper"].shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        out_dim: int,
        edges: Mapping[Relation, Tensor | Sequence[Sequence[int]]],
        *,
        heads: tuple[int, int] = (2, 2),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        relations = []
        for relation in edges:
            if not isinstance(relation, tuple) or len(relation) != 3:
                raise TypeError(
                    f"edges: expected keys (source type, name, destination type), got {relation!r}"
                )
            relations.append(relation)
        # The index moves with the module, the numbers read from it stay.
        self._read: dict[Relation, Edges] = {}
        for relation, pairs in edges.items():
            self._read[relation] = read_edges(f"edges {relation[1]!r}", pairs)
            index = self._read[relation].pairs
            self.register_buffer(f"edges_{_key(relation)}", index, persistent=False)
        self.relations = tuple(relations)
        self.first = HeteroGATLayer(in_dim, hidden, relations, heads=heads[0], generator=generator)
        self.second = HeteroGATLayer(
            heads[0] * hidden,
            out_dim,
            relations,
            heads=heads[1],
            merge="mean",
            generator=generator,
        )

    def forward(
        self,
        nodes: Mapping[str, Tensor],
        edges: Mapping[Relation, Tensor | Sequence[Sequence[int]]] | None = None,
    ) -> dict[str, Tensor]:
        """Features after both layers.

        Args:
            nodes: Node type -> (N, in_dim), or (B, N, in_dim) for B graphs with these edges.
            edges: Edges of this graph; None: those given at construction.

        Returns:
            Node type -> (N, out_dim) or (B, N, out_dim), for types in which a relation ends.

        Raises:
            ValueError: Features of another width, unknown relations, edges out of range.
        """
        index = self._edges(edges)
        batched = {}
        for name, x in nodes.items():
            if x.ndim not in (2, 3) or x.shape[-1] != self.first.width:
                raise ValueError(
                    f"nodes[{name!r}]: expected (N, {self.first.width}) or "
                    f"(B, N, {self.first.width}), got {tuple(x.shape)}"
                )
            batched[name] = x[None] if x.ndim == 2 else x
        if len({x.ndim for x in nodes.values()}) > 1 or len({len(x) for x in batched.values()}) > 1:
            shapes = {name: tuple(x.shape) for name, x in nodes.items()}
            raise ValueError(f"nodes: expected one batch size, got {shapes}")
        hidden = {name: F.relu(x) for name, x in self.first(batched, index).items()}
        out = self.second(hidden, index)
        flat = all(x.ndim == 2 for x in nodes.values())
        return {name: x[0] for name, x in out.items()} if flat else out

    def _edges(self, edges: Mapping | None) -> dict[Relation, Edges]:
        if edges is None:
            return {
                relation: own._replace(pairs=getattr(self, f"edges_{_key(relation)}"))
                for relation, own in self._read.items()
            }
        unknown = [relation for relation in edges if relation not in self.relations]
        if unknown:
            raise ValueError(f"edges: unknown relations {unknown}; known: {list(self.relations)}")
        device = next(self.parameters()).device
        given = {r: read_edges(f"edges {r[1]!r}", pairs) for r, pairs in edges.items()}
        return {r: own._replace(pairs=own.pairs.to(device)) for r, own in given.items()}
