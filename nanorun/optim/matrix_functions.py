"""Functions of whole matrices, computed on stacks of one shape.

Shapes: K matrices of M rows and N columns, S = min(M, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]
"""a, b, c of p(x) = ax + bx³ + cx⁵, which one step applies to every singular value."""


class CoefficientSet(NamedTuple):
    """The polynomials of a run of Newton–Schulz steps, and how it starts."""

    polynomials: tuple[Polynomial, ...]
    """One per step; more steps repeat the last, fewer take the first ones."""
    rescaled: Literal["rows", "whole"] | None = None
    """Whether the first step is no polynomial but a rescaling: of the rows (`_rescale_rows`), or of the whole matrix
    by a norm nearer to its largest singular value than Frobenius's (`_schatten_share`)."""

    def for_steps(self, steps: int) -> tuple[Polynomial, ...]:
        """Return the polynomials of that many steps, one fewer where the first step is the rescaling."""
        count = steps - (self.rescaled is not None)
        missing = max(0, count - len(self.polynomials))
        return self.polynomials[:count] + self.polynomials[-1:] * missing


def _after_shrinking(polynomial: Polynomial, factor: Any) -> Any:
    """Return the polynomial of x/factor; `factor` is a number or K11."""
    a, b, c = polynomial
    return a / factor, b / factor**3, c / factor**5


QUINTIC = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's, chosen there for the steepest slope at 0 that keeps five steps inside about [0.7, 1.2]:
https://kellerjordan.github.io/posts/muon/."""

MINIMAX = (
    (8.287212018145622, -23.595886519098816, 17.30038731253092),
    (4.1070591115422035, -2.947849916737912, 0.5448431082926606),
    (3.948690853482289, -2.908902115962943, 0.5518191394370123),
    (3.3184196573706037, -2.4884880243148757, 0.5100489401237204),
    (2.3006520199548186, -1.6689039845747504, 0.4188073119525674),
    (1.8913014077873995, -1.2679958271945901, 0.3768040894852499),
    (1.8750014808143731, -1.2500016453218594, 0.3750001645084104),
    (1.875, -1.25, 0.375),
)
"""Polar Express's, arXiv:2505.16932: each is the polynomial nearest to 1 on the interval that the ones before
it make of [0.001, 1]. Computed anew by `test_minimax_coefficients_equioscillate_and_are_the_papers`."""

YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""You Jiacheng's, fitted by gradient descent for modded-nanogpt, the starting point of Turbo-Muon:
https://gist.github.com/YouJiacheng/393c90cbdc23b09d5688815ba382288b."""

MINIMAX_AFTER_RESCALING = (
    (7.710969245867682, -22.11375479048116, 16.24874301773847),
    (3.2152759873077446, -2.4111720102557834, 0.5013000136148817),
    (2.2183077524237897, -1.5939896229158315, 0.41074788751049957),
    MINIMAX[-1],
)
"""Made as MINIMAX is, of [0.02, 1] and without the cushion: after a rescaling of the whole matrix three polynomials
come about as near to UVᵀ as five of MINIMAX do from its Frobenius norm. 0.02 was chosen among 0.003 to 0.08 by the
distance from UVᵀ of square Gaussian matrices of width 128 (0.12; at 0.01 0.21, at 0.05 0.13) and by how far small
singular values grow (55 times; 78 and 33). `test_minimax_coefficients_equioscillate_and_are_the_papers` makes them
anew."""

COEFFICIENTS = {
    "original": CoefficientSet((QUINTIC,)),
    # The paper divides the matrix by 1.01 of its norm, and by 1.01 before every step but the last, against
    # bf16's errors; both are the same as shrinking the polynomials.
    "polar_express": CoefficientSet(
        (
            _after_shrinking(MINIMAX[0], 1.01**2),
            *(_after_shrinking(polynomial, 1.01) for polynomial in MINIMAX[1:-1]),
            MINIMAX[-1],
        )
    ),
    # Turbo-Muon, arXiv:2512.04632: the rescaling takes the place of the first step.
    "turbo": CoefficientSet(YOU[1:], rescaled="rows"),
    "schatten": CoefficientSet(MINIMAX_AFTER_RESCALING, rescaled="whole"),
}

LONGEST_RUN = 3
"""Steps taken on the Gram matrix before it is computed anew, for matrices at least twice as long as wide.

At 4 to 1 it saves a third of the products. Three steps leave the fp32 result about as near to float64's as
one at a time does (1e-6 on Gaussian, 1e-5 on rank-deficient matrices; with polar_express 4e-5 where one at a
time has 2e-5), five are 20 times farther away; see `test_runs_of_steps_lose_no_precision`. In bf16 the error of
one step is too large to build on."""


