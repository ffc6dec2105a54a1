"""Inverse roots and eigenbases of symmetric matrices, for Shampoo, CASPR and SOAP.

Shapes: K symmetric matrices of S rows and columns in a stack.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_FLOOR = {torch.float32: 5e-7, torch.float64: 1e-15}
"""Below this part of the largest an eigenvalue is rounding: up to S = 768, true zeros of a Gram matrix in fp32
ended within 3.3e-7 of it."""

AGREEMENT = 1e-3
"""By how much fp32 eigh may change a matrix's norm before it counts as failed; working, it keeps six digits."""

ROOT_PRODUCTS = 10.0
"""What eigh costs, in products of matrices of its size: 14 at S = 128, 9 at 256, 7 at 512 on one core of an AMD
EPYC, in fp32. QR, which `refine_eigenbasis` is made of, costs about half of it."""


def two_sided_cost(rows: int, cols: int, *, longest: int, products: float, roots: float) -> float:
    """Return the multiply-adds of a step on one matrix that keeps a matrix for each of its sides.

    Of each side of at most `longest` these are `products` products of the side's matrix with the gradient, and
    `roots` of the side's matrix with one of its own size.
    """
    sides = [(side, other) for side, other in ((rows, cols), (cols, rows)) if side <= longest]
    return float(rows * cols + sum(products * side**2 * other + roots * side**3 for side, other in sides))


@torch.no_grad()
def inverse_root(stack_KSS: Tensor, power: float, *, eps: float | None = None, ridge: float = 0.0) -> Tensor:
    """Return A^(-1/power) of each symmetric positive semidefinite matrix A of a stack; finite if A is.

    What rounding leaves of an eigenvalue is not trusted: one that is negative counts as zero, then `ridge` is
    added to all of them, then those below `eps` times the matrix's largest are raised to that. `eps` is the
    entry of RELATIVE_FLOOR unless given. A matrix of zeros has the root of ridge·I, or I where ridge is 0. A
    matrix that is not finite has a root of NaN and leaves the others of its stack alone. Matrices may have
    any scale: each is divided by its largest entry first.

    By eigh, and not by a coupled Newton iteration, which took on one core of a CPU (A^(-1/4), random matrices
    of condition 10, 8 to 10 iterations in fp32, milliseconds a matrix; worse conditions take more):
    S = 32: 0.05 (eigh) and 0.11 (Newton); 64: 0.15, 0.30; 128: 0.7, 2.0; 256: 3, 15; 512: 19, 118;
    1024: 152, 980. The result has the input's dtype and is computed in it, at least in fp32.
    """
    scaled_KSS, scale_K = _scaled(stack_KSS)
    values_KS, vectors_KSS = _eigh(scaled_KSS)
    values_KS = values_KS.clamp_(min=0.0) + (ridge / scale_K)[:, None]
    largest_K1 = values_KS.amax(dim=1, keepdim=True)
    floor = RELATIVE_FLOOR[values_KS.dtype] if eps is None else eps
    values_KS = torch.maximum(values_KS, floor * largest_K1)
    # Zero is left only where all are, or where the caller asked for eps = 0.
    values_KS = torch.where(values_KS > 0, values_KS, 1.0)
    half_KSS = vectors_KSS * values_KS.pow(-0.5 / power)[:, None, :]
    root_KSS = torch.bmm(half_KSS, half_KSS.mT)
    return root_KSS.mul_(scale_K.pow(-1.0 / power)[:, None, None]).to(stack_KSS.dtype)


@torch.no_grad()
def eigenbasis(stack_KSS: Tensor) -> Tensor:
    """Return the eigenvectors of each matrix as columns, by falling eigenvalue, in the input's dtype."""
    _, vectors_KSS = _eigh(_scaled(stack_KSS)[0])
    return vectors_KSS.flip(-1).to(stack_KSS.dtype)


