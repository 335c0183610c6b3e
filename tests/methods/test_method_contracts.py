"""One contract per kind, over all methods of that kind."""

from __future__ import annotations

import pytest
import torch

import transfuse.methods as methods


def _windowed():
    from transfuse.methods.diffusion_control.hi_diffusion import HiDiffusionOptions

    return {"options": HiDiffusionOptions(raunet=False, shift=1), "layers": ["blocks"]}


# slug -> keyword arguments, for methods that refuse to guess on a model they do not know or that
# draw something anew for every call
PATCHES = {"hi_diffusion": _windowed}


def _patch(slug, model):
    return methods.get(slug)(model, **PATCHES.get(slug, dict)())


@pytest.mark.parametrize("slug", methods.list(kind="patch"))
class TestPatch:
    """Built with defaults on a model: installed, described, removed without a trace."""

    def test_defaults_build_and_describe_themselves(self, slug, text_denoiser):
        patch = _patch(slug, text_denoiser)
        assert patch.installed
        assert patch.layers
        assert type(patch).__name__ in repr(patch)
        assert "installed" in repr(patch)
        patch.remove()
        assert not patch.installed
        assert "removed" in repr(patch)
        patch.remove()

    def test_removal_leaves_nothing_behind(self, slug, text_denoiser):
        def fingerprint():
            return [
                (
                    name,
                    sorted(module.__dict__),
                    len(module._forward_pre_hooks),
                    len(module._forward_hooks),
                )
                for name, module in text_denoiser.named_modules()
            ]

        x = torch.randn(1, 4, 4, 4)
        before, expected = fingerprint(), text_denoiser(x, 1)
        state = {name: tensor.clone() for name, tensor in text_denoiser.state_dict().items()}
        with _patch(slug, text_denoiser):
            text_denoiser(x, 1)
        assert fingerprint() == before
        assert torch.equal(text_denoiser(x, 1), expected)
        for name, tensor in text_denoiser.state_dict().items():
            assert torch.equal(tensor, state.pop(name))
        assert not state

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_runs_in_dtype_and_is_reproducible(self, slug, text_denoiser, dtype):
        model, x = text_denoiser.to(dtype), torch.randn(2, 4, 4, 4).to(dtype)
        with torch.no_grad(), _patch(slug, model):
            first, second = model(x, 1), model(x, 1)
        assert first.dtype == dtype
        assert first.isfinite().all()
        assert torch.equal(first, second)

    def test_model_without_a_place_for_it_is_refused(self, slug):
        with pytest.raises(ValueError, match=r"no (self|cross)-attention"):
            _patch(slug, torch.nn.Linear(3, 3))


def _rectifier_graph(dtype):
    from transfuse.methods.diffusion_control.relation_rectification import relation_graph

    features = [x.to(dtype).requires_grad_() for x in torch.randn(5, 2, 32)]
    return relation_graph(*features), features


def _rectifier(**options):
    return methods.get("relation_rectification")(**options)


def _first_layer(dim=6, hidden=3, generator=None):
    layer = torch.nn.Linear(dim, hidden)
    if generator is not None:
        with torch.no_grad():
            for p in layer.parameters():
                p.uniform_(-1, 1, generator=generator)
    return methods.get("tract")(layer)


def _rows(dtype):
    x = torch.randn(9, 6).to(dtype).requires_grad_()
    return x, [x]


# slug -> (what makes the layer, keyword arguments of a small one,
#          dtype -> (its input, tensors a gradient must reach))
LAYERS = {
    "relation_rectification": (_rectifier, {"dim": 32, "hidden": 16}, _rectifier_graph),
    "tract": (_first_layer, {}, _rows),
}


@pytest.mark.parametrize("slug", methods.list(kind="layer"))
class TestLayer:
    """Built with defaults, described, seeded, trained, stored."""

    def test_defaults_build_and_describe_themselves(self, slug):
        layer = LAYERS[slug][0]()
        assert isinstance(layer, torch.nn.Module)
        assert type(layer).__name__ in repr(layer)
        assert all(p.isfinite().all() for p in layer.parameters())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_reach_inputs_and_parameters(self, slug, dtype):
        make, options, inputs = LAYERS[slug]
        layer = make(**options).to(dtype)
        given, tensors = inputs(dtype)
        out = layer(given)
        assert out.dtype == dtype
        assert out.isfinite().all()
        assert torch.equal(layer(given), out)
        out.square().sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())

    def test_seeded_and_stored(self, slug):
        make, options, inputs = LAYERS[slug]
        first, second = (
            make(**options, generator=torch.Generator().manual_seed(3)) for _ in range(2)
        )
        other = make(**options, generator=torch.Generator().manual_seed(4))
        given, _ = inputs(torch.float32)
        assert torch.equal(first(given), second(given))
        assert not torch.equal(first(given), other(given))
        other.load_state_dict(first.state_dict())
        assert torch.equal(first(given), other(given))