CACHE_BYTES = 2**18
"""Bytes of a stack for each thread, a quarter of a core's 1 MiB cache: the Gram matrix, the polynomial and the
result want to be there as well. Muon's step took 7 % (width 128) to 22 % (width 192) less processor time in such
pieces than with all matrices of a shape at once, on one thread of an AMD EPYC, and as much with half or twice
these bytes."""


STRIPS = 4
"""Strips of rows in which a product known to be symmetric is computed, each as far as the diagonal: 10 of 16 parts."""

LEAST_SYMMETRIC = 2**24
"""Multiply-adds of such a product below which strips do not pay. On two cores of an AMD EPYC (AVX2, MKL) they took
1/1.3 to 1/1.4 of the time for a square of 384 or 768 and for the Gram matrix of 192 by 768, as long as the plain
product for a square of 192, and longer at 128."""


def shape_groups(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of the matrices that can be stacked: same shape, dtype and device."""
    groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(index)
    return list(groups.values())


def cache_sized(indices: Sequence[int], matrix: Tensor) -> list[Sequence[int]]:
    """Return the indices of matrices like `matrix` in pieces, each a stack small enough for the caches of a CPU.

    Elsewhere that is one piece. The piece does not change the bits of a matrix whose rows fill whole vectors.
    """
    if matrix.device.type != "cpu":
        return [indices]
    fitting = max(1, CACHE_BYTES // max(1, matrix.nbytes)) * torch.get_num_threads()
    return [indices[start : start + fitting] for start in range(0, len(indices), fitting)]


def stack_by_shape(matrices: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Return, for each shape, the indices of its matrices and a new stack_KMN of them in that order."""
    return [
        (indices, torch.stack([matrices[index] for index in indices])) for indices in shape_groups(matrices)
    ]


def dtype_of_products(matrix: Tensor) -> torch.dtype:
    """Return what newton_schulz computes in unless told: bf16 on CUDA, elsewhere the matrix's own, at least fp32."""
    return torch.bfloat16 if matrix.is_cuda else torch.promote_types(matrix.dtype, torch.float32)


@torch.no_grad()
def newton_schulz(
    grad_KMN: Tensor,
    *,
    steps: int = 5,
    coefficients: CoefficientSet = COEFFICIENTS["original"],
    eps: float = 1e-30,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    triton: bool = False,
) -> Tensor:
    """Return a stack near UVᵀ of each matrix UΣVᵀ: the same singular vectors, all singular values near 1.

    "Near" is loose by design. Measured over five steps by tests/test_optim_matrix_functions.py, where a share is
    a singular value over its matrix's Frobenius norm, and the distance is that of Gaussian matrices, wide, tall
    and square, from UVᵀ over the norm of UVᵀ:

    | coefficients | shares of at least | end in | smaller ones grow at most | distance |
    |---|---|---|---|---|
    | original | 0.002 | [0.68, 1.21] | 485 times | 0.24 |
    | polar_express | 0.002 | [0.87, 1.13] | 967 times | 0.12 |
    | turbo | 0.01, after rescaling | [0.97, 1.15] | 121 times | 0.03 wide or tall, 0.15 square |
    | schatten | 0.02, after rescaling | [0.99, 1.01] | 104 times | 0.01 wide or tall, 0.12 square |

    Four steps of `schatten` (three polynomials) reach [0.90, 1.10] and distances of 0.07 and 0.16. A smaller one may
    end anywhere below the upper bound. The matrix's scale does not matter.

    `turbo` rescales rows first (see `_rescale_rows`) and so returns a matrix near UVᵀ of the rescaled one, with
    other singular vectors. For a Gaussian matrix that is nearly the same; where singular values fall as 1/k the
    distance is 0.2, and where rows differ in scale by many orders of magnitude it is another matrix. The
    rescaling leaves the k-th singular value at least √(2/(1+√S)) of its share, 0.40 times at S = 128, and three
    times its share on square Gaussian matrices of that size.

    `schatten` divides the whole matrix by its Schatten 8-norm, (Σσ⁸)^⅛, so singular vectors stay. It lies between
    the largest singular value and the Frobenius norm, and is 4 to 9 times smaller than the latter on square Gaussian
    matrices of 128 to 768; it takes no product, since the first polynomial needs the Gram matrix and its square.

    `eps` is the Frobenius norm below which a matrix is taken for noise and shrinks with its norm; a matrix of
    zeros stays zero. `dtype` is what the products are computed in, `dtype_of_products` unless given. The result
    has the input's dtype and shape; `overwrite` lets the input's memory be used for it. `triton` takes the symmetric
    products by the kernel of symmetric_products.py, which has to be imported.

    Differs from `torch.optim.Muon` in that it works on stacks, takes dtype from the device, does not
    underflow (torch squares the raw entries and floors the norm at 1e-7), and multiplies the polynomials of
    up to LONGEST_RUN steps before they meet an oblong matrix. Differs from Turbo-Muon's own code in that fewer
    steps leave out the last polynomials and not the first, which raises small singular values more.
    """
    if dtype is None:
        dtype = dtype_of_products(grad_KMN)
    x_KMN = grad_KMN.to(torch.promote_types(grad_KMN.dtype, torch.float32), copy=not overwrite)
    x_KMN = _normalise_(x_KMN, eps).to(dtype)
    rows, cols = x_KMN.shape[1:]
    tall = rows > cols
    longest = _longest_run(min(rows, cols), max(rows, cols), dtype)
    gram_KSS = None
    if coefficients.rescaled == "rows":
        x_KMN, gram_KSS = _rescale_rows(x_KMN, tall, triton)
    polynomials = coefficients.for_steps(steps) or ((1.0, 0.0, 0.0),)
    for start in range(0, len(polynomials), longest):
        if gram_KSS is None:
            gram_KSS = _gram(x_KMN, tall, triton)
        if start == 0 and coefficients.rescaled == "whole":
            product_KSS = poly_KSS = _first_polynomial(gram_KSS, polynomials[0])
        else:
            product_KSS = poly_KSS = _polynomial(gram_KSS, polynomials[start], triton)
        for polynomial in polynomials[start + 1 : start + longest]:
            # The Gram matrix of poly·X is poly·A·poly, at a cost that does not depend on the long side.
            gram_KSS = _symmetric(poly_KSS, _symmetric(gram_KSS, poly_KSS))
            poly_KSS = _polynomial(gram_KSS, polynomial, triton)
            product_KSS = _symmetric(poly_KSS, product_KSS)
        x_KMN = torch.bmm(x_KMN, product_KSS) if tall else torch.bmm(product_KSS, x_KMN)
        gram_KSS = None
    return x_KMN.to(grad_KMN.dtype)


def newton_schulz_cost(rows: int, cols: int, steps: int, *, dtype: torch.dtype) -> float:
    """Return the multiply-adds of that many polynomials of newton_schulz on one matrix, computed in `dtype`.

    Symmetric products count in full, so that a rank's share does not depend on the machine.
    """
    short, long = sorted((rows, cols))
    runs = -(-steps // _longest_run(short, long, dtype))
    # A run reads and writes the matrix once; each further step in it takes three products of the small side.
    return float(short**2 * (2 * long * runs + short * (steps + 3 * (steps - runs))))


def _longest_run(short: int, long: int, dtype: torch.dtype) -> int:
    return LONGEST_RUN if long >= 2 * short and torch.finfo(dtype).bits >= 32 else 1


def _gram(x_KMN: Tensor, tall: bool, triton: bool = False) -> Tensor:
    """Return the Gram matrices on the small side, where their squares cost least: to the right of a tall X."""
    if triton:
        gram_KSS: Tensor = torch.ops.nanorun.symmetric_product(x_KMN.mT if tall else x_KMN, None, 1.0, 0.0)
        return gram_KSS
    return _symmetric(x_KMN.mT, x_KMN) if tall else _symmetric(x_KMN, x_KMN.mT)


def _symmetric(
    left_KSN: Tensor,
    right_KNS: Tensor,
    plus_KSS: Tensor | None = None,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return alpha·left·right + beta·plus, known to be symmetric: on a CPU large ones as strips up to the diagonal."""
    size, inner = left_KSN.shape[1:]
    if left_KSN.device.type != "cpu" or size * size * inner < LEAST_SYMMETRIC:
        if plus_KSS is None:
            return torch.bmm(left_KSN, right_KNS)
        return torch.baddbmm(plus_KSS, left_KSN, right_KNS, beta=beta, alpha=alpha)
    result_KSS = left_KSN.new_empty(len(left_KSN), size, size)
    for top, end in pairwise(size * strip // STRIPS for strip in range(STRIPS + 1)):
        left, right = left_KSN[:, top:end], right_KNS[:, :, :end]
        if plus_KSS is None:
            strip = torch.bmm(left, right)
        else:
            strip = torch.baddbmm(plus_KSS[:, top:end, :end], left, right, beta=beta, alpha=alpha)
        result_KSS[:, top:end, :end] = strip
        result_KSS[:, :top, top:end] = strip[:, :, :top].mT
    return result_KSS


def _rescale_rows(x_KMN: Tensor, tall: bool, triton: bool = False) -> tuple[Tensor, Tensor]:
    """Return the matrices rescaled along their small side so that no singular value exceeds 1, and their Grams.

    Row i of a wide matrix (column i of a tall one) is divided by the root of Σⱼ|Aᵢⱼ| of the Gram matrix A:
    the almost orthogonal layer of arXiv:2208.03160. It comes nearer to 1 than the Frobenius norm does, since
    it knows how far the rows are orthogonal already. The singular vectors change unless it scales all alike.
    """
    gram_KSS = _gram(x_KMN, tall, triton)
    scale_KS = gram_KSS.abs().sum(dim=2).clamp_(min=torch.finfo(gram_KSS.dtype).tiny).rsqrt_()
    # The norm is 1, or less for what counts as noise, and that must stay small.
    scale_KS *= gram_KSS.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True).clamp_(max=1.0).sqrt_()
    gram_KSS = gram_KSS * scale_KS[:, :, None] * scale_KS[:, None, :]
    return x_KMN * (scale_KS[:, None, :] if tall else scale_KS[:, :, None]), gram_KSS


def _polynomial(gram_KSS: Tensor, polynomial: Polynomial, triton: bool = False) -> Tensor:
    """Return aI + bA + cA² of each Gram matrix A; symmetric, and it commutes with A."""
    a, b, c = polynomial
    if triton:
        poly_KSS = torch.ops.nanorun.symmetric_product(gram_KSS, gram_KSS, c, b)
    else:
        poly_KSS = _symmetric(gram_KSS, gram_KSS, gram_KSS, beta=b, alpha=c)
    poly_KSS.diagonal(dim1=1, dim2=2).add_(a)
    return poly_KSS


def _first_polynomial(gram_KSS: Tensor, polynomial: Polynomial) -> Tensor:
    """Return what takes each X to the polynomial of X over `_schatten_share`, by its Gram matrix."""
    square_KSS = _symmetric(gram_KSS, gram_KSS)
    a_K11, b_K11, c_K11 = _after_shrinking(polynomial, _schatten_share(gram_KSS, square_KSS))
    poly_KSS = square_KSS.mul_(c_K11).addcmul_(gram_KSS, b_K11)
    poly_KSS.diagonal(dim1=1, dim2=2).add_(a_K11[:, :, 0])
    return poly_KSS


def _schatten_share(gram_KSS: Tensor, square_KSS: Tensor) -> Tensor:
    """Return the Schatten 8-norm over the Frobenius norm, K11: the 8-norm to the fourth is the Gram's square's norm.

    No singular value exceeds it. Frobenius norms are 1 here, or less for what counts as noise and must stay small.
    """
    # Its fifth power is a coefficient, and bf16 would round each power apart.
    dtype = torch.promote_types(gram_KSS.dtype, torch.float32)
    # Down to a norm of 1e-9, whose square's entries still are no subnormals.
    trace_K11 = gram_KSS.diagonal(dim1=1, dim2=2).sum(dim=1, dtype=dtype)[:, None, None].clamp_(min=1e-18)
    norm_K11 = torch.linalg.vector_norm(square_KSS / trace_K11.square(), dim=(1, 2), keepdim=True)
    # The least there is, of equal singular values; it keeps a matrix of zeros from being divided by zero.
    share_K11 = norm_K11.sqrt_().sqrt_().clamp_(min=gram_KSS.size(1) ** -0.375)
    # Above 1 the first polynomial rises steeply, so a rounding of the products must not lead there.
    return share_K11 * (1 + 2 * torch.finfo(gram_KSS.dtype).eps)


def _normalise_(x_KMN: Tensor, eps: float) -> Tensor:
    """Divide each matrix by its Frobenius norm, in place."""
    tiny = torch.finfo(x_KMN.dtype).tiny
    # Dividing by the largest entry first keeps the squares from under- and overflowing. Two passes that only
    # read: abs() would write a copy, and torch's vector_norm with ord=inf takes 20 times longer on the CPU.
    largest_K11 = x_KMN.amax(dim=(1, 2), keepdim=True)
    peak_K11 = torch.maximum(largest_K11, -x_KMN.amin(dim=(1, 2), keepdim=True)).clamp_(min=tiny)
    norm_K11 = torch.linalg.vector_norm(x_KMN.div_(peak_K11), dim=(1, 2), keepdim=True)
    return x_KMN.div_(torch.maximum(norm_K11, (eps / peak_K11).clamp_(min=tiny)))
