"""The Triton attention kernels under Triton's interpreter, against float64 dense oracles.

The interpreter must be chosen before Triton is imported and would affect every other test of the
process, so this file has two faces. Collected normally, its one test runs this same file in a
child process with ``TRITON_INTERPRET=1``; in that child the tests below are defined. To run one of
them: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_attention.py -k name``.

Block sizes are set to 16 x 16 so that small shapes cross many block boundaries. bfloat16 is left
out: the interpreter multiplies it wrongly.
"""

import math
import subprocess
import sys

import pytest
import torch

from transfuse.testing.children import INTERPRETED, run_under_interpreter

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        child = run_under_interpreter(__file__)
        assert child.passed > 50
        assert "skipped" not in child.output

    def test_compile_check_compiles_without_a_gpu():
        command = [sys.executable, "-m", "transfuse.triton_kernels.compile_check", "--jobs", "1"]
        child = subprocess.run(
            [*command, "--only", "forward bf16 D=64 sm_90"], capture_output=True, text=True
        )
        assert child.returncode == 0, child.stdout + child.stderr
        assert "1 kernels, 0 failed" in child.stdout
        child = subprocess.run([*command, "--only", "sideways"], capture_output=True, text=True)
        assert child.returncode == 2

    def test_compile_check_fails_on_spills_and_on_too_much_shared_memory():
        from transfuse.triton_kernels import compile_check

        assert compile_check.verdict(80, 163 * 1024, 0, hot=True) == ""
        assert compile_check.verdict(80, 1024, 8, hot=False) == ""
        assert "spills 8" in compile_check.verdict(80, 1024, 8, hot=True)
        assert "shared memory" in compile_check.verdict(80, 163 * 1024 + 1, 0, hot=False)
        assert compile_check.verdict(90, 163 * 1024 + 1, 0, hot=False) == ""
        # A launch that cannot be compiled is reported, not raised: 3 is no power of two.
        case = compile_check.cases()[0]
        launch = case.plan()[0]
        broken = launch._replace(arguments={**launch.arguments, "BLOCK_M": 3})
        error = compile_check.check_launch(case._replace(plan=lambda: [broken]), 0, 90).error
        assert error

    def test_importing_the_package_does_not_import_triton():
        code = (
            "import sys, transfuse.triton_kernels; "
            "sys.exit(any(name.split('.')[0] == 'triton' for name in sys.modules))"
        )
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert child.returncode == 0, child.stderr

    def test_missing_triton_names_the_extra():
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "try:\n    from transfuse.triton_kernels import attention\n"
            "except ImportError as error:\n    sys.exit('transfuse[triton]' not in str(error))\n"
            "sys.exit(2)"
        )
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert child.returncode == 0, child.stderr

