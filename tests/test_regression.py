"""regression.py against numpy.polyfit, one output at a time."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimllm_nb import heads, regression


def case(seed: int, tokens=80, hidden=6):
    g = torch.Generator().manual_seed(seed)
    full = torch.randn(tokens, hidden, generator=g) * torch.logspace(-2, 2, hidden) + torch.linspace(-50, 50, hidden)
    return 0.7 * full + 0.5 * torch.randn(tokens, hidden, generator=g) - 1, full


@pytest.mark.parametrize("seed", range(5))
def test_fit_equals_polyfit(seed):
    kept, full = case(seed)
    scale, shift = regression.fit(kept, full)
    for j in range(full.shape[1]):
        slope, intercept = np.polyfit(kept[:, j].double().numpy(), full[:, j].double().numpy(), 1)
        assert scale[j].item() == pytest.approx(slope, rel=1e-8)
        assert shift[j].item() == pytest.approx(intercept, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_relative_error_is_the_ratio_of_norms(seed):
    kept, full = (t.double() for t in case(seed))
    m = regression.moments([(kept, full)])
    scale, shift = regression.fit_moments(m)
    assert regression.relative_error(m) == pytest.approx(((kept - full).norm() / full.norm()).item(), rel=1e-9)
    after = ((scale * kept + shift - full).norm() / full.norm()).item()
    assert regression.relative_error(m, scale, shift) == pytest.approx(after, rel=1e-7)
    assert after < regression.relative_error(m)


def test_toy_answer():
    scale, shift = regression.fit(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[5.0], [7.0], [9.0]]))
    assert (scale.item(), shift.item()) == pytest.approx((2.0, 3.0))


def test_an_output_that_does_not_vary_keeps_scale_one():
    kept = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    full = torch.tensor([[1.0, 1.0], [2.0, 2.0], [6.0, 4.0]])
    scale, shift = regression.fit(kept, full)
    assert scale.tolist() == pytest.approx([1.0, 1.0])
    assert shift.tolist() == pytest.approx([3.0 - 0.1, 0.0], abs=1e-7)


def test_what_cancelled_gets_no_scale_from_rounding():
    """Two heads that undo each other in one output leave noise around 0, of which no scale can be made."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(200, 2, generator=generator).double()
    kept = torch.stack([full[:, 0], 1e-9 * torch.randn(200, generator=generator).double()], dim=1)
    assert regression.fit(kept, full)[0].tolist() == pytest.approx([1.0, 1.0])
    # The same floor decides in the similarity: what does not vary counts as 0.
    covariance = torch.stack([torch.eye(2), torch.tensor([[1e-14, 0], [0, 1.0]])]).double()
    assert heads.similarity(covariance, torch.tensor([0])).item() == pytest.approx(0.5**0.5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), a=st.floats(0.1, 10), b=st.floats(-10, 10))
def test_laws(seed, a, b):
    kept, full = (t.double() for t in case(seed))
    scale, shift = regression.fit(kept, full)
    # Identical outputs need nothing; an affine change of the kept output is undone.
    same_scale, same_shift = regression.fit(full, full)
    assert same_scale.tolist() == [1.0] * 6 and same_shift.tolist() == [0.0] * 6
    torch.testing.assert_close(regression.fit(a * full + b, full)[0], torch.full((6,), 1 / a).double())
    # Any other scale or shift is worse.
    error = (scale * kept + shift - full).square().sum()
    for ds, db in [(1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)]:
        assert ((scale + ds) * kept + shift + db - full).square().sum() > error


def test_moments_in_batches_are_those_of_all_tokens(generator):
    inputs = torch.randn(30, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double() + 50
    full_weight, columns = torch.randn(4, 6, generator=generator).double(), torch.tensor([0, 2, 5])
    kept_weight = full_weight[:, columns] * 1.5
    kept, full = inputs[:, columns] @ kept_weight.T, inputs @ full_weight.T
    expected = asdict(regression.moments([(kept, full)]))
    np.testing.assert_allclose(
        expected["cov"], [np.cov(a, b, bias=True)[0, 1] for a, b in zip(kept.T, full.T, strict=True)]
    )
    batches = regression.moments(zip(kept.split(7), full.split(7), strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(asdict(batches)[name], value, rtol=1e-9, atol=1e-9)
