"""Inverse roots and eigenbases against scipy and against float64 eigh with the stated rule applied by hand."""

import numpy as np
import pytest
import scipy.linalg
import torch

from nanorun.optim.inverse_roots import RELATIVE_FLOOR, eigenbasis, inverse_root, refine_eigenbasis

POWERS = [1, 2, 4, 3.0, 1.5]


def random_matrix(eigenvalues, seed=0):
    """A symmetric matrix of these eigenvalues in float64, and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    vectors, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = (vectors * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


def root_by_hand(eigenvalues, vectors, power, floor):
    """The rule of the docstring, from eigenvalues that are known rather than computed."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64).clamp(min=0)
    values = values.clamp(min=floor * values.max())
    return (vectors * values ** (-1 / power)) @ vectors.T


def relative_error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_inverse_root_matches_scipy_on_positive_definite_matrices(power, dtype, tolerance):
    for seed, size in enumerate([1, 2, 16, 33]):
        matrix, _ = random_matrix(np.geomspace(0.05, 3.0, size), seed)
        wanted = torch.from_numpy(scipy.linalg.fractional_matrix_power(matrix.numpy(), -1 / power))
        found = inverse_root(matrix.to(dtype)[None], power)
        assert found.dtype == dtype
        assert relative_error(found[0], wanted) < tolerance


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float64, 1e-5)])
def test_small_eigenvalues_above_the_floor_are_kept(power, dtype, tolerance):
    eigenvalues = np.geomspace(100 * RELATIVE_FLOOR[dtype], 1.0, 24)
    matrix, vectors = random_matrix(eigenvalues)
    wanted = root_by_hand(eigenvalues, vectors, power, 0.0)
    assert relative_error(inverse_root(matrix.to(dtype)[None], power)[0], wanted) < tolerance


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize(
    "eigenvalues",
    [[0.0] * 8 + [1.0, 2.0, 3.0, 4.0], [-0.5, -1e-3, 0.0, 1e-3, 1.0, 2.0], [0.0] * 15 + [7.0], [-1e-9, 1.0]],
    ids=["rank deficient", "negative", "rank one", "negative by rounding"],
)
@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_zero_and_negative_eigenvalues_follow_the_stated_rule(power, eigenvalues, eps):
    matrix, vectors = random_matrix(eigenvalues)
    wanted = root_by_hand(eigenvalues, vectors, power, eps)
    assert relative_error(inverse_root(matrix.float()[None], power, eps=eps)[0], wanted) < 1e-3
    assert relative_error(inverse_root(matrix[None], power, eps=eps)[0], wanted) < 1e-9


def test_default_floor_hides_what_rounding_leaves_of_zero_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(1, 96, 32, generator=generator)
    gram_64 = thin[0].double() @ thin[0].double().T
    values, vectors = torch.linalg.eigh(gram_64)
    wanted = root_by_hand(values, vectors, 4, RELATIVE_FLOOR[torch.float32])
    assert relative_error(inverse_root(thin @ thin.mT, 4)[0], wanted) < 1e-3


@pytest.mark.parametrize("exponent", [-100, -66, 66, 120])
@pytest.mark.parametrize("power", [1, 2, 4])
def test_badly_scaled_matrices_have_the_scaled_root(exponent, power):
    # 2^66 is about 1e20. A power of two scales fp32 entries without rounding them.
    for eigenvalues in (np.geomspace(0.01, 1.0, 16), [0.0] * 8 + [1.0] * 8):
        matrix = random_matrix(eigenvalues)[0].float()[None]
        scaled = inverse_root(matrix * 2.0**exponent, power)
        assert scaled.isfinite().all()
        wanted = inverse_root(matrix, power)[0].double() * 2.0 ** (-exponent / power)
        assert relative_error(scaled[0], wanted) < 1e-5


def test_matrices_of_very_different_scale_share_a_stack():
    matrices = [
        random_matrix(np.geomspace(0.1, 1, 12), seed)[0] * scale
        for seed, scale in enumerate((1e-20, 1, 1e20))
    ]
    together = inverse_root(torch.stack(matrices).float(), 4)
    for found, matrix in zip(together, matrices, strict=True):
        wanted = torch.from_numpy(scipy.linalg.fractional_matrix_power(matrix.numpy(), -0.25))
        assert relative_error(found, wanted) < 1e-5


