"""Sketches against dense float64 covariances, also where activations are awkward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folora_q.core import CovarianceSketch, ProjectedCovariance
from tests.core import dense

D = 48
quick = settings(max_examples=25, deadline=None, derandomize=True)


def tokens(n: int = 400, d: int = D, decay: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Rows whose covariance has eigenvalues that fall over `decay` decades, in a random frame."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -decay / 2, d, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * scales) @ frame.T


def sketched(x: torch.Tensor, rank: int = 12, **kwargs) -> CovarianceSketch:
    sketch = CovarianceSketch(x.shape[-1], rank, **kwargs)
    sketch.update(x)
    return sketch


def close(found: torch.Tensor, expected: np.ndarray | torch.Tensor, tolerance: float = 1e-5) -> bool:
    expected = torch.as_tensor(expected)
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize(("rank", "oversampling"), [(D, 0), (D, 16), (2 * D, 0)])
def test_with_as_many_columns_as_dimensions_it_is_exact(rank: int, oversampling: int) -> None:
    x = tokens()
    found = sketched(x, rank, oversampling=oversampling).covariance()
    assert close(found.dense(), dense.covariance(x))
    assert found.tail == 0.0
    assert found.captured == pytest.approx(1.0, abs=1e-6)


@given(seed=st.integers(0, 99), rank=st.integers(1, 24), decay=st.floats(1, 6))
@quick
def test_the_nystrom_error_is_within_its_bound(seed: int, rank: int, decay: float) -> None:
    """Tropp et al. 2017, Theorem 4.1 with a target rank ρ < l - 1: E||Σ - Σ̂||₁ <= (1 + ρ / (l - ρ - 1)) Σ_{i>ρ} λᵢ.

    The bound is on a mean over Ω; one draw is given twice as much. ρ is the best below l - 1.
    """
    x = tokens(decay=decay, seed=seed)
    sketch = CovarianceSketch(D, rank, oversampling=8, seed=seed)
    sketch.update(x)
    found = sketch.covariance()
    sigma = dense.covariance(x)
    eigenvalues = np.linalg.eigvalsh(sigma)[::-1]
    columns = sketch.columns
    # `covariance` cuts l columns to rank k, which costs what the best rank-k approximation costs at most.
    bound = min((1 + r / (columns - r - 1)) * eigenvalues[r:].sum() for r in range(columns - 1))
    low_rank = (found.basis * found.eigenvalues) @ found.basis.T
    error = np.abs(np.linalg.eigvalsh(sigma - low_rank.numpy())).sum()
    assert error <= 2 * bound + eigenvalues[rank:].sum() + 1e-6 * eigenvalues.sum()


@given(seed=st.integers(0, 99), rank=st.integers(1, 60), n=st.integers(1, 100))
@quick
def test_what_a_covariance_always_is(seed: int, rank: int, n: int) -> None:
    x = tokens(n, seed=seed)
    found = sketched(x, rank, oversampling=4).covariance()
    true = np.linalg.eigvalsh(dense.covariance(x))[::-1]
    k = found.basis.shape[1]
    assert k == min(rank, D)
    assert torch.allclose(found.basis.T @ found.basis, torch.eye(k, dtype=torch.float64), atol=1e-10)
    assert bool((found.eigenvalues >= 0).all()) and bool((found.eigenvalues.diff() <= 0).all())
    assert np.all(found.eigenvalues.numpy() <= true[:k] + 1e-5 * true[0]), "Nyström never overestimates"
    assert found.trace == pytest.approx(float(x.square().sum() / n))
    assert float(found.eigenvalues.sum()) + found.tail * (D - k) == pytest.approx(found.trace, rel=1e-5)
    assert found.count == n


def test_merged_sketches_are_the_sketch_of_all_tokens() -> None:
    x = tokens()
    whole, left, right = sketched(x), sketched(x[:150]), sketched(x[150:])
    left.merge(right)
    assert torch.allclose(left.product, whole.product, rtol=1e-4, atol=1e-4)
    assert left.count == whole.count == 400
    assert left.energy == pytest.approx(whole.energy)
    assert close(left.covariance().dense(), whole.covariance().dense())
    batched = CovarianceSketch(D, 12)
    batched.update(x.reshape(4, 100, D))
    assert close(batched.covariance().dense(), whole.covariance().dense())


@pytest.mark.parametrize("other", [(D + 1, 12, 16, 0), (D, 11, 16, 0), (D, 12, 15, 0), (D, 12, 16, 1)])
def test_sketches_that_do_not_add_up_are_not_merged(other: tuple[int, int, int, int]) -> None:
    sketch = sketched(tokens())
    before = sketch.product.clone()
    with pytest.raises(ValueError, match="cannot merge"):
        sketch.merge(CovarianceSketch(other[0], other[1], oversampling=other[2], seed=other[3]))
    assert torch.equal(sketch.product, before)


def test_masked_rows_do_not_count_whatever_they_hold() -> None:
    x = tokens(60).reshape(3, 20, D).clone()
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, 15:] = mask[2, 5:] = False
    expected = dense.covariance(x[mask])
    x[~mask] = float("nan")
    for accumulator, read in (
        (CovarianceSketch(D, D), lambda s: s.covariance().dense()),
        (ProjectedCovariance(torch.eye(D)), lambda s: s.mean()),
    ):
        accumulator.update(x, mask)
        assert accumulator.count == 40
        assert close(read(accumulator), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "make", [lambda: sketched(tokens()), lambda: projected(tokens())], ids=["sketch", "projection"]
)
def test_what_is_not_finite_is_refused_and_nothing_is_added(bad: float, make) -> None:
    accumulator = make()
    sums = [value.clone() for value in vars(accumulator).values() if isinstance(value, torch.Tensor)]
    energy, count = accumulator.energy, accumulator.count
    x = tokens(10)
    x[3, 7] = bad
    with pytest.raises(ValueError, match="hold a NaN or an infinity"):
        accumulator.update(x)
    assert all(
        torch.equal(a, b)
        for a, b in zip(sums, (v for v in vars(accumulator).values() if isinstance(v, torch.Tensor)), strict=True)
    )
    assert (accumulator.energy, accumulator.count) == (energy, count)


def projected(x: torch.Tensor, m: int = 7) -> ProjectedCovariance:
    projection = ProjectedCovariance(torch.linalg.qr(tokens(m, seed=9).T).Q)
    projection.update(x)
    return projection


def test_a_projection_is_the_exact_image() -> None:
    x = tokens()
    projection = projected(x)
    p0 = projection.basis.double().numpy()
    assert close(projection.mean(), p0.T @ dense.covariance(x) @ p0)


def test_wrong_widths_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=f"width {D}, got shape"):
        CovarianceSketch(D, 4).update(torch.zeros(3, D + 1))
    for arguments in ((0, 1), (4, 0), (4, 1, -1)):
        with pytest.raises(ValueError, match="need dim >= 1"):
            CovarianceSketch(*arguments)
    for nothing in (CovarianceSketch(D, 4).covariance, ProjectedCovariance(torch.eye(D)).mean):
        with pytest.raises(ValueError, match="at least one token"):
            nothing()


def test_fewer_tokens_than_dimensions() -> None:
    x = tokens(5)
    found = sketched(x, 12).covariance()
    assert close(found.dense(), dense.covariance(x))
    assert found.tail == pytest.approx(0.0, abs=1e-6 * found.trace)
    assert float(found.eigenvalues[5:].max()) <= 1e-6 * found.trace


def test_a_channel_that_is_always_zero_and_input_that_is_all_zero() -> None:
    x = tokens()
    x[:, 3] = 0
    found = sketched(x, D).covariance()
    assert close(found.dense(), dense.covariance(x))
    assert float(found.dense()[3].abs().max()) <= 1e-6 * found.trace
    nothing = sketched(torch.zeros(10, D), 4).covariance()
    assert (nothing.trace, nothing.tail, nothing.captured) == (0.0, 0.0, 1.0)
    assert float(nothing.dense().abs().max()) < 1e-30


def test_one_channel_ten_thousand_times_the_others() -> None:
    """Real models have them at the first token: a variance 1e8 times the rest's, at the edge of float32."""
    x = tokens(decay=0.5)
    x[:, 5] *= 1e4
    sigma = dense.covariance(x)
    for dtype, tolerance in ((torch.float32, 0.2), (torch.float64, 1e-6)):
        found = sketched(x, D, dtype=dtype).covariance()
        others = [i for i in range(D) if i != 5]
        assert float(found.dense()[5, 5]) == pytest.approx(sigma[5, 5], rel=1e-5)
        block = found.dense()[others][:, others] - torch.diag(torch.full((D - 1,), found.tail, dtype=torch.float64))
        assert close(block, sigma[np.ix_(others, others)], tolerance)
    first = sketched(x, 8).covariance()
    assert abs(float(first.basis[5, 0])) == pytest.approx(1.0, abs=1e-5)
    assert first.trace == pytest.approx(float(np.trace(sigma)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_summed_in_full(dtype: torch.dtype) -> None:
    x = tokens(4000).to(dtype)
    assert close(sketched(x, D).covariance().dense(), dense.covariance(x.double()))


def test_products_are_full_float32_whatever_the_process_prefers() -> None:
    x = tokens().float()
    expected = sketched(x).product
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sketched(x).product, expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_test_matrix_serves_a_width_and_is_orthonormal() -> None:
    one, two, other = CovarianceSketch(D, 8), CovarianceSketch(D, 8), CovarianceSketch(D, 8, seed=1)
    assert one.test_matrix is two.test_matrix
    assert not torch.equal(one.test_matrix, other.test_matrix)
    assert torch.allclose(one.test_matrix.T @ one.test_matrix, torch.eye(one.columns), atol=1e-5)
    assert one.product.numel() == D * math.ceil(8 + 16), "d x l numbers, not d x d"
