"""Newton–Schulz against the singular value decomposition, and its coefficients against the papers."""

import functools
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorun.optim import matrix_functions
from nanorun.optim.matrix_functions import (
    COEFFICIENTS,
    MINIMAX,
    MINIMAX_AFTER_RESCALING,
    CoefficientSet,
    newton_schulz,
    newton_schulz_cost,
    shape_groups,
    stack_by_shape,
)

SHAPES = {
    "wide": (3, 16, 64),
    "tall": (3, 64, 16),
    "square": (3, 32, 32),
    "row": (2, 1, 8),
    "column": (2, 8, 1),
}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


RANGES = {
    "original": (0.002, 0.68, 1.21, 485),
    "polar_express": (0.002, 0.87, 1.13, 967),
    "turbo": (0.01, 0.97, 1.15, 121),
    "schatten": (0.02, 0.99, 1.01, 104),
}
"""Of newton_schulz's docstring: the smallest share, the range it ends in, and the growth of smaller ones."""

YOU = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]

every_set = pytest.mark.parametrize("name", RANGES)


def best_quintic(low, high):
    """Return the odd quintic nearest to 1 on an interval, by Remez's exchange, and its largest error there."""
    points = np.linspace(low, high, 4)
    for _ in range(50):
        powers = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(powers, np.ones(4))
        extrema = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        points = np.array([low, *extrema, high])
    return (a, b, c), abs(error)


def value(polynomial, x):
    a, b, c = polynomial
    return a * x + b * x**3 + c * x**5


@functools.cache
def minimax_polynomials(low=1e-3, count=7, cushion=0.02407327424182761):
    """Return polynomials with each one's interval and error; Polar Express's first seven, as its paper has them.

    The cushion, the paper's figure, keeps an interval from being so long that p(x)/x comes near 0 inside.
    """
    high, found = 1.0, []
    for _ in range(count):
        start = max(low, cushion * high)
        polynomial, error = best_quintic(start, high)
        # Under a cushion the values at both ends are brought to the same distance from 1.
        center = (value(polynomial, low) + value(polynomial, high)) / 2 if start > low else 1.0
        found.append((tuple(k / center for k in polynomial), (start, high), error, center))
        low = value(found[-1][0], low)
        high = 2 - low
    return found


