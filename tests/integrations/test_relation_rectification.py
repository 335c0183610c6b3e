"""Relation rectification through a real text encoder and UNet, random and tiny."""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.diffusion_control.relation_rectification import (
    RelationRectifier,
    eot_positions,
    rectification_loss,
    rectify,
    relation_graph,
    sample_timesteps,
    word_features,
)
from transfuse.testing.models import tiny_unet

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

BOS, EOT, A, R, B = 62, 63, 5, 9, 11


def text_encoder():
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=BOS,
        eos_token_id=EOT,
        pad_token_id=EOT,
    )
    return transformers.CLIPTextModel(config).eval().requires_grad_(False)


def unet():
    return tiny_unet(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
    ).requires_grad_(False)


def ids(*words):
    row = [BOS, *words, EOT]
    return torch.tensor([row + [EOT] * (16 - len(row))])


def prompt(encoder, *words):
    tokens = ids(*words)
    return encoder(tokens).last_hidden_state, eot_positions(tokens, EOT, max_length=16)


def test_training_reaches_the_network_alone_and_lowers_the_loss():
    encoder, model = text_encoder(), unet()
    table = encoder.get_input_embeddings().weight
    words = {w: word_features(table, [w]) for w in (A, R, B)}
    z_ab, at_ab = prompt(encoder, A, R, B)
    z_ba, at_ba = prompt(encoder, B, R, A)
    z_a, at_a = prompt(encoder, 1, 2, A)
    z_b, at_b = prompt(encoder, 1, 2, B)
    assert at_ab.tolist() == at_a.tolist() == [4], "the first end of text, not the padding"
    ab = relation_graph(words[A], words[R], words[B], z_a[0, at_a[0]], z_ab[0, at_ab[0]])
    ba = relation_graph(words[B], words[R], words[A], z_b[0, at_b[0]], z_ba[0, at_ba[0]])
    g = torch.Generator().manual_seed(3)
    rectifier = RelationRectifier(32, hidden=16, generator=g)
    images, noise = torch.randn(2, 2, 1, 4, 8, 8, generator=g)
    scheduler = diffusers.DDPMScheduler()
    alphas = scheduler.alphas_cumprod
    frozen = {n: p.clone() for n, p in model.state_dict().items()}

    def loss(t):
        return rectification_loss(
            lambda x, t, p: model(x, t, p).sample,
            *images,
            rectify(z_ab, at_ab, rectifier(ab)),
            rectify(z_ba, at_ba, rectifier(ba)),
            t,
            noise,
            alphas_cumprod=alphas,
        )

    # What the latents are noised with is what the library's own scheduler gives.
    seen = []
    rectification_loss(
        lambda x, t, p: seen.append(x) or x,
        *images,
        z_ab,
        z_ba,
        700,
        noise,
        alphas_cumprod=alphas,
    )
    expected = scheduler.add_noise(images[1], noise[0], torch.tensor([700]))
    torch.testing.assert_close(seen[0][2:3], expected)

    optimizer = torch.optim.AdamW(rectifier.parameters(), lr=1e-2)
    first = loss(900).loss.item()
    for _ in range(12):
        t = sample_timesteps(1000, 0.5, 1, generator=g)
        optimizer.zero_grad()
        loss(t).loss.backward()
        optimizer.step()
    assert loss(900).loss.item() < first
    assert all(torch.equal(frozen[n], p) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in (*encoder.parameters(), *model.parameters()))
    # At generation: w = 0 is the prompt as it was, and other prompts never change.
    with torch.no_grad():
        delta = rectifier(ab)
        assert torch.equal(rectify(z_ab, at_ab, delta, weight=0.0), z_ab)
        x = images[0]
        plain = model(x, 500, z_ab).sample
        assert not torch.equal(model(x, 500, rectify(z_ab, at_ab, delta)).sample, plain)
