"""What ``cfg_step`` and its siblings promise beyond the contract of every op."""

from __future__ import annotations

import pytest
import torch

import transfuse
from transfuse.ops import (
    DDIM,
    DDPM,
    Euler,
    Predict,
    cfg_step,
    cfg_step_with_cosine,
    cfg_step_with_original,
    noise_mix,
    noise_mix_with_velocity,
)
from transfuse.ops._cfg_reference import cfg_step_reference
from transfuse.testing import oracle
from transfuse.testing.specs import find_spec

try:
    import diffusers
except Exception as error:  # a broken dependency of diffusers is no ImportError
    diffusers = None
    WHY = f"diffusers is not usable: {type(error).__name__}: {error}"
else:
    WHY = ""

needs_diffusers = pytest.mark.skipif(diffusers is None, reason=WHY)
SPEC = find_spec("cfg_step")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCALE = 5.0


@pytest.fixture
def cpu(device_for) -> str:
    """The name of the native backend; skips where it is not built."""
    device_for(SPEC, "cpu", torch.float32)
    return "cpu"


def latents(count=4, shape=(2, 4, 16, 16), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=dtype).unbind(0)


def guided(cond, uncond):
    return uncond + SCALE * (cond - uncond)


def widen(scheduler):
    """The scheduler's tables in float64, so that it is judged by its formulas alone."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


# -- the schedulers that people use ---------------------------------------------------------------


@needs_diffusers
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("position", [0, 5, 19])
def test_ddim_is_that_of_diffusers(cpu, prediction, eta, position):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    widen(scheduler)
    x, c, u, noise = latents()
    t = scheduler.timesteps[position]
    before = t - 1000 // 20
    table = scheduler.alphas_cumprod
    after = table[before] if before >= 0 else scheduler.final_alpha_cumprod
    want = scheduler.step(guided(c, u), t, x, eta=eta, variance_noise=noise)
    update = DDIM(alpha=table[t].item(), alpha_next=after.item(), eta=eta)
    got = cfg_step_with_original(
        x, c, u, update, scale=SCALE, prediction=prediction, noise=noise, backend=cpu
    )
    torch.testing.assert_close(got.sample, want.prev_sample)
    torch.testing.assert_close(got.original, want.pred_original_sample)


@needs_diffusers
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_ddpm_is_that_of_diffusers(cpu, prediction, variance, t, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, prediction_type=prediction, variance_type=f"fixed_{variance}"
    )
    widen(scheduler)
    x, c, u, noise = latents()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: noise
    )
    want = scheduler.step(guided(c, u), t, x).prev_sample
    table = scheduler.alphas_cumprod
    update = DDPM(
        alpha=table[t].item(), alpha_next=table[t - 1].item() if t > 0 else 1.0, variance=variance
    )
    got = cfg_step(x, c, u, update, scale=SCALE, prediction=prediction, noise=noise, backend=cpu)
    torch.testing.assert_close(got, want)


@needs_diffusers
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("position", [0, 5, 9])
def test_euler_is_that_of_diffusers(cpu, prediction, position):
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction)
    scheduler.set_timesteps(10)
    x, c, u, _ = latents(dtype=torch.float32)
    x = x * scheduler.init_noise_sigma
    t = scheduler.timesteps[position]
    scheduler.scale_model_input(x, t)
    want = scheduler.step(guided(c, u), t, x)
    sigmas = scheduler.sigmas.tolist()
    update = Euler(sigma=sigmas[position], sigma_next=sigmas[position + 1])
    got = cfg_step_with_original(x, c, u, update, scale=SCALE, prediction=prediction, backend=cpu)
    size = x.abs().max().item()
    torch.testing.assert_close(got.sample, want.prev_sample, rtol=1e-5, atol=2e-6 * size)
    torch.testing.assert_close(got.original, want.pred_original_sample, rtol=1e-5, atol=2e-6 * size)


@needs_diffusers
def test_flow_matching_is_an_euler_step(cpu):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    x, c, u, _ = latents(dtype=torch.float32)
    for position, t in enumerate(scheduler.timesteps):
        want = scheduler.step(guided(c, u), t, x).prev_sample
        sigma, after = scheduler.sigmas[position : position + 2].tolist()
        got = cfg_step(x, c, u, Euler(sigma=sigma, sigma_next=after), scale=SCALE, backend=cpu)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_diffusers
@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaling_is_that_of_diffusers(cpu, rescale):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    _, c, u, _ = latents()
    want = rescale_noise_cfg(guided(c, u), c, guidance_rescale=rescale)
    got = cfg_step(None, c, u, Predict(), scale=SCALE, rescale=rescale, backend=cpu)
    torch.testing.assert_close(got, want)


@needs_diffusers
def test_noising_is_that_of_diffusers(cpu):
    scheduler = diffusers.DDPMScheduler()
    x, noise, *_ = latents(dtype=torch.float32)
    t = torch.tensor([10, 900])
    alpha = scheduler.alphas_cumprod[t]
    pair = noise_mix_with_velocity(
        x, noise, alpha=alpha.sqrt(), sigma=(1 - alpha).sqrt(), backend=cpu
    )
    torch.testing.assert_close(pair.noisy, scheduler.add_noise(x, noise, t))
    torch.testing.assert_close(pair.velocity, scheduler.get_velocity(x, noise, t))


# -- numerics -------------------------------------------------------------------------------------


def test_inversion_undoes_a_step(cpu):
    x, c, u, _ = latents()
    up = cfg_step(x, c, u, DDIM(alpha=0.8, alpha_next=0.3), scale=SCALE, backend=cpu)
    down = cfg_step(up, c, u, DDIM(alpha=0.3, alpha_next=0.8), scale=SCALE, backend=cpu)
    torch.testing.assert_close(down, x)


def test_what_has_no_weight_is_not_read(cpu):
    x, c, u, _ = latents(dtype=torch.float32)
    nan = torch.full_like(u, torch.nan)
    update = DDIM(alpha=0.5, alpha_next=0.6)
    plain = cfg_step(x, c, None, update, scale=1.0, backend=cpu)
    assert torch.equal(cfg_step(x, c, nan, update, scale=1.0, backend=cpu), plain)
    assert torch.equal(cfg_step(x, c, u, update, scale=1.0, noise=nan, backend=cpu), plain)
    per_sample = cfg_step(x, c, nan, update, scale=torch.tensor([1.0, 2.0]), backend=cpu)
    assert torch.equal(per_sample[0], plain[0])
    assert per_sample[1].isnan().all()
    assert torch.equal(noise_mix(x, nan, alpha=1.0, sigma=0.0, backend=cpu), x)


def test_a_cosine_near_one_keeps_its_digits(cpu):
    c = torch.randn(1, 65536)
    for gap in (1e-1, 1e-2, 1e-3):
        u = c + gap * torch.randn_like(c)
        truth = torch.nn.functional.cosine_similarity(c.double(), u.double())
        got = cfg_step_with_cosine(None, c, u, Predict(), scale=2.0, backend=cpu).cosine
        assert abs(got.double() - truth).item() < 1e-7


def test_the_cosine_of_clean_latents_survives_cancellation(cpu):
    """At alpha 0.002, x and the prediction agree in all but a few per cent."""
    alpha = 0.002
    clean = torch.randn(1, 20000)
    noise = torch.randn_like(clean)
    x = (alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise).bfloat16()
    c, u = noise.bfloat16(), (noise + 0.01 * torch.randn_like(noise)).bfloat16()
    originals = [(x.double() - (1 - alpha) ** 0.5 * e.double()) / alpha**0.5 for e in (c, u)]
    truth = torch.nn.functional.cosine_similarity(*originals)
    got = cfg_step_with_cosine(
        x, c, u, Predict(alpha=alpha), scale=2.0, space="original", backend=cpu
    ).cosine
    assert abs(got.double() - truth).item() < 1e-6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_zero_predictions_have_a_cosine(cpu, backend):
    zero, one = torch.zeros(2, 5), torch.ones(2, 5)
    pair = cfg_step_with_cosine(
        None, zero, torch.stack([zero[0], one[1]]), Predict(), scale=2.0, backend=backend
    )
    assert pair.cosine.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
def test_constant_predictions_are_not_rescaled(cpu, dtype):
    c = torch.full((2, 1000), 0.1).to(dtype)
    u = torch.full((2, 1000), -1 / 3).to(dtype)
    got = cfg_step(None, c, u, Predict(), scale=2.0, rescale=1.0, backend=cpu)
    torch.testing.assert_close(got, cfg_step(None, c, u, Predict(), scale=2.0, backend=cpu))


# -- determinism, layouts, backends ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 128, 128), (8, 16, 128, 128), (1, 300001), (700, 33)])
def test_threads_do_not_change_a_bit(cpu, dtype, shape):
    x, c, u = (t.to(dtype) for t in latents(3, shape, torch.float32))

    def run(threads):
        torch.set_num_threads(threads)
        return cfg_step_with_cosine(
            x, c, u, DDIM(alpha=0.5, alpha_next=0.6), scale=SCALE, rescale=0.7, backend=cpu
        )

    one = run(1)
    for threads in (2, 3, 2):
        assert all(torch.equal(a, b) for a, b in zip(one, run(threads), strict=True))


def test_mixed_layouts(cpu):
    x, c, u, _ = latents()
    plain = cfg_step(x, c, u, DDIM(alpha=0.5, alpha_next=0.6), scale=SCALE, backend=cpu)
    last = c.contiguous(memory_format=torch.channels_last)
    got = cfg_step(x, last, u, DDIM(alpha=0.5, alpha_next=0.6), scale=SCALE, backend=cpu)
    assert torch.equal(got, plain)
    assert got.stride() == last.stride()
    shared = x[:1].expand_as(x)
    got = cfg_step(shared, c, u, DDIM(alpha=0.5, alpha_next=0.6), scale=SCALE, backend=cpu)
    torch.testing.assert_close(
        got,
        cfg_step(shared.clone(), c, u, DDIM(alpha=0.5, alpha_next=0.6), scale=SCALE, backend=cpu),
        rtol=0,
        atol=0,
    )
    batch_last = c.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    got = cfg_step(x, batch_last, u, DDIM(alpha=0.5, alpha_next=0.6), scale=SCALE, backend=cpu)
    assert torch.equal(got, plain)


def test_third_derivatives(cpu):
    x, c, u, _ = (t[:, :1, :2, :2].clone() for t in latents())
    c.requires_grad_()

    def third(op):
        value = op(x, c, u, DDIM(alpha=0.5, alpha_next=0.6), scale=2.0, rescale=0.7).pow(2).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(value, c, create_graph=True)
            value = g.pow(2).sum()
        return value

    torch.testing.assert_close(third(cfg_step), third(cfg_step_reference))


def test_raw_op_refuses_what_would_read_out_of_bounds(cpu):
    op = torch.ops.transfuse.mix
    x = torch.zeros(2, 3)
    for args, match in (
        (([x] * 49, None, [], 0, []), "inputs must be 1 to"),
        (([x, x[:1]], None, [0.0, 0.0, 0.0], 1, []), r"inputs\[1\] must have shape"),
        (([x, x.double()], None, [0.0, 0.0, 0.0], 1, []), "one dtype"),
        (([x], None, [1.0], 1, []), "numbers must hold 2"),
        (([x], None, [1.0] * 6, 1, []), "numbers must hold 2"),
        (([x], None, [], 0, [0, 2]), "pairs must hold numbers"),
        (([x], None, [], 0, [0]), "pairs must be"),
        (([x], torch.zeros(3, 1, 2, dtype=torch.float64), [], 1, []), "coefficients must have"),
        (([x], torch.zeros(2, 1, 2), [], 1, []), "coefficients must be a contiguous float64"),
        (([x], None, [], 99, []), "outputs must be"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op(*args)


def test_tensors_without_numbers(cpu):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, c, u = (torch.empty(2, 4, 8, 8) for _ in range(3))
        scale = torch.empty(2)
        got = cfg_step_with_cosine(
            x, c, u, DDIM(alpha=0.5, alpha_next=0.6), scale=scale, rescale=0.7, backend=cpu
        )
        assert got.sample.shape == x.shape
        assert got.cosine.shape == (2,)
        assert noise_mix(x, c, alpha=scale, sigma=scale, backend=cpu).shape == x.shape
    meta = torch.empty(2, 3, device="meta")
    assert cfg_step(None, meta, meta, Predict(), scale=2.0).shape == (2, 3)


def test_explain():
    text = transfuse.explain("cfg_step", torch.zeros(1, 2))
    assert "cfg_step on cpu" in text


def test_float32_is_as_good_as_eager(cpu):
    x, c, u = latents(3, (2, 4, 64, 64), torch.float32)
    wide = [t.double() for t in (x, c, u)]
    update = DDIM(alpha=0.01, alpha_next=0.02)
    truth = cfg_step_reference(*wide, update, scale=SCALE, rescale=0.7)
    eager = cfg_step_reference(x, c, u, update, scale=SCALE, rescale=0.7)
    got = cfg_step(x, c, u, update, scale=SCALE, rescale=0.7, backend=cpu)
    assert oracle.distance(got, truth) <= oracle.distance(eager, truth)