def plain_polynomials(name, steps):
    """Return the polynomials of that many steps as each set's source has them."""
    if name == "original":
        return [(3.4445, -4.7750, 2.0315)] * steps
    if name == "turbo":
        return (YOU[1:] + [YOU[-1]] * steps)[: steps - 1]
    if name == "schatten":
        found = [polynomial for polynomial, *_ in minimax_polynomials(0.02, 3, 0.0)]
        return (found + [(1.875, -1.25, 0.375)] * steps)[: steps - 1]
    raw = [polynomial for polynomial, *_ in minimax_polynomials()]
    return ([(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in raw] + [(1.875, -1.25, 0.375)] * steps)[
        :steps
    ]


def plain_start(name, grad):
    """Return what the first polynomial is applied to."""
    if name == "turbo":
        rows = grad.size(0) <= grad.size(1)
        gram = grad @ grad.T if rows else grad.T @ grad
        scale = gram.abs().sum(1).rsqrt().nan_to_num(posinf=0.0)
        return scale[:, None] * grad if rows else grad * scale
    if name == "schatten":
        return grad / torch.linalg.svdvals(grad / grad.norm()).pow(8).sum().pow(1 / 8) / grad.norm()
    return grad / grad.norm() / (1.01 if name == "polar_express" else 1.0)


def plain_newton_schulz(grad, name="original", steps=5):
    """One matrix at a time, as the algorithm is written down."""
    x = plain_start(name, grad)
    x = x.T if grad.size(0) > grad.size(1) else x
    for a, b, c in plain_polynomials(name, steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x


def ours(grad, name, **options):
    return newton_schulz(grad[None], coefficients=COEFFICIENTS[name], **options)[0]


def uv(grad):
    """Return UVᵀ over the singular values that are not zero."""
    u, s, vh = torch.linalg.svd(grad, full_matrices=False)
    kept = s > 1e-10 * s[0]
    return u[:, kept] @ vh[kept]


def with_singular_values(sigma, rows, cols, seed=0):
    u, _, vh = torch.linalg.svd(randn(rows, cols, dtype=torch.float64, seed=seed), full_matrices=False)
    return (u * sigma) @ vh


def test_minimax_coefficients_equioscillate_and_are_the_papers():
    # The reference: Remez's exchange. By Chebyshev's theorem a polynomial of three coefficients whose error takes
    # its largest size four times with alternating signs, and is nowhere larger, is the best one.
    found, after_rescaling = minimax_polynomials(), minimax_polynomials(0.02, 3, 0.0)
    assert len(MINIMAX) == len(found) + 1
    listed_and_found = [
        *zip(MINIMAX[:-1], found, strict=True),
        *zip(MINIMAX_AFTER_RESCALING[:-1], after_rescaling, strict=True),
    ]
    for listed, (polynomial, (low, high), error, center) in listed_and_found:
        np.testing.assert_allclose(listed, polynomial, rtol=1e-8)
        wrong = 1 - center * value(polynomial, np.linspace(low, high, 10_001))
        assert np.abs(wrong).max() < error + 1e-13
        signs = [sign for sign in np.sign(wrong) * (np.abs(wrong) > 0.999 * error - 1e-13) if sign]
        assert 1 + np.count_nonzero(np.diff(signs)) == 4
    # Where the interval shrinks to 1, the best polynomial is Newton–Schulz's own, of contact 3 at 1.
    assert MINIMAX[-1] == (15 / 8, -10 / 8, 3 / 8)


@every_set
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stack_matches_one_matrix_at_a_time(shape, name):
    grad_KMN = randn(*shape, dtype=torch.float64)
    expected = torch.stack([plain_newton_schulz(grad, name) for grad in grad_KMN])
    result = newton_schulz(grad_KMN, coefficients=COEFFICIENTS[name])
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32), (1, 8), (8, 1)])
def test_singular_vectors_stay_and_values_enter_the_measured_range(shape, dtype, name):
    grad = randn(*shape, dtype=dtype)
    share, lowest, highest, _ = RANGES[name]
    u, s, vh = torch.linalg.svd(plain_start(name, grad), full_matrices=False)
    inner = u.T @ ours(grad, name) @ vh.T
    diagonal = inner.diagonal()
    large = s >= share
    assert large.any()
    assert diagonal[large].min() > lowest
    assert diagonal.max() < highest
    assert (inner - torch.diag(diagonal)).abs().max() < 1e-4


@every_set
def test_measured_range_is_that_of_the_docstring(name):
    share, lowest, highest, growth = RANGES[name]
    sigma = torch.logspace(-8, 0, 100_001, dtype=torch.float64)
    y = sigma
    for polynomial in COEFFICIENTS[name].for_steps(5):
        y = value(polynomial, y)
    assert lowest < y[sigma >= share].min() < lowest + 0.01
    assert highest - 0.01 < y.max() < highest
    assert growth - 1 < (y / sigma).max() < growth


@every_set
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(
    ("shape", "distances"),
    [
        ((128, 512), (0.24, 0.12, 0.03, 0.01)),
        ((512, 128), (0.24, 0.12, 0.03, 0.01)),
        ((128, 128), (0.24, 0.12, 0.15, 0.12)),
        ((32, 32), (0.24, 0.12, 0.15, 0.12)),
    ],
)
def test_distance_from_the_svds_uv_is_that_of_the_docstring(shape, distances, scale, name):
    grad = randn(*shape) * scale
    assert grad.isfinite().all()
    expected = uv(grad.double())
    distance = (ours(grad, name).double() - expected).norm() / expected.norm()
    assert distance < distances[list(RANGES).index(name)]
    # A matrix brought to its norm alone is not near: the bound says something.
    assert (grad.double() / grad.double().norm() - expected).norm() / expected.norm() > 0.8


