"""The small claim of relation rectification: a vector for each direction, from a directed graph.

Two swapped prompts whose end-of-text embeddings are almost the same, a frozen toy denoiser that
predicts the image tanh(e W) from that embedding e, and two different images.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transfuse.methods.diffusion_control.relation_rectification import (
    HeteroGAT,
    RelationRectifier,
    rectification_loss,
    rectify,
    relation_graph,
)

DIM, STEPS = 64, 100
ALPHAS = torch.full((1000,), 0.5)


class Problem:
    def __init__(self, seed):
        g = torch.Generator().manual_seed(seed)
        self.a, self.r, self.b, shared, self.o_a, self.o_b = torch.randn(6, DIM, generator=g)
        self.eot = shared + 0.05 * torch.randn(2, DIM, generator=g)
        w = torch.randn(DIM, 16, generator=g) / DIM**0.5
        self.images = torch.randn(2, 1, 16, generator=g).tanh()
        self.noise = torch.randn(2, 1, 16, generator=g)
        # The best L+ of one prediction for both images.
        self.floor = ((self.images[0] - self.images[1]) / 2).square().mean().item()

        def eps(x, t, prompts):
            a = ALPHAS[t][:, None]
            return (x - a.sqrt() * (prompts[:, 0] @ w).tanh()) / (1 - a).sqrt()

        self.eps = eps
        self.graphs = (
            relation_graph(self.a, self.r, self.b, self.o_a, self.eot[0]),
            relation_graph(self.b, self.r, self.a, self.o_b, self.eot[1]),
        )

    def train(self, deltas, parameters):
        """L+ before and after, and the cosine of the rectified embeddings."""
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        losses = []
        for step in range(STEPS + 1):
            prompts = [
                rectify(e[None, None], 0, delta)
                for e, delta in zip(self.eot, deltas(), strict=True)
            ]
            result = rectification_loss(
                self.eps, *self.images, *prompts, 500, self.noise, alphas_cumprod=ALPHAS
            )
            losses.append(result.positive.item())
            if step < STEPS:
                optimizer.zero_grad()
                result.loss.backward()
                optimizer.step()
        cosine = F.cosine_similarity(prompts[0][0, 0], prompts[1][0, 0], dim=0)
        return losses[0], losses[-1], cosine.item()


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_directed_graphs_pull_the_prompts_apart(seed):
    problem = Problem(seed)
    assert F.cosine_similarity(*problem.eot, dim=0) > 0.99
    generator = torch.Generator().manual_seed(seed)
    rectifier = RelationRectifier(DIM, hidden=32, generator=generator)
    before, after, cosine = problem.train(
        lambda: [rectifier(graph) for graph in problem.graphs], rectifier.parameters()
    )
    assert after <= 0.25 * before, (before, after, cosine)
    assert after < 0.5 * problem.floor, (before, after, cosine)
    assert cosine < 0.8, (before, after, cosine)


@pytest.mark.claim
def test_a_graph_blind_to_order_cannot():
    problem = Problem(0)
    # One kind of undirected edge between pooled objects, the relation and the end of text.
    edges = {("node", "link", "node"): [(i, j) for i in range(3) for j in range(3)]}
    network = HeteroGAT(DIM, 32, DIM, edges, generator=torch.Generator().manual_seed(0))
    pooled = (problem.a + problem.b) / 2
    end = problem.eot.mean(0)

    def deltas():
        nodes = {"node": torch.stack([pooled, problem.r, end])}
        return [network(nodes)["node"][2] for _ in range(2)]

    assert torch.equal(*deltas())
    before, after, cosine = problem.train(deltas, network.parameters())
    assert after > 0.9 * problem.floor, (before, after, cosine)
    assert cosine > 0.8, (before, after, cosine)