@torch.no_grad()
def refine_eigenbasis(stack_KSS: Tensor, basis_KSS: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis nearer to each matrix's eigenvectors, and the order_KS in which it took the old columns.

    One step of orthogonal iteration: the QR decomposition of A·Q, the columns of Q first sorted by falling
    Rayleigh quotient. What belongs to a column, such as SOAP's second moments, is to be sorted by `order_KS`
    too. A column's sign may change. Directions in which A is zero stay orthonormal.
    """
    scaled_KSS, _ = _scaled(stack_KSS)
    basis_in = basis_KSS.to(scaled_KSS.dtype)
    product_KSS = torch.bmm(scaled_KSS, basis_in)
    order_KS = (basis_in * product_KSS).sum(dim=1).argsort(dim=1, descending=True, stable=True)
    product_KSS = product_KSS.gather(2, order_KS[:, None, :].expand_as(product_KSS))
    return torch.linalg.qr(product_KSS)[0].to(basis_KSS.dtype), order_KS


def _scaled(stack_KSS: Tensor) -> tuple[Tensor, Tensor]:
    """Return each matrix over its largest entry, at least in fp32, and that entry as scale_K.

    A matrix of zeros keeps the scale 1; a matrix that is not finite becomes I with the scale NaN.
    """
    work_KSS = stack_KSS.to(torch.promote_types(stack_KSS.dtype, torch.float32))
    scale_K = work_KSS.abs().amax(dim=(1, 2))
    scale_K = torch.where(scale_K.isfinite(), torch.where(scale_K > 0, scale_K, 1.0), torch.nan)
    finite_K11 = scale_K.isfinite()[:, None, None]
    eye_SS = torch.eye(work_KSS.size(-1), dtype=work_KSS.dtype, device=work_KSS.device)
    return torch.where(finite_K11, work_KSS / scale_K[:, None, None], eye_SS), scale_K


def _eigh(stack_KSS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues_KS, rising, and the eigenvectors as columns, in the input's dtype.

    A stack on which eigh gives up, or whose norm it does not keep, is done again in fp64. That is the last
    resort: an error there is raised.
    """
    try:
        values_KS, vectors_KSS = torch.linalg.eigh(stack_KSS)
    except torch.linalg.LinAlgError:
        if stack_KSS.dtype == torch.float64:
            raise
    else:
        if stack_KSS.dtype == torch.float64 or _keeps_norms(stack_KSS, values_KS, vectors_KSS):
            return values_KS, vectors_KSS
    values_KS, vectors_KSS = torch.linalg.eigh(stack_KSS.double())
    return values_KS.to(stack_KSS.dtype), vectors_KSS.to(stack_KSS.dtype)


def _keeps_norms(stack_KSS: Tensor, values_KS: Tensor, vectors_KSS: Tensor) -> bool:
    """Return whether eigenvalues have their matrix's norm and all eigenvectors length 1."""
    norm_K = torch.linalg.vector_norm(stack_KSS, dim=(1, 2))
    drift_K = (torch.linalg.vector_norm(values_KS, dim=1) - norm_K).abs()
    lengths_KS = torch.linalg.vector_norm(vectors_KSS, dim=1)
    # Written so that NaN counts as bad.
    good = (drift_K <= AGREEMENT * norm_K).all() & ((lengths_KS - 1).abs() <= AGREEMENT).all()
    return bool(good)


@torch.no_grad()
def damped_inverse_root(stack_KSS: Tensor, power: float, damping: float) -> tuple[Tensor, Tensor]:
    """Return (A + d·I)^(-1/power) of each matrix A, and d_K: `damping` times A's largest eigenvalue.

    As `inverse_root` otherwise, with the floor of RELATIVE_FLOOR. A matrix of zeros has d = 0 and the root I.
    """
    scaled_KSS, scale_K = _scaled(stack_KSS)
    values_KS, vectors_KSS = _eigh(scaled_KSS)
    largest_K1 = values_KS.clamp_(min=0.0).amax(dim=1, keepdim=True)
    values_KS = torch.maximum(values_KS + damping * largest_K1, RELATIVE_FLOOR[values_KS.dtype] * largest_K1)
    values_KS = torch.where(values_KS > 0, values_KS, 1.0)
    half_KSS = vectors_KSS * values_KS.pow(-0.5 / power)[:, None, :]
    root_KSS = torch.bmm(half_KSS, half_KSS.mT).mul_(scale_K.pow(-1.0 / power)[:, None, None])
    return root_KSS.to(stack_KSS.dtype), (damping * largest_K1[:, 0] * scale_K).to(stack_KSS.dtype)