def test_turbo_is_near_uv_of_the_rescaled_matrix_where_that_is_another():
    grad = with_singular_values(1 / torch.arange(1, 129, dtype=torch.float64), 128, 512)
    assert 0.1 < (ours(grad, "turbo") - uv(grad)).norm() / uv(grad).norm() < 0.2
    rows = randn(64, 256, dtype=torch.float64) * torch.logspace(-6, 6, 64, dtype=torch.float64)[:, None]
    assert (ours(rows, "turbo") - uv(rows)).norm() / uv(rows).norm() > 0.5
    for one in (grad, randn(64, 256, dtype=torch.float64) * torch.logspace(-1, 1, 64).double()[:, None]):
        rescaled = uv(plain_start("turbo", one))
        assert (ours(one, "turbo") - rescaled).norm() / rescaled.norm() < 0.1


@pytest.mark.parametrize("kind", ["gaussian", "falling", "one row leads", "rank one and noise", "parallel"])
@pytest.mark.parametrize("shape", [(128, 128), (128, 256), (256, 128)])
def test_rescaling_keeps_singular_values_below_1_and_leaves_large_shares_large(shape, kind):
    grad = randn(*shape, dtype=torch.float64)
    if kind == "falling":
        grad = with_singular_values(torch.logspace(0, -3, 128, dtype=torch.float64), *shape)
    elif kind == "one row leads":
        grad[:, 0] *= 1e3
        grad[0] *= 1e3
    elif kind == "rank one and noise":
        grad = torch.outer(grad[:, 0], grad[0]) + 0.05 * randn(*shape, dtype=torch.float64, seed=1)
    elif kind == "parallel":
        # Near the worst case of the bound: one long row, the others short, all in one direction.
        lengths = torch.ones(shape[0], 1, dtype=torch.float64)
        lengths[0] = 1 + math.sqrt(128)
        grad = lengths * torch.ones(shape, dtype=torch.float64) + 0.1 * grad
    sigma = torch.linalg.svdvals(grad)
    share = sigma / sigma.norm()
    start = torch.linalg.svdvals(plain_start("turbo", grad))
    assert start.max() <= 1 + 1e-12
    bound = math.sqrt(2 / (1 + math.sqrt(128)))
    assert 0.40 < bound < 0.41
    assert (start >= bound * share).all()
    result = torch.linalg.svdvals(ours(grad, "turbo"))
    inside = ((result > 0.97) & (result < 1.15)).sum()
    assert inside >= (share >= 0.01 / bound).sum() >= 1
    assert result.max() < 1.15


def test_rescaling_leaves_three_times_the_share_of_square_gaussian_matrices():
    grad = randn(128, 128, dtype=torch.float64)
    share = torch.linalg.svdvals(grad) / grad.norm()
    ratio = torch.linalg.svdvals(plain_start("turbo", grad)) / share
    assert ratio.min() > 3
    assert ratio.max() < 4


@every_set
@pytest.mark.parametrize("condition", [1e2, 1e8])
@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (32, 64)])
def test_runs_of_steps_lose_no_precision(shape, condition, name):
    sigma = torch.logspace(0, -math.log10(condition), min(shape), dtype=torch.float64)
    grad = with_singular_values(sigma, *shape)
    exact = plain_newton_schulz(grad, name)
    one_at_a_time = (plain_newton_schulz(grad.float(), name) - exact).norm() / exact.norm()
    in_runs = (ours(grad.float(), name) - exact).norm() / exact.norm()
    slack = {"polar_express": 2e-5, "schatten": 1e-5}.get(name, 4e-6)
    assert in_runs < 2 * one_at_a_time + slack
    assert in_runs < (6e-5 if name == "polar_express" else 2e-5)


@every_set
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 10])
def test_any_number_of_steps_is_taken_exactly(steps, name):
    for shape in ((8, 24), (24, 8), (8, 8)):
        grad = randn(*shape, dtype=torch.float64)
        expected = plain_newton_schulz(grad, name, steps)
        torch.testing.assert_close(ours(grad, name, steps=steps), expected, rtol=1e-9, atol=1e-11)