def test_zeros_have_the_identity_or_the_root_of_the_ridge():
    zeros = torch.zeros(2, 5, 5)
    torch.testing.assert_close(inverse_root(zeros, 4), torch.eye(5).expand(2, 5, 5))
    torch.testing.assert_close(inverse_root(zeros, 2, ridge=1e-4), 100 * torch.eye(5).expand(2, 5, 5))
    assert inverse_root(zeros, 2, eps=0.0).isfinite().all()


def test_ridge_is_added_to_every_eigenvalue_after_negative_ones_count_as_zero():
    eigenvalues = torch.tensor([-0.5, 0.0, 1.0, 2.0], dtype=torch.float64)
    matrix, vectors = random_matrix(eigenvalues)
    wanted = (vectors * (eigenvalues.clamp(min=0) + 0.25) ** -0.5) @ vectors.T
    assert relative_error(inverse_root(matrix[None], 2, ridge=0.25)[0], wanted) < 1e-12


def test_matrix_that_is_not_finite_spoils_only_itself():
    stack = torch.eye(4).repeat(3, 1, 1) * 16
    stack[0, 1, 2], stack[1, 0, 0] = torch.nan, torch.inf
    roots = inverse_root(stack, 4)
    assert roots[:2].isnan().all()
    torch.testing.assert_close(roots[2], torch.eye(4) / 2)


@pytest.mark.parametrize("failure", ["raises", "wrong vectors", "nan"])
def test_eigh_that_fails_in_fp32_is_done_again_in_fp64(failure, monkeypatch):
    original, seen = torch.linalg.eigh, []

    def failing(stack):
        seen.append(stack.dtype)
        if stack.dtype == torch.float64:
            return original(stack)
        if failure == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        values, vectors = original(stack)
        return values, vectors * (0.9 if failure == "wrong vectors" else torch.nan)

    matrix, _ = random_matrix(np.geomspace(0.1, 1.0, 8))
    wanted = inverse_root(matrix[None], 4)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = inverse_root(matrix.float()[None], 4)
    assert seen == [torch.float32, torch.float64]
    assert found.dtype == torch.float32
    assert relative_error(found, wanted) < 1e-6


def test_input_is_not_written_to():
    stack = random_matrix([0.0, -1e-8, 1.0, 2.0])[0].float()[None]
    before = stack.clone()
    inverse_root(stack, 4, ridge=0.1)
    refine_eigenbasis(stack, eigenbasis(stack))
    assert torch.equal(stack, before)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_eigenbasis_diagonalises_by_falling_eigenvalue(scale):
    eigenvalues = [5.0, 3.0, 1.0, 0.5, 0.0]
    matrix, vectors = random_matrix(eigenvalues)
    basis = eigenbasis((matrix * scale)[None])[0]
    torch.testing.assert_close(
        (basis.T @ vectors).abs(), torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_refining_converges_to_the_eigenvectors_and_sorts_them():
    eigenvalues = [0.5, 8.0, 2.0, 0.1]
    matrix, vectors = random_matrix(eigenvalues)
    basis, order = refine_eigenbasis(matrix[None], vectors[None])
    assert order.tolist() == [[1, 2, 0, 3]]
    start, _ = torch.linalg.qr(vectors + 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    basis = start[None]
    for _ in range(40):
        basis, order = refine_eigenbasis(matrix[None], basis)
    assert order.tolist() == [[0, 1, 2, 3]]
    wanted = vectors[:, [1, 2, 0, 3]]
    torch.testing.assert_close(
        (basis[0].T @ wanted).abs(), torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("stack", [torch.zeros(2, 6, 6), torch.ones(2, 6, 6), torch.full((2, 6, 6), 1e-38)])
def test_bases_of_singular_matrices_stay_orthonormal(stack):
    basis = eigenbasis(stack)
    for _ in range(3):
        basis, order = refine_eigenbasis(stack, basis)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(6).expand(2, 6, 6), atol=1e-5, rtol=0)
        assert torch.equal(order.sort(dim=1).values, torch.arange(6).expand(2, 6))