def _adaptive(dtype):
    guidance = methods.get("adaptive_guidance")(space="prediction")
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return guidance, lambda: guidance.step(0, lambda x, at: x, lambda x, at: 0.5 * x, x)


def _experts(dtype):
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).to(dtype)
    guide = methods.get("ppap")(network, 3, r=2, generator=generator)
    x = torch.randn(2, 4, 4, 4, generator=generator).to(dtype)
    return guide, lambda: guide(x, torch.tensor([0, 999]))


GUIDANCE = {"adaptive_guidance": _adaptive, "ppap": _experts}


@pytest.mark.parametrize("slug", methods.list(kind="guidance"))
class TestGuidance:
    """Built with defaults: described, and the same numbers twice, in the dtype it is given."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_runs_in_dtype_and_is_reproducible(self, slug, dtype):
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            guidance, run = GUIDANCE[slug](dtype)
            assert type(guidance).__name__ in repr(guidance)
            with torch.no_grad():
                results.append(run())
        assert results[0].dtype == dtype
        assert results[0].isfinite().all()
        assert torch.equal(*results)


def _attack(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 48, generator=generator)
    clip = torch.rand(1, 3, 4, 4, generator=generator).to(dtype)
    attack = methods.get("local_style_fool")(lambda x: x.float().flatten(1) @ weights.T)
    label = int((clip.float().flatten() @ weights.T).argmax())
    masks = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    return attack.attack(clip, masks, label=label, stylised=1 - clip).clip


def _margins(dtype):
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 4, 9), (3, 9)))
    return methods.get("attention_svm")(x, z, torch.tensor([0, 3, 1])).weight


def _transfer(dtype):
    x = torch.linspace(-1, 1, 8, dtype=dtype)[:, None]
    report = methods.get("lr_transfer")(
        x, x.square(), widths=[4], depths=[1], lrs=[0.1], steps=3, every=3
    )
    return torch.cat([report.runs[0].losses, report.runs[0].sharpness])


PROCEDURES = {"attention_svm": _margins, "local_style_fool": _attack, "lr_transfer": _transfer}


def _sharp(params):
    return methods.get("tram")(params, lambda groups: torch.optim.SGD(groups, lr=0.1))


OPTIMIZERS = {"tram": _sharp}


@pytest.mark.parametrize("slug", methods.list(kind="optimizer"))
class TestOptimizer:
    """Built with defaults: lowers a loss, the same each time, from a stored state too."""

    def _train(self, slug, dtype, *, resume=False):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(20, 5, generator=generator).to(dtype)
        w = torch.nn.Parameter(torch.randn(5, 3, generator=generator).to(dtype))
        optimizer = OPTIMIZERS[slug]([w])
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert type(optimizer).__name__ in repr(optimizer)

        def closure():
            logits = x @ w
            target = torch.arange(20) % 3
            return torch.nn.functional.cross_entropy(logits.float(), target), logits

        losses = []
        for step in range(6):
            if resume and step == 3:
                state = optimizer.state_dict()
                optimizer = OPTIMIZERS[slug]([w])
                optimizer.load_state_dict(state)
            losses.append(optimizer.step(closure))
        assert w.dtype == dtype
        assert w.isfinite().all()
        return torch.stack(losses)

    @pytest.mark.filterwarnings("ignore:parameters in half precision")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lowers_the_loss_and_is_reproducible(self, slug, dtype):
        before = torch.random.get_rng_state()
        losses = self._train(slug, dtype)
        assert losses[-1] < losses[0]
        assert torch.equal(self._train(slug, dtype), losses)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_stored_and_resumed(self, slug):
        resumed = self._train(slug, torch.float32, resume=True)
        assert torch.equal(resumed, self._train(slug, torch.float32))


@pytest.mark.parametrize("slug", methods.list(kind="procedure"))
def test_procedures_are_reproducible_and_leave_the_global_generator(slug):
    before = torch.random.get_rng_state()
    first, second = PROCEDURES[slug](torch.float32), PROCEDURES[slug](torch.float32)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert torch.equal(torch.random.get_rng_state(), before)


def _domain_penalty(dtype, options):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(6, 3)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 6, generator=generator))
        head.bias.zero_()
    x = torch.randn(9, 6, generator=generator).to(dtype).requires_grad_()
    loss = methods.get("hessian_alignment")(**options)
    head = head.to(dtype)
    labels = torch.arange(9) % 3
    return loss, lambda: loss(head, x, labels, segments=[0, 4, 9]), [x, *head.parameters()]


def _bottleneck(dtype, options):
    generator = torch.Generator().manual_seed(0)
    x, y, yhat, t = (
        torch.randn(9, d, generator=generator).to(dtype).requires_grad_() for d in (4, 1, 1, 3)
    )
    loss = methods.get("cs_ib")(**options)
    return loss, lambda: loss(x, y, yhat, t), [x, y, yhat, t]


# slug -> (options that make it draw numbers, (dtype, options) -> (loss, call, tensors a gradient
# must reach))
LOSSES = {
    "cs_ib": ({}, _bottleneck),
    "hessian_alignment": ({"method": "hutchinson", "probes": 3}, _domain_penalty),
}


@pytest.mark.parametrize("slug", methods.list(kind="loss"))
class TestLoss:
    """Built with defaults, described, differentiated, seeded, stored."""

    def test_defaults_build_and_describe_themselves(self, slug):
        loss = methods.get(slug)()
        assert isinstance(loss, torch.nn.Module)
        assert type(loss).__name__ in repr(loss)
        assert list(loss.parameters()) == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_reach_inputs(self, slug, dtype):
        _, call, tensors = LOSSES[slug][1](dtype, {})
        value = call()
        assert value.dim() == 0
        assert value.isfinite()
        value.backward()
        for tensor in tensors:
            assert tensor.grad.dtype == dtype
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().sum() > 0

    def test_seeded_and_stored(self, slug):
        options, build = LOSSES[slug]
        _, call, _ = build(torch.float32, options)
        stored, again, _ = build(torch.float32, options)
        resumed, go_on, _ = build(torch.float32, options)
        before = torch.random.get_rng_state()
        assert torch.equal(call(), again())
        resumed.load_state_dict(stored.state_dict())
        assert torch.equal(call(), go_on())
        assert torch.equal(torch.random.get_rng_state(), before)


def _pareto_gradients(dtype, parameters):
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=generator).to(dtype) for shape in parameters]
        for _ in range(4)
    ]


def _pareto(aggregator, dtype):
    *gradients, guide = _pareto_gradients(dtype, ((3, 2), (5,)))
    return aggregator(gradients, guide, torch.tensor(0.5))


# slug -> (aggregator, dtype) -> weights of the tasks
AGGREGATORS = {"pareto_da": _pareto}


@pytest.mark.parametrize("slug", methods.list(kind="aggregator"))
class TestAggregator:
    """Built with defaults, described, constants for autograd, the same twice, stored."""

    def test_defaults_build_and_describe_themselves(self, slug):
        aggregator = methods.get(slug)()
        assert type(aggregator).__name__ in repr(aggregator)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_are_finite_and_reproducible(self, slug, dtype):
        before = torch.random.get_rng_state()
        first, second = (AGGREGATORS[slug](methods.get(slug)(), dtype) for _ in range(2))
        assert torch.equal(first, second)
        assert first.isfinite().all()
        assert not first.requires_grad
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_stored_and_resumed(self, slug):
        stored, resumed = methods.get(slug)(), methods.get(slug)()
        AGGREGATORS[slug](stored, torch.float32)
        resumed.load_state_dict(stored.state_dict())
        again = (AGGREGATORS[slug](x, torch.float32) for x in (stored, resumed))
        assert torch.equal(*again)


def _checkpoints(dtype):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        start = torch.nn.Linear(4, 3).to(dtype)
    with torch.no_grad():
        for p in start.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return start, [
        {n: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in s.items()}
        for s in (start.state_dict(), start.state_dict())
    ]


def _by_certainty(dtype):
    _, states = _checkpoints(dtype)
    fishers = [{n: t.float().square() for n, t in state.items()} for state in states]
    return states[0], methods.get("fisher_merging")(states, fishers)


def _by_coefficients(dtype):
    from transfuse.methods.model_merging.atlas import TaskVector

    model, states = _checkpoints(dtype)
    composed = methods.get("atlas")(model, [TaskVector(model.state_dict(), s) for s in states])
    with torch.no_grad():
        composed.coef.fill_(0.5)
    return model.state_dict(), composed.materialize()


# slug -> dtype -> (state dict of the target, the merged one)
MERGERS = {"atlas": _by_coefficients, "fisher_merging": _by_certainty}


@pytest.mark.parametrize("slug", methods.list(kind="merger"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mergers_give_a_state_dict_of_the_target_twice_the_same(slug, dtype):
    before = torch.random.get_rng_state()
    target, merged = MERGERS[slug](dtype)
    _, again = MERGERS[slug](dtype)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(merged) == list(target)
    torch.nn.Linear(4, 3).to(dtype).load_state_dict(merged)
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()
        assert not torch.equal(tensor, target[name])
        assert not tensor.requires_grad
        assert torch.equal(tensor, again[name])


def _plane(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=generator).to(dtype)
    layer = _first_linear(generator).to(dtype)
    plane = methods.get("information_plane")(layer, [""], x, torch.arange(24) % 2)

    def numbers():
        plane.record(0)
        return plane.result().information

    return plane, numbers


def _first_linear(generator):
    layer = torch.nn.Linear(6, 2)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(-1, 1, generator=generator)
    return layer


# slug -> dtype -> (what was built with defaults, its numbers)
METRICS = {"information_plane": _plane}


@pytest.mark.parametrize("slug", methods.list(kind="metric"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:layer")
def test_metrics_are_reproducible_numbers(slug, dtype):
    """Built with defaults, described; finite, the same twice, no global generator moved."""
    results = []
    for _ in range(2):
        metric, numbers = METRICS[slug](dtype)
        before = torch.random.get_rng_state()
        results.append(numbers())
        assert torch.equal(torch.random.get_rng_state(), before)
        assert type(metric).__name__ in repr(metric)
    assert torch.equal(*results)
    assert results[0].isfinite().all()
    assert not results[0].requires_grad


def _image_network(dtype):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ReLU(inplace=True),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Dropout(),
        torch.nn.Linear(16, 5),
    )
    return network.to(dtype)


@pytest.mark.parametrize("slug", methods.list(kind="saliency"))
class TestSaliency:
    """Built with defaults on a named layer: maps of the input's size in [0, 1], the same each time,
    and a model that is as before."""

    def test_defaults_build_and_describe_themselves(self, slug):
        saliency = methods.get(slug)(_image_network(torch.float32), "1")
        assert type(saliency).__name__ in repr(saliency)
        assert "'1'" in repr(saliency)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_runs_in_dtype_and_is_reproducible(self, slug, dtype):
        saliency = methods.get(slug)(_image_network(dtype), "1")
        x = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = torch.random.get_rng_state()
        first, second = saliency(x, [0, 4]), saliency(x, torch.tensor([0, 4]))
        assert first.shape == (2, 9, 7)
        assert first.dtype == torch.float32
        assert first.min() >= 0
        assert first.max() <= 1
        assert torch.equal(first, second)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_the_model_is_as_before(self, slug):
        model = _image_network(torch.float32).train()
        state = {name: x.clone() for name, x in model.state_dict().items()}
        saliency = methods.get(slug)(model, "1")
        saliency(torch.rand(2, 3, 9, 7))
        with pytest.raises(ValueError, match=r"targets: expected entries in \[0, 5\)"):
            saliency(torch.rand(2, 3, 9, 7), 5)
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert all(m.training and not m._forward_hooks for m in model.modules())

    def test_unknown_layers_are_refused(self, slug):
        with pytest.raises(ValueError, match="layers: no module '9'"):
            methods.get(slug)(_image_network(torch.float32), "9")


# What the tests above cover.
TESTED = frozenset(
    {
        "aggregator",
        "guidance",
        "layer",
        "loss",
        "merger",
        "metric",
        "optimizer",
        "patch",
        "procedure",
        "saliency",
    }
)


def test_every_kind_in_use_has_a_contract():
    used = {methods.card(slug).kind for slug in methods.list()}
    assert used <= TESTED, f"write the contract test of: {sorted(used - TESTED)}"
