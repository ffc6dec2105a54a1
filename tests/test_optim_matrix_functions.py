"""Newton–Schulz against the singular value decomposition."""

import math

import pytest
import torch

from nanorun.optim.matrix_functions import newton_schulz, shape_groups, stack_by_shape

SHAPES = {
    "wide": (3, 16, 64),
    "tall": (3, 64, 16),
    "square": (3, 32, 32),
    "row": (2, 1, 8),
    "column": (2, 8, 1),
}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_newton_schulz(grad, steps=5):
    """One matrix at a time, as the algorithm is written down."""
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stack_matches_one_matrix_at_a_time(shape):
    grad_KMN = randn(*shape, dtype=torch.float64)
    expected = torch.stack([plain_newton_schulz(grad) for grad in grad_KMN])
    torch.testing.assert_close(newton_schulz(grad_KMN), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_vectors_stay_and_values_enter_the_measured_range(shape, dtype):
    grad_KMN = randn(*shape, dtype=dtype)
    u, s, vh = torch.linalg.svd(grad_KMN, full_matrices=False)
    inner = u.mT @ newton_schulz(grad_KMN) @ vh.mT
    diagonal = torch.diagonal(inner, dim1=1, dim2=2)
    large = s / torch.linalg.vector_norm(s, dim=1, keepdim=True) >= 0.002
    assert large.any()
    assert diagonal[large].min() > 0.68
    assert diagonal.max() < 1.21
    off_diagonal = inner - torch.diag_embed(diagonal)
    assert off_diagonal.abs().max() < 1e-4


@pytest.mark.parametrize("condition", [1e2, 1e8])
@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (32, 64)])
def test_runs_of_steps_lose_no_precision(shape, condition):
    grad = randn(*shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(grad, full_matrices=False)
    grad = (u * torch.logspace(0, -math.log10(condition), len(s), dtype=torch.float64)) @ vh
    exact = plain_newton_schulz(grad)
    one_at_a_time = (plain_newton_schulz(grad.float()) - exact).norm() / exact.norm()
    in_runs = (newton_schulz(grad.float()[None])[0] - exact).norm() / exact.norm()
    assert in_runs < 2 * one_at_a_time + 1e-6
    assert in_runs < 2e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7])
def test_any_number_of_steps_is_taken_exactly(steps):
    for shape in ((8, 24), (24, 8), (8, 8)):
        grad = randn(*shape, dtype=torch.float64)
        expected = plain_newton_schulz(grad, steps)
        torch.testing.assert_close(newton_schulz(grad[None], steps=steps)[0], expected, rtol=1e-9, atol=1e-11)


def test_measured_range_is_that_of_the_docstring():
    sigma = torch.logspace(-8, 0, 100_001, dtype=torch.float64)
    y = sigma.clone()
    for _ in range(5):
        y = 3.4445 * y - 4.7750 * y**3 + 2.0315 * y**5
    assert 0.68 < y[sigma >= 0.002].min() < 0.69
    assert 1.20 < y.max() < 1.21
    assert (y / sigma).max() < 485


def test_rank_deficient_matrix_keeps_its_null_space():
    grad_KMN = randn(2, 24, 3, seed=1, dtype=torch.float64) @ randn(2, 3, 40, seed=2, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(grad_KMN)
    inner = u.mT @ newton_schulz(grad_KMN) @ vh.mT
    kept = torch.diagonal(inner[:, :3, :3], dim1=1, dim2=2)
    assert kept.min() > 0.68
    assert kept.max() < 1.21
    assert inner[:, 3:].abs().max() < 1e-8
    assert inner[:, :, 3:].abs().max() < 1e-8


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e-3, 1e10, 1e30])
def test_scale_of_the_matrix_does_not_matter(scale):
    grad_KMN = randn(2, 16, 24)
    torch.testing.assert_close(newton_schulz(grad_KMN * scale), newton_schulz(grad_KMN), rtol=1e-3, atol=1e-4)


def test_badly_scaled_rows_and_columns_stay_bounded():
    rows = torch.logspace(-12, 12, 16)[:, None]
    for grad in (randn(16, 48) * rows, (randn(16, 48) * rows).T):
        result = newton_schulz(grad[None])
        assert result.isfinite().all()
        assert torch.linalg.svdvals(result).max() < 1.21


def test_zero_matrix_stays_zero_beside_another():
    grad_KMN = torch.stack([torch.zeros(8, 12), randn(8, 12)])
    result = newton_schulz(grad_KMN)
    assert torch.equal(result[0], torch.zeros(8, 12))
    assert torch.linalg.svdvals(result[1]).min() > 0.68
    assert torch.equal(newton_schulz(torch.zeros(1, 4, 4), eps=0.0), torch.zeros(1, 4, 4))


def test_one_matrix_that_is_not_finite_leaves_the_others_alone():
    grad_KMN = randn(3, 8, 8)
    alone = newton_schulz(grad_KMN)
    grad_KMN[1, 2, 3] = float("nan")
    result = newton_schulz(grad_KMN)
    assert torch.equal(result[[0, 2]], alone[[0, 2]])
    assert result[1].isnan().any()


def test_input_is_not_written_to():
    for shape in ((2, 8, 16), (2, 16, 8)):
        grad_KMN = randn(*shape)
        before = grad_KMN.clone()
        newton_schulz(grad_KMN)
        assert torch.equal(grad_KMN, before)


def test_overwriting_the_input_changes_no_bit_of_the_result():
    grad_KMN = randn(2, 8, 16)
    assert torch.equal(newton_schulz(grad_KMN.clone(), overwrite=True), newton_schulz(grad_KMN))


def test_result_has_the_dtype_of_the_input_and_bf16_products_are_near():
    grad_KMN = randn(2, 8, 16)
    assert newton_schulz(grad_KMN.bfloat16()).dtype == torch.bfloat16
    low = newton_schulz(grad_KMN, dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    assert (low - newton_schulz(grad_KMN)).abs().max() < 0.05


def test_stacks_hold_each_matrix_once_with_its_index():
    matrices = [randn(2, 3), randn(3, 2), randn(2, 3, seed=1), randn(2, 3).double()]
    assert shape_groups(matrices) == [[0, 2], [1], [3]]
    for indices, stack_KMN in stack_by_shape(matrices):
        for index, matrix in zip(indices, stack_KMN, strict=True):
            assert torch.equal(matrix, matrices[index])
