"""Functions of whole matrices, computed on stacks of one shape.

Shapes: K matrices of M rows and N columns, S = min(M, N).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's a, b, c of p(x) = ax + bx³ + cx⁵, chosen there for the steepest slope at 0 that keeps five
steps inside about [0.7, 1.2]: https://kellerjordan.github.io/posts/muon/."""

LONGEST_RUN = 3
"""Steps taken on the Gram matrix before it is computed anew, for matrices at least twice as long as wide.

At 4 to 1 it saves a third of the products. Three steps leave the fp32 result as near to float64's as one at
a time does (1e-6 on Gaussian, 1e-5 on rank-deficient matrices), five are 20 times farther away; see
`test_runs_of_steps_lose_no_precision`. In bf16 the error of one step is too large to build on."""


def shape_groups(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of the matrices that can be stacked: same shape, dtype and device."""
    groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(index)
    return list(groups.values())


def stack_by_shape(matrices: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Return, for each shape, the indices of its matrices and a new stack_KMN of them in that order."""
    return [
        (indices, torch.stack([matrices[index] for index in indices])) for indices in shape_groups(matrices)
    ]


@torch.no_grad()
def newton_schulz(
    grad_KMN: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    eps: float = 1e-30,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Return a stack near UVᵀ of each matrix UΣVᵀ: the same singular vectors, all singular values near 1.

    "Near" is loose by design. Measured over five steps by tests/test_optim_matrix_functions.py: a singular
    value of at least 0.002 of its matrix's Frobenius norm ends in [0.68, 1.21]; a smaller one is multiplied
    by at most 3.4445⁵ = 485 and may end anywhere in [0, 1.21]. The matrix's scale does not matter.

    `eps` is the Frobenius norm below which a matrix is taken for noise and shrinks with its norm; a matrix of
    zeros stays zero. `dtype` is what the products are computed in: bf16 on CUDA and the input's own (at least
    fp32) elsewhere, unless given. The result has the input's dtype and shape; `overwrite` lets the input's
    memory be used for it.

    Differs from `torch.optim.Muon` in that it works on stacks, takes dtype from the device, does not
    underflow (torch squares the raw entries and floors the norm at 1e-7), and multiplies the polynomials of
    up to LONGEST_RUN steps before they meet an oblong matrix.
    """
    if dtype is None:
        dtype = torch.bfloat16 if grad_KMN.is_cuda else torch.promote_types(grad_KMN.dtype, torch.float32)
    x_KMN = grad_KMN.to(torch.promote_types(grad_KMN.dtype, torch.float32), copy=not overwrite)
    x_KMN = _normalise_(x_KMN, eps).to(dtype)
    rows, cols = x_KMN.shape[1:]
    tall = rows > cols
    oblong = max(rows, cols) >= 2 * min(rows, cols)
    longest = LONGEST_RUN if oblong and torch.finfo(dtype).bits >= 32 else 1
    while steps > 0:
        # The Gram matrix on the small side, where its square costs least: to the right of a tall matrix.
        gram_KSS = torch.bmm(x_KMN.mT, x_KMN) if tall else torch.bmm(x_KMN, x_KMN.mT)
        product_KSS = poly_KSS = _polynomial(gram_KSS, coefficients)
        for _ in range(min(steps, longest) - 1):
            # The Gram matrix of poly·X is poly·A·poly, at a cost that does not depend on the long side.
            gram_KSS = torch.bmm(poly_KSS, torch.bmm(gram_KSS, poly_KSS))
            poly_KSS = _polynomial(gram_KSS, coefficients)
            product_KSS = torch.bmm(poly_KSS, product_KSS)
        x_KMN = torch.bmm(x_KMN, product_KSS) if tall else torch.bmm(product_KSS, x_KMN)
        steps -= longest
    return x_KMN.to(grad_KMN.dtype)


def _polynomial(gram_KSS: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Return aI + bA + cA² of each Gram matrix A; symmetric, and it commutes with A."""
    a, b, c = coefficients
    poly_KSS = torch.baddbmm(gram_KSS, gram_KSS, gram_KSS, beta=b, alpha=c)
    poly_KSS.diagonal(dim1=1, dim2=2).add_(a)
    return poly_KSS


def _normalise_(x_KMN: Tensor, eps: float) -> Tensor:
    """Divide each matrix by its Frobenius norm, in place."""
    tiny = torch.finfo(x_KMN.dtype).tiny
    # Dividing by the largest entry first keeps the squares from under- and overflowing. Two passes that only
    # read: abs() would write a copy, and torch's vector_norm with ord=inf takes 20 times longer on the CPU.
    largest_K11 = x_KMN.amax(dim=(1, 2), keepdim=True)
    peak_K11 = torch.maximum(largest_K11, -x_KMN.amin(dim=(1, 2), keepdim=True)).clamp_(min=tiny)
    norm_K11 = torch.linalg.vector_norm(x_KMN.div_(peak_K11), dim=(1, 2), keepdim=True)
    return x_KMN.div_(torch.maximum(norm_K11, (eps / peak_K11).clamp_(min=tiny)))