else:
    from dataclasses import dataclass, field

    from transfuse.ops import KV, attend
    from transfuse.triton_kernels import _attention_plan, attention

    SMALL_BLOCKS = ";".join(
        f"{direction}:{bucket}=16,16,1,1"
        for direction in _attention_plan.TABLE
        for bucket in (16, 32, 64, 128, 256)
    )

    @pytest.fixture(autouse=True)
    def _small_blocks(monkeypatch):
        monkeypatch.setenv("TRANSFUSE_TRITON_CONFIG", SMALL_BLOCKS)
        torch.manual_seed(0)

    def framed(tensor):
        """The same values inside a larger buffer of NaN, so that a stray read shows."""
        if tensor is None or not tensor.is_floating_point():
            return tensor
        buffer = torch.full([size + 3 for size in tensor.shape], math.nan, dtype=tensor.dtype)
        view = buffer[tuple(slice(1, 1 + size) for size in tensor.shape)]
        return view.copy_(tensor)

    def packed(tensor):
        """The same values with heads and rows exchanged in memory, as projections leave them."""
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def column_major(tensor):
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)

    @dataclass
    class Problem:
        """Arguments of the core; ``biases`` are unexpanded and expanded on the way in."""

        query: torch.Tensor
        keys: list
        values: list
        biases: list = field(default_factory=list)
        masks: list = field(default_factory=list)
        indices: list = field(default_factory=list)
        scales: list = field(default_factory=list)
        causal: list = field(default_factory=list)

        def __post_init__(self):
            count = len(self.keys)
            for name, default in (
                ("biases", None),
                ("masks", None),
                ("indices", None),
                ("scales", self.query.shape[-1] ** -0.5),
                ("causal", 0),
            ):
                if not getattr(self, name):
                    setattr(self, name, [default] * count)

        def expand(self, tensors):
            batches, heads, rows, _ = self.query.shape
            return [
                None if t is None else t.expand(batches, heads, rows, key.shape[2])
                for t, key in zip(tensors, self.keys, strict=True)
            ]

        def arguments(self):
            return (
                self.query,
                self.keys,
                self.values,
                self.expand(self.biases),
                self.expand(self.masks),
                self.indices,
                self.scales,
                self.causal,
            )

        def tensors(self):
            return [
                self.query,
                *self.keys,
                *self.values,
                *(b for b in self.biases if b is not None),
            ]

        def dense(self, dtype):
            """(function of tensors() computing (out, lse) densely, tensors() in ``dtype``)."""
            count = len(self.keys)

            def function(query, *rest):
                keys, values = rest[:count], rest[count : 2 * count]
                given = iter(rest[2 * count :])
                biases = [None if b is None else next(given) for b in self.biases]
                return dense_attention(self, query, keys, values, biases)

            return function, [t.detach().to(dtype).contiguous() for t in self.tensors()]

    def dense_logits(problem, query, keys, biases):
        batches, heads, rows, _ = query.shape
        logits = []
        for s, key in enumerate(keys):
            if problem.indices[s] is not None:
                key = key[problem.indices[s]]
            key = key.expand(batches, -1, -1, -1).repeat_interleave(heads // key.shape[1], 1)
            score = problem.scales[s] * (query @ key.transpose(-1, -2))
            if biases[s] is not None:
                score = score + biases[s]
            if problem.masks[s] is not None:
                score = score.masked_fill(~problem.masks[s], -math.inf)
            count = key.shape[2]
            if problem.causal[s]:
                shift = 0 if problem.causal[s] == 1 else count - rows
                allowed = torch.ones(rows, count, dtype=torch.bool).tril(shift)
                score = score.masked_fill(~allowed, -math.inf)
            logits.append(score)
        return torch.cat(logits, -1)

    def dense_attention(problem, query, keys, values, biases):
        batches, heads = query.shape[:2]
        logits = dense_logits(problem, query, keys, biases)
        spread = []
        for s, value in enumerate(values):
            if problem.indices[s] is not None:
                value = value[problem.indices[s]]
            spread.append(
                value.expand(batches, -1, -1, -1).repeat_interleave(heads // value.shape[1], 1)
            )
        alive = (logits > -math.inf).any(-1)
        safe = torch.where(alive[..., None], logits, 0.0)
        out = torch.softmax(safe, -1) @ torch.cat(spread, -2)
        lse = torch.logsumexp(safe, -1) if safe.shape[-1] else safe.sum(-1)
        return torch.where(alive[..., None], out, 0.0), torch.where(alive, lse, -math.inf)

    def check(name, actual, oracle, eager, dtype, factor=4):
        """Pass if error <= 2 * (error of eager torch in this dtype) + factor eps max|oracle|."""
        assert actual.shape == oracle.shape, name
        assert not torch.isnan(actual).any(), name
        infinite = torch.isinf(oracle)
        assert torch.equal(torch.isinf(actual), infinite), name
        if infinite.all():
            return
        difference = (actual.double() - oracle)[~infinite].abs().max()
        allowed = 2 * (eager.double() - oracle)[~infinite].abs().max()
        allowed = allowed + factor * torch.finfo(dtype).eps * oracle[~infinite].abs().max()
        assert difference <= allowed, f"{name}: {difference:.3e} > {allowed:.3e}"

    def check_all(names, actual, oracle, eager, dtype, factor=4):
        assert len(names) == len(actual) == len(oracle) == len(eager)
        for each in zip(names, actual, oracle, eager, strict=True):
            check(*each, dtype, factor)

    def names_of(problem):
        count = len(problem.keys)
        return (
            ["dq"]
            + [f"dk{s}" for s in range(count)]
            + [f"dv{s}" for s in range(count)]
            + [f"dbias{s}" for s in range(count) if problem.biases[s] is not None]
        )

    def flat(gradients):
        query, keys, values, biases = gradients
        return [query, *keys, *values, *biases]

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(dtype)

    def bools(*shape):
        return torch.rand(*shape) > 0.4

    # Problems. Each is a function of the dtype.

    def plain(dtype):
        return Problem(
            normal(2, 2, 17, 24, dtype=dtype),
            [normal(2, 2, 35, 24, dtype=dtype)],
            [normal(2, 2, 35, 40, dtype=dtype)],
        )

    def even(dtype):
        return Problem(
            normal(1, 2, 32, 16, dtype=dtype),
            [normal(1, 2, 48, 16, dtype=dtype)],
            [normal(1, 2, 48, 16, dtype=dtype)],
        )

    def causal_upper(dtype):
        return Problem(
            normal(1, 2, 37, 8, dtype=dtype),
            [normal(1, 1, 50, 8, dtype=dtype)],
            [normal(1, 1, 50, 8, dtype=dtype)],
            causal=[1],
        )

    def causal_lower_short(dtype):
        # More queries than keys: the first rows see nothing.
        return Problem(
            normal(1, 2, 50, 8, dtype=dtype),
            [normal(1, 2, 21, 8, dtype=dtype)],
            [normal(1, 2, 21, 8, dtype=dtype)],
            causal=[2],
        )

    def causal_lower_long(dtype):
        return Problem(
            normal(1, 2, 20, 8, dtype=dtype),
            [normal(1, 2, 53, 8, dtype=dtype)],
            [normal(1, 2, 53, 8, dtype=dtype)],
            masks=[bools(1, 2, 20, 53)],
            causal=[2],
        )

    def mixture(dtype):
        """Every feature at once: grouped heads, maps, biases, masks, causal, an empty source."""
        return Problem(
            framed(normal(2, 2, 18, 20, dtype=dtype)),
            [
                framed(normal(2, 1, 33, 20, dtype=dtype)),
                normal(1, 2, 5, 20, dtype=dtype),
                normal(3, 1, 0, 20, dtype=dtype),
                packed(normal(4, 1, 18, 20, dtype=dtype)),
            ],
            [
                column_major(normal(2, 1, 33, 12, dtype=dtype)),
                framed(normal(1, 2, 5, 12, dtype=dtype)),
                normal(3, 1, 0, 12, dtype=dtype),
                normal(4, 1, 18, 12, dtype=dtype),
            ],
            biases=[
                framed(normal(2, 1, 18, 33, dtype=dtype)),
                normal(1, 2, 1, 5, dtype=dtype),
                None,
                normal(1, 1, 18, 1, dtype=dtype),
            ],
            masks=[bools(2, 1, 1, 33), None, None, bools(1, 2, 18, 18)],
            indices=[None, None, torch.tensor([2, 1]), torch.tensor([3, 3])],
            scales=[0.3, -0.2, 0.1, 0.25],
            causal=[1, 0, 0, 2],
        )

    def masked_rows(dtype):
        mask = bools(2, 2, 34, 40)
        mask[0, 0, 5] = False
        mask[:, :, 16:32] = False
        mask[1, 1] = False
        bias = normal(2, 1, 34, 40, dtype=dtype)
        bias[:, :, 3] = -math.inf
        bias[:, :, :, 7:20] = -math.inf
        return Problem(
            normal(2, 2, 34, 8, dtype=dtype),
            [normal(2, 2, 40, 8, dtype=dtype)],
            [normal(2, 2, 40, 8, dtype=dtype)],
            biases=[bias],
            masks=[mask],
        )

    def key_bias(dtype):
        return Problem(
            normal(2, 1, 20, 8, dtype=dtype),
            [normal(2, 1, 19, 8, dtype=dtype), normal(1, 1, 17, 8, dtype=dtype)],
            [normal(2, 1, 19, 8, dtype=dtype), normal(1, 1, 17, 8, dtype=dtype)],
            biases=[normal(1, 1, 1, 19, dtype=dtype), normal(2, 1, 1, 1, dtype=dtype)],
        )

    def single_token(dtype):
        return Problem(
            normal(2, 3, 1, 1, dtype=dtype),
            [normal(2, 3, 2, 1, dtype=dtype)],
            [normal(2, 3, 2, 1, dtype=dtype)],
            biases=[normal(2, 3, 1, 2, dtype=dtype)],
        )

    def many_sources(dtype):
        lengths = [3, 17, 1, 5, 0, 2, 16, 4, 9, 1, 20]
        return Problem(
            normal(1, 2, 18, 8, dtype=dtype),
            [normal(1, 1, m, 8, dtype=dtype) for m in lengths],
            [normal(1, 1, m, 8, dtype=dtype) for m in lengths],
            scales=[0.1 * (s + 1) for s in range(len(lengths))],
        )

    def wide_heads(dtype):
        return Problem(
            normal(1, 1, 17, 160, dtype=dtype),
            [normal(1, 1, 18, 160, dtype=dtype)],
            [normal(1, 1, 18, 256, dtype=dtype)],
        )

    PROBLEMS = [
        plain,
        even,
        causal_upper,
        causal_lower_short,
        causal_lower_long,
        mixture,
        masked_rows,
        key_bias,
        single_token,
        many_sources,
        wide_heads,
    ]
    DTYPES = [torch.float32, torch.float16]
    CALLS = [(make, torch.float32) for make in PROBLEMS]
    CALLS += [(plain, torch.float16)]
    by_call = pytest.mark.parametrize(
        ("make", "dtype"), CALLS, ids=[f"{make.__name__}-{dtype}" for make, dtype in CALLS]
    )
    by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

    def tangents_like(problem):
        """Random tangents of all tensors, finite where a bias is -inf."""
        return [torch.randn(t.shape).to(t.dtype) for t in problem.tensors()]

    def split(problem, tensors):
        """tensors() order to (query, keys, values, expanded biases)."""
        count = len(problem.keys)
        given = iter(tensors[1 + 2 * count :])
        biases = [None if b is None else next(given) for b in problem.biases]
        return tensors[0], tensors[1 : 1 + count], tensors[1 + count : 1 + 2 * count], biases

    @by_call
    def test_forward(make, dtype):
        problem = make(dtype)
        actual = attention.attention_forward(*problem.arguments())
        assert actual[0].dtype == dtype
        assert actual[1].dtype == torch.float32
        results = []
        for precision in (torch.float64, dtype):
            function, tensors = problem.dense(precision)
            results.append(function(*tensors))
        check_all(["out", "lse"], actual, *results, dtype)

    @by_call
    def test_backward(make, dtype):
        problem = make(dtype)
        with_lse = make is not causal_upper
        out, lse = attention.attention_forward(*problem.arguments())
        grad_out = framed(torch.randn(out.shape).to(dtype))
        grad_lse = torch.randn(lse.shape) if with_lse else None
        results = []
        for precision in (torch.float64, dtype):
            function, tensors = problem.dense(precision)
            tensors = [t.requires_grad_() for t in tensors]
            dense_out, dense_lse = function(*tensors)
            loss = (dense_out * grad_out.to(precision)).sum()
            if with_lse:
                finite = torch.where(torch.isinf(dense_lse), 0.0, dense_lse)
                loss = loss + (finite * grad_lse.to(precision)).sum()
            results.append(torch.autograd.grad(loss, tensors))
        flags = [b is not None for b in problem.biases]
        if with_lse:
            # Nothing depends on the log-sum-exp of a fully masked row, whatever its gradient.
            grad_lse = torch.where(torch.isinf(lse), math.nan, grad_lse)
        actual = flat(
            attention.attention_backward(grad_out, grad_lse, *problem.arguments(), out, lse, flags)
        )
        assert all(t.dtype == dtype for t in actual)
        check_all(names_of(problem), actual, *results, dtype, 8)

    @by_call
    def test_jvp(make, dtype):
        problem = make(dtype)
        out, lse = attention.attention_forward(*problem.arguments())
        tangents = tangents_like(problem)
        query_t, keys_t, values_t, biases_t = split(problem, tangents)
        actual = attention.attention_jvp(
            *problem.arguments(),
            out,
            lse,
            query_t,
            keys_t,
            [framed(t) for t in values_t],
            problem.expand(biases_t),
        )
        assert actual[0].dtype == dtype
        assert actual[1].dtype == torch.float32
        results = []
        for precision in (torch.float64, dtype):
            function, tensors = problem.dense(precision)
            cast = tuple(t.to(precision) for t in tangents)
            _, (out_t, lse_t) = torch.func.jvp(function, tuple(tensors), cast)
            results.append((out_t, lse_t))
        check_all(["out_t", "lse_t"], actual, *results, dtype, 8)

    def jvp_backward_pair(problem, dtype, zero_bias_tangent=False):
        """(actual, [oracle, eager]) gradients of a random pairing with the tangents."""
        out, lse = attention.attention_forward(*problem.arguments())
        tangents = tangents_like(problem)
        query_t, keys_t, values_t, biases_t = split(problem, tangents)
        given = problem.expand(biases_t)
        if zero_bias_tangent:
            biases = 1 + 2 * len(problem.keys)
            tangents[biases:] = [torch.zeros_like(t) for t in tangents[biases:]]
            given = [None] * len(given)
        rest = (*problem.arguments(), out, lse, query_t, keys_t, values_t, given)
        out_t, lse_t = attention.attention_jvp(*rest)
        grad_out = torch.randn(out.shape).to(dtype)
        grad_lse = torch.randn(lse.shape)
        results = []
        for precision in (torch.float64, dtype):
            function, tensors = problem.dense(precision)
            tensors = [t.requires_grad_() for t in tensors]
            cast = tuple(t.to(precision) for t in tangents)
            _, (dense_out_t, dense_lse_t) = torch.func.jvp(function, tuple(tensors), cast)
            loss = (dense_out_t * grad_out.to(precision)).sum()
            loss = loss + (dense_lse_t * grad_lse.to(precision)).sum()
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            results.append(
                [
                    torch.zeros_like(t) if g is None else g
                    for t, g in zip(tensors, gradients, strict=True)
                ]
            )
        flags = [b is not None for b in problem.biases]
        actual = attention.attention_jvp_backward(grad_out, grad_lse, *rest, out_t, lse_t, flags)
        return flat(actual), results

    # The most kernels of all: problems that differ in more than their sizes.
    @pytest.mark.parametrize(
        "make", [plain, causal_lower_long, mixture, masked_rows, key_bias, single_token]
    )
    def test_jvp_backward(make):
        problem = make(torch.float32)
        actual, results = jvp_backward_pair(problem, torch.float32)
        check_all(names_of(problem), actual, *results, torch.float32, 8)

    @pytest.mark.parametrize("make", [plain, causal_upper])
    def test_jvp_backward_half(make):
        problem = make(torch.float16)
        actual, results = jvp_backward_pair(problem, torch.float16)
        check_all(names_of(problem), actual, *results, torch.float16, 8)

    def test_absent_bias_tangents_are_zero():
        problem = key_bias(torch.float32)
        actual, results = jvp_backward_pair(problem, torch.float32, zero_bias_tangent=True)
        check_all(names_of(problem), actual, *results, torch.float32, 8)

    # Bit i: whether axis i of the bias is full.
    @pytest.mark.parametrize("own", [0, 2, 8, 12, 15])
    def test_bias_gradient_has_the_shape_the_bias_has(own):
        full = (2, 2, 17, 18)
        shape = [size if own >> axis & 1 else 1 for axis, size in enumerate(full)]
        problem = Problem(
            normal(2, 2, 17, 8),
            [normal(2, 2, 18, 8)],
            [normal(2, 2, 18, 8)],
            biases=[normal(*shape)],
        )
        out, lse = attention.attention_forward(*problem.arguments())
        grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
        results = []
        for precision in (torch.float64, torch.float32):
            function, tensors = problem.dense(precision)
            tensors = [t.requires_grad_() for t in tensors]
            dense_out, dense_lse = function(*tensors)
            loss = (dense_out * grad_out).sum() + (dense_lse * grad_lse).sum()
            results.append(torch.autograd.grad(loss, tensors)[-1])
        *_, (actual,) = attention.attention_backward(
            grad_out, grad_lse, *problem.arguments(), out, lse, [True]
        )
        check("dbias", actual, *results, torch.float32, 8)

    def test_no_bias_gradient_where_none_is_asked_for():
        problem = key_bias(torch.float32)
        out, lse = attention.attention_forward(*problem.arguments())
        *_, none = attention.attention_backward(
            torch.ones_like(out), None, *problem.arguments(), out, lse, [False, False]
        )
        assert none == []

    def test_expanded_gradients():
        problem = plain(torch.float32)
        out, lse = attention.attention_forward(*problem.arguments())
        one = torch.ones(())
        expanded = attention.attention_backward(
            one.expand(out.shape), one.expand(lse.shape), *problem.arguments(), out, lse, [False]
        )
        dense = attention.attention_backward(
            torch.ones_like(out), torch.ones_like(lse), *problem.arguments(), out, lse, [False]
        )
        for a, b in zip(flat(expanded), flat(dense), strict=True):
            assert torch.equal(a, b)

    def test_strides_do_not_change_results():
        problem = plain(torch.float32)
        expected = attention.attention_forward(*problem.arguments())
        for layout in (framed, packed, column_major):
            moved = Problem(
                layout(problem.query),
                [layout(t) for t in problem.keys],
                [layout(t) for t in problem.values],
            )
            for a, b in zip(attention.attention_forward(*moved.arguments()), expected, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize(("rows", "lengths"), [(0, [5]), (3, [0]), (3, [0, 0]), (0, [0])])
    def test_empty(rows, lengths):
        problem = Problem(
            normal(2, 2, rows, 8),
            [normal(2, 1, m, 8) for m in lengths],
            [normal(2, 1, m, 4) for m in lengths],
            biases=[normal(1, 2, 1, m) for m in lengths],
        )
        out, lse = attention.attention_forward(*problem.arguments())
        assert torch.equal(out, torch.zeros(2, 2, rows, 4))
        assert torch.equal(lse, torch.full((2, 2, rows), -math.inf))
        flags = [True] * len(lengths)
        given = (torch.randn_like(out), torch.randn_like(lse), *problem.arguments(), out, lse)
        shapes = [t.shape for t in problem.tensors()]
        for t, shape in zip(flat(attention.attention_backward(*given, flags)), shapes, strict=True):
            assert torch.equal(t, torch.zeros(shape))
        query_t, keys_t, values_t, biases_t = split(problem, tangents_like(problem))
        given += (query_t, keys_t, values_t, problem.expand(biases_t))
        out_t, lse_t = attention.attention_jvp(*given[2:])
        assert torch.equal(out_t, torch.zeros_like(out))
        assert torch.equal(lse_t, torch.zeros_like(lse))
        for t, shape in zip(
            flat(attention.attention_jvp_backward(*given, out_t, lse_t, flags)),
            shapes,
            strict=True,
        ):
            assert torch.equal(t, torch.zeros(shape))

    @pytest.mark.parametrize("how", ["key mask", "query mask", "causal"])
    def test_blocks_without_pairs_are_not_read(how):
        # NaN keys and values would reach the results through 0 * NaN if their block were read.
        def make(poison):
            torch.manual_seed(1)
            query, key, value = normal(1, 1, 16, 8), normal(1, 1, 48, 8), normal(1, 1, 48, 8)
            key[:, :, 16:] = poison
            value[:, :, 16:] = poison
            mask = torch.zeros(1, 1, 1 if how == "key mask" else 16, 48, dtype=torch.bool)
            mask[..., :16] = True
            causal = 1 if how == "causal" else 0
            return Problem(query, [key], [value], masks=[None if causal else mask], causal=[causal])

        results = []
        for poison in (math.nan, 1.0):
            problem = make(poison)
            out, lse = attention.attention_forward(*problem.arguments())
            given = (torch.ones_like(out), torch.ones_like(lse), *problem.arguments(), out, lse)
            dq, (dk,), (dv,), _ = attention.attention_backward(*given, [False])
            tangents = (normal(1, 1, 16, 8), [problem.keys[0]], [problem.values[0]], [None])
            out_t, lse_t = attention.attention_jvp(*given[2:], *tangents)
            gradients = attention.attention_jvp_backward(*given, *tangents, out_t, lse_t, [False])
            second_dq, (second_dk,), (second_dv,), _ = gradients
            results.append([out, lse, dq, dk, dv, out_t, lse_t, second_dq, second_dk, second_dv])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert torch.isfinite(results[0][0]).all()

    def test_runs_are_bitwise_equal():
        problem = key_bias(torch.float32)
        out, lse = attention.attention_forward(*problem.arguments())
        flags = [b is not None for b in problem.biases]
        runs = [
            flat(
                attention.attention_backward(
                    torch.ones_like(out), None, *problem.arguments(), out, lse, flags
                )
            )
            for _ in range(2)
        ]
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_table_block_sizes(monkeypatch, dtype):
        monkeypatch.delenv("TRANSFUSE_TRITON_CONFIG")
        problem = Problem(
            normal(1, 2, 70, 40, dtype=dtype),
            [normal(1, 2, 77, 40, dtype=dtype), normal(1, 2, 4, 40, dtype=dtype)],
            [normal(1, 2, 77, 40, dtype=dtype), normal(1, 2, 4, 40, dtype=dtype)],
            biases=[None, normal(1, 1, 1, 4, dtype=dtype)],
        )
        actual = attention.attention_forward(*problem.arguments())
        results = [f(*t) for f, t in (problem.dense(torch.float64), problem.dense(dtype))]
        check_all(["out", "lse"], actual, *results, dtype)
        gradients, results = jvp_backward_pair(problem, dtype)
        check_all(names_of(problem), gradients, *results, dtype, 8)

    # The fused op.

    def mix(x, other, weight, index):
        if other is None or weight is None:
            return x
        other = other if index is None else other[index]
        if isinstance(weight, torch.Tensor):
            weight = weight[..., None].to(x.dtype)
        else:
            weight = torch.tensor(weight, dtype=x.dtype)
        mixed = (1 - weight) * x + weight * other
        return torch.where(weight == 0, x, torch.where(weight == 1, other, mixed))

    def dense_fused(precision, problem, query_blend, key_blends, groups, gates):
        def cast(t):
            return t.to(precision) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

        query = mix(cast(problem.query), *(cast(t) for t in query_blend))
        keys = [
            mix(cast(key), *(cast(t) for t in blend))
            for key, blend in zip(problem.keys, key_blends, strict=True)
        ]
        total = 0.0
        for g, gate in enumerate(gates):
            members = [s for s, group in enumerate(groups) if group == g]

            def pick(items, members=members):
                return [items[s] for s in members]

            part = Problem(
                query,
                pick(keys),
                [cast(t) for t in pick(problem.values)],
                [cast(t) for t in pick(problem.biases)],
                pick(problem.masks),
                pick(problem.indices),
                pick(problem.scales),
                pick(problem.causal),
            )
            out, lse = dense_attention(part, query, part.keys, part.values, part.biases)
            if isinstance(gate, torch.Tensor):
                gate = cast(gate)[..., None]
            total = total + gate * out
        return total, lse

    def fused(problem, query_blend, key_blends, groups, gates):
        query, keys, values, *rest = problem.arguments()
        return attention.attention_fused(
            query, *query_blend, keys, values, *map(list, zip(*key_blends, strict=True)), *rest,
            groups, gates,
        )  # fmt: skip

    def check_fused(problem, query_blend, key_blends, groups, gates):
        dtype = problem.query.dtype
        out, lse = fused(problem, query_blend, key_blends, groups, gates)
        oracle, eager = (
            dense_fused(precision, problem, query_blend, key_blends, groups, gates)
            for precision in (torch.float64, dtype)
        )
        assert out.dtype == dtype
        check("out", out, oracle[0], eager[0], dtype)
        if len(gates) == 1:
            check("lse", lse, oracle[1], eager[1], dtype)

    NO_BLEND = (None, None, None)

    @by_dtype
    def test_fused_without_extras_is_forward(dtype):
        problem = mixture(dtype)
        out, lse = fused(problem, NO_BLEND, [NO_BLEND] * 4, [0] * 4, [1.0])
        expected = attention.attention_forward(*problem.arguments())
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])

    def test_wide_offsets(monkeypatch):
        huge = torch.empty_strided((1, 1, 9, 8), (0, 0, 2**27, 1), device="meta")
        assert _attention_plan.is_wide(_attention_plan.operand(huge))
        problem = key_bias(torch.float32)
        assert not _attention_plan.is_wide(*map(_attention_plan.operand, problem.keys))
        flags = [b is not None for b in problem.biases]

        def everything():
            out, lse = attention.attention_forward(*problem.arguments())
            torch.manual_seed(1)
            query_t, keys_t, values_t, biases_t = split(problem, tangents_like(problem))
            given = (torch.ones_like(out), torch.ones_like(lse), *problem.arguments(), out, lse)
            tangents = (query_t, keys_t, values_t, problem.expand(biases_t))
            out_t, lse_t = attention.attention_jvp(*given[2:], *tangents)
            first = flat(attention.attention_backward(*given, flags))
            second = flat(attention.attention_jvp_backward(*given, *tangents, out_t, lse_t, flags))
            return [out, lse, out_t, lse_t, *first, *second]

        narrow = everything()
        for module in ("forward", "backward", "jvp"):
            target = f"transfuse.triton_kernels.attention_{module}.is_wide"
            monkeypatch.setattr(target, lambda *records: True)
        for a, b in zip(everything(), narrow, strict=True):
            assert torch.equal(a, b)

    @by_dtype
    @pytest.mark.parametrize("groups", [[0, 0, 1, 1], [1, 0, 1, 0], [3, 2, 1, 0]], ids=str)
    def test_fused_groups_and_gates(groups, dtype):
        problem = mixture(dtype)
        gates = [0.7, torch.rand(2, 1, 18).expand(2, 2, 18), 0.0, torch.rand(2, 1).expand(2, 2, 18)]
        check_fused(problem, NO_BLEND, [NO_BLEND] * 4, groups, gates[: max(groups) + 1])

    @pytest.mark.parametrize("gate", [0.0, 1.0, -0.5], ids=str)
    def test_fused_one_gated_group(gate):
        check_fused(plain(torch.float32), NO_BLEND, [NO_BLEND], [0], [gate])

    def test_fused_all_groups_gated_off():
        problem = key_bias(torch.float32)
        out, _ = fused(problem, NO_BLEND, [NO_BLEND] * 2, [0, 1], [0.0, 0.0])
        assert torch.equal(out, torch.zeros_like(out))

    def test_fused_zero_gates_keep_nan_out():
        problem = Problem(
            normal(1, 2, 18, 8),
            [normal(1, 2, 20, 8), torch.full((1, 2, 7, 8), math.nan)],
            [normal(1, 2, 20, 8), torch.full((1, 2, 7, 8), math.nan)],
        )
        first = Problem(problem.query, problem.keys[:1], problem.values[:1])
        expected, _ = attention.attention_forward(*first.arguments())
        for gate in (0.0, torch.zeros(1, 1, 1).expand(1, 2, 18)):
            out, _ = fused(problem, NO_BLEND, [NO_BLEND] * 2, [0, 1], [1.0, gate])
            assert torch.equal(out, expected)

    def test_fused_many_sources_in_groups():
        problem = many_sources(torch.float32)
        groups = [0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 1]
        gates = [0.3, torch.rand(1, 2, 18), 1.0]
        check_fused(problem, NO_BLEND, [NO_BLEND] * 11, groups, gates)
        # A group that ends exactly where a launch does.
        check_fused(problem, NO_BLEND, [NO_BLEND] * 11, [0] * 8 + [1] * 3, [0.5, 2.0])

    @pytest.mark.parametrize(
        ("index", "weight", "dtype"),
        [
            (None, 0.0, torch.float32),
            (None, 0.3, torch.float32),
            (None, "tensor", torch.float16),
            ([2, 0], 1.0, torch.float16),
            ([2, 0], "tensor", torch.float32),
        ],
        ids=str,
    )
    def test_fused_query_blend(index, weight, dtype):
        problem = mixture(dtype)
        if weight == "tensor":
            weight = torch.rand(2, 1, 18)
            weight[0, :, 3:] = 0.0
            weight[1, :, ::2] = 1.0
            weight = weight.expand(2, 2, 18)
        index = None if index is None else torch.tensor(index)
        other = framed(normal(3 if index is not None else 1, 2, 18, 20, dtype=dtype))
        check_fused(problem, (other, weight, index), [NO_BLEND] * 4, [0] * 4, [1.0])

    @by_dtype
    def test_fused_key_blend(dtype):
        problem = mixture(dtype)
        blends = [
            (normal(1, 1, 33, 20, dtype=dtype), torch.rand(1, 33).expand(2, 1, 33), None),
            (framed(normal(2, 2, 5, 20, dtype=dtype)), 0.25, torch.tensor([1])),
            NO_BLEND,
            (normal(4, 1, 18, 20, dtype=dtype), torch.rand(4, 1, 18), torch.tensor([3, 2, 1, 1])),
        ]
        check_fused(problem, NO_BLEND, blends, [0, 0, 0, 0], [1.0])
        check_fused(problem, NO_BLEND, blends, [0, 1, 0, 1], [1.0, 0.5])

    @pytest.mark.parametrize("tensor", [False, True])
    @pytest.mark.parametrize("weight", [0.0, 1.0])
    def test_fused_blend_ends_are_exact(weight, tensor):
        # The side with weight 0 is NaN: it must not be mixed in, and the other is bit for bit.
        problem = plain(torch.float32)
        nothing = [torch.full_like(t, math.nan) for t in (problem.query, problem.keys[0])]
        expected, _ = attention.attention_forward(*problem.arguments())
        if weight == 0.0:
            others = nothing
        else:
            others = [problem.query, problem.keys[0]]
            problem = Problem(nothing[0], [nothing[1]], problem.values)
        weights = [weight, weight]
        if tensor:
            weights = [torch.full(t.shape[:3], weight) for t in others]
        out, _ = fused(
            problem,
            (others[0], weights[0], None),
            [(others[1], weights[1], None)],
            [0],
            [1.0],
        )
        assert torch.equal(out, expected)

    def test_gradient_of_an_expanded_bias():
        query, key, value = normal(2, 2, 3, 8), normal(2, 1, 5, 8), normal(2, 1, 5, 4)
        bias = normal(1, 2, 1, 5).requires_grad_()

        def gradient(given, backend):
            out = attend(query, KV(key, value, bias=given), backend=backend)
            return torch.autograd.grad(out.square().sum(), bias)[0]

        found = gradient(bias.expand(2, 2, 3, 5), "triton")
        torch.testing.assert_close(found, gradient(bias, "reference"), rtol=1e-4, atol=1e-5)

    # Errors.

    def test_float64_is_refused():
        problem = plain(torch.float64)
        with pytest.raises(TypeError, match=r"query.*float32, float16 and bfloat16.*float64"):
            attention.attention_forward(*problem.arguments())

    def test_mixed_dtypes_are_refused():
        problem = plain(torch.float32)
        problem.values = [problem.values[0].half()]
        with pytest.raises(TypeError, match=r"values.*float32.*float16"):
            attention.attention_forward(*problem.arguments())
        query, keys, values, biases, _, *rest = plain(torch.float32).arguments()
        mask = torch.ones(2, 2, 17, 35)
        with pytest.raises(TypeError, match=r"masks.*bool.*float32"):
            attention.attention_forward(query, keys, values, biases, [mask], *rest)

    def test_wide_head_dimensions_are_refused():
        problem = Problem(normal(1, 1, 2, 257), [normal(1, 1, 2, 257)], [normal(1, 1, 2, 4)])
        with pytest.raises(ValueError, match=r"head dimension.*256.*257"):
            attention.attention_forward(*problem.arguments())

    @pytest.mark.parametrize(
        "text",
        [
            "forward:64=64,64,4",
            "forward=64,64,4,2",
            "sideways:64=64,64,4,2",
            "forward:64=48,64,4,2",
            "forward:65=64,64,4,2",
            "forward:64:double=64,64,4,2",
            "forward:64=8,64,4,2",
            "nonsense",
        ],
    )
    def test_bad_configuration_is_refused(monkeypatch, text):
        monkeypatch.setenv("TRANSFUSE_TRITON_CONFIG", text)
        with pytest.raises(ValueError, match=r"TRANSFUSE_TRITON_CONFIG.*direction:bucket"):
            attention.attention_forward(*plain(torch.float32).arguments())

    def test_configuration_is_used(monkeypatch):
        text = "forward:64:half=32,16,2,1; dkey:64=16,32,1,1"
        monkeypatch.setenv("TRANSFUSE_TRITON_CONFIG", text)
        chosen = _attention_plan.choose("forward", torch.float16, 40, 100, 100)
        assert chosen == (32, 16, 2, 1)
        chosen = _attention_plan.choose("dkey", torch.float32, 64, 100, 100)
        assert chosen == (16, 32, 1, 1)
        table = _attention_plan.TABLE["forward"]["single"][64]
        assert _attention_plan.choose("forward", torch.float32, 64, 1000, 1000) == table

    def test_bad_precision_is_refused(monkeypatch):
        monkeypatch.setenv("TRANSFUSE_TRITON_PRECISION", "fast")
        with pytest.raises(ValueError, match=r"TRANSFUSE_TRITON_PRECISION.*ieee.*fast"):
            attention.attention_forward(*plain(torch.float32).arguments())