def test_set_repeats_its_last_polynomial_and_takes_its_first_ones():
    one, two = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    assert CoefficientSet((one, two)).for_steps(1) == (one,)
    assert CoefficientSet((one, two)).for_steps(4) == (one, two, two, two)
    assert CoefficientSet((one, two), rescaled="rows").for_steps(1) == ()
    assert CoefficientSet((one, two), rescaled="rows").for_steps(4) == (one, two, two)


@every_set
def test_rank_deficient_matrix_keeps_its_null_space(name):
    grad = randn(24, 3, seed=1, dtype=torch.float64) @ randn(3, 40, seed=2, dtype=torch.float64)
    share, lowest, highest, _ = RANGES[name]
    u, s, vh = torch.linalg.svd(plain_start(name, grad))
    assert s[2] > share
    inner = u.T @ ours(grad, name) @ vh.T
    kept = inner.diagonal()[:3]
    assert kept.min() > lowest
    assert kept.max() < highest
    assert inner[3:].abs().max() < 1e-8
    assert inner[:, 3:].abs().max() < 1e-8


@every_set
@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-3, 1e10, 1e20, 1e30])
def test_scale_of_the_matrix_does_not_matter(scale, name):
    grad = randn(16, 24)
    torch.testing.assert_close(ours(grad * scale, name), ours(grad, name), rtol=1e-3, atol=1e-4)


@every_set
def test_badly_scaled_rows_and_columns_stay_bounded(name):
    share, lowest, highest, _ = RANGES[name]
    scales = torch.logspace(-12, 12, 16)[:, None]
    for shape in ((16, 48), (16, 16)):
        for grad in (randn(*shape) * scales, (randn(*shape) * scales).T):
            result = ours(grad, name)
            assert result.isfinite().all()
            sigma = torch.linalg.svdvals(result)
            assert sigma.max() < highest
            large = torch.linalg.svdvals(plain_start(name, grad.double())) >= share
            assert large.any()
            assert (sigma > lowest).sum() >= large.sum()


@every_set
def test_norm_below_eps_counts_as_noise_and_shrinks_with_it(name):
    grad = randn(8, 12)
    grad /= grad.norm()
    small = ours(1e-8 * grad, name, eps=1e-3)
    assert small.norm() < 1e-5 * 967
    assert ours(2e-8 * grad, name, eps=1e-3).norm() == pytest.approx(2 * small.norm().item(), rel=1e-3)


@every_set
def test_zero_matrix_stays_zero_beside_another(name):
    coefficients = COEFFICIENTS[name]
    grad_KMN = torch.stack([torch.zeros(8, 12), randn(8, 12)])
    result = newton_schulz(grad_KMN, coefficients=coefficients)
    assert torch.equal(result[0], torch.zeros(8, 12))
    assert torch.linalg.svdvals(result[1]).min() > 0.68
    zeros = torch.zeros(1, 4, 4)
    assert torch.equal(newton_schulz(zeros, eps=0.0, coefficients=coefficients), zeros)


@every_set
def test_one_matrix_that_is_not_finite_leaves_the_others_alone(name):
    coefficients = COEFFICIENTS[name]
    grad_KMN = randn(3, 8, 8)
    alone = newton_schulz(grad_KMN, coefficients=coefficients)
    grad_KMN[1, 2, 3] = float("nan")
    result = newton_schulz(grad_KMN, coefficients=coefficients)
    assert torch.equal(result[[0, 2]], alone[[0, 2]])
    assert result[1].isnan().any()


@every_set
def test_input_is_not_written_to(name):
    for shape in ((2, 8, 16), (2, 16, 8)):
        grad_KMN = randn(*shape)
        before = grad_KMN.clone()
        newton_schulz(grad_KMN, coefficients=COEFFICIENTS[name])
        assert torch.equal(grad_KMN, before)


