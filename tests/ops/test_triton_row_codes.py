"""The Triton kernel of row codes under Triton's interpreter: the bits of the CPU's.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton.
"""

import pytest
import torch

from transfuse.ops import row_codes, row_groups
from transfuse.testing import inputs
from transfuse.testing.children import INTERPRETED, run_under_interpreter

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernel_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 10

else:
    from transfuse.triton_kernels import row_codes as kernels

    @pytest.fixture(autouse=True)
    def few_programs(monkeypatch):
        """The interpreter runs one after the other."""
        monkeypatch.setattr(kernels, "PROGRAMS", 2)

    def _rand(*shape, seed=0):
        return 0.6 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def _same(x, edges, wrap):
        one, two = (row_codes(x, edges, wrap=wrap, backend=b) for b in ("triton", "reference"))
        assert torch.equal(one.codes, two.codes)
        assert one.below == two.below

    DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    SHAPES = ((0, 3), (5, 0), (1, 1), (37, 7), (5, 130), (40, 1))

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [(shape, DTYPES[0]) for shape in SHAPES] + [((37, 7), dtype) for dtype in DTYPES[1:]],
    )
    def test_the_bits_of_the_definition(shape, dtype):
        x = _rand(*shape).to(dtype)
        for edges in (None, torch.linspace(-1, 1, 30), torch.zeros(1)):
            _same(x, edges, edges is not None and len(edges) > 1)

    @pytest.mark.parametrize("wrap", [False, True])
    def test_edges(wrap):
        """On edges, on repeated ones, beyond both ends, and infinities."""
        edges = torch.tensor([-1.0, -1.0, 0.0, 0.25, 0.25, 0.25, 1.0])
        x = torch.cat((edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(-edges - 9)))
        x = torch.cat((x, torch.tensor([-0.0, torch.inf, -torch.inf, 1e30, 1e-45])))[:, None]
        _same(x, edges, wrap)
        _same(x, torch.linspace(-1, 1, 257), wrap)
        _same(x, None, wrap)
        found = row_codes(x, edges, wrap=wrap, backend="triton")
        assert found.below == int((x < -1).sum())

    def test_strides():
        x, edges = _rand(10, 9), torch.linspace(-1, 1, 30)
        plain = row_codes(x, edges, backend="triton").codes
        for kind in inputs.STRIDES[:4]:
            strided = inputs.strided(x, kind)
            assert torch.equal(row_codes(strided, edges, backend="triton").codes, plain)

    def test_negated_view():
        x = torch.complex(_rand(9, 4), _rand(9, 4, seed=1)).conj().imag
        assert x.is_neg()
        _same(x, None, False)

    def test_groups():
        x = _rand(30, 3).round()
        one, two = (row_groups(x, backend=b) for b in ("triton", "cpu"))
        assert 1 < len(two.counts) < 30
        assert torch.equal(one.group, two.group)
        assert torch.equal(one.counts, two.counts)

    def test_refused():
        with pytest.raises(ValueError, match="got 2 NaN"):
            row_codes(torch.tensor([[1.0, torch.nan, torch.nan]]), backend="triton")
        with pytest.raises(ValueError, match="got 1 NaN"):
            row_codes(torch.tensor([[torch.nan]]), torch.zeros(1), backend="triton")