@every_set
def test_overwriting_the_input_changes_no_bit_of_the_result(name):
    grad = randn(8, 16)
    assert torch.equal(ours(grad.clone(), name, overwrite=True), ours(grad, name))


@every_set
def test_result_has_the_dtype_of_the_input_and_bf16_products_are_near(name):
    grad = randn(8, 16)
    assert ours(grad.bfloat16(), name).dtype == torch.bfloat16
    low = ours(grad, name, dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    assert (low - ours(grad, name)).abs().max() < 0.05
    # The largest share there is.
    alone = torch.outer(randn(48, seed=1), randn(96, seed=2))
    assert torch.linalg.svdvals(ours(alone, name, dtype=torch.bfloat16)).max() < 1.3


def test_stacks_hold_each_matrix_once_with_its_index():
    matrices = [randn(2, 3), randn(3, 2), randn(2, 3, seed=1), randn(2, 3).double()]
    assert shape_groups(matrices) == [[0, 2], [1], [3]]
    for indices, stack_KMN in stack_by_shape(matrices):
        for index, matrix in zip(indices, stack_KMN, strict=True):
            assert torch.equal(matrix, matrices[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (96, 32), (16, 128)])
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
@every_set
def test_the_cost_of_newton_schulz_is_the_arithmetic_that_torch_counts(shape, steps, dtype, name):
    coefficients = COEFFICIENTS[name]
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.randn(1, *shape), steps=steps, coefficients=coefficients, dtype=dtype)
    cost = newton_schulz_cost(*shape, max(1, len(coefficients.for_steps(steps))), dtype=dtype)
    assert 2 * cost == counter.get_total_flops()


@every_set
@pytest.mark.parametrize("shape", [(2, 13, 50), (2, 50, 13), (2, 32, 32), (1, 3, 8)])
def test_strips_of_symmetric_products_give_the_result_of_whole_ones(shape, name, monkeypatch):
    grad_KMN = randn(*shape, dtype=torch.float64)
    whole = newton_schulz(grad_KMN, coefficients=COEFFICIENTS[name])
    sizes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda left, right: sizes.append(left.size(1)) or bmm(left, right))
    monkeypatch.setattr(matrix_functions, "LEAST_SYMMETRIC", 0)
    in_strips = newton_schulz(grad_KMN, coefficients=COEFFICIENTS[name])
    assert sizes[0] == min(shape[1:]) // matrix_functions.STRIPS
    torch.testing.assert_close(in_strips, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["gaussian", "falling", "rank one and noise", "one row leads", "rank 3"])
@pytest.mark.parametrize("shape", [(128, 128), (64, 256), (256, 64), (4, 4), (1, 7)])
def test_four_schatten_steps_end_in_their_band_and_keep_singular_vectors(shape, kind):
    grad = randn(*shape, dtype=torch.float64)
    size = min(shape)
    if kind == "falling":
        grad = with_singular_values(torch.logspace(0, -6, size, dtype=torch.float64), *shape)
    elif kind == "rank one and noise":
        grad = torch.outer(grad[:, 0], grad[0]) + 0.05 * randn(*shape, dtype=torch.float64, seed=1)
    elif kind == "one row leads":
        grad[0] *= 1e3
    elif kind == "rank 3":
        grad = randn(shape[0], 3, dtype=torch.float64) @ randn(3, shape[1], dtype=torch.float64, seed=1)
    u, s, vh = torch.linalg.svd(grad, full_matrices=False)
    start = s / s.pow(8).sum().pow(1 / 8)
    assert (start >= s / s.norm()).all()
    inner = u.T @ ours(grad.float(), "schatten", steps=4).double() @ vh.T
    kept = start > 1e-6
    large = start >= 0.02
    assert inner.diagonal()[large].min() > 0.90
    assert inner.diagonal().max() < 1.10
    assert (inner - torch.diag(inner.diagonal()))[kept][:, kept].abs().max() < 1e-3
    assert (inner.diagonal() <= 56 * start + 1e-4).all()
