"""The Triton kernel of symmetric products, by Triton's interpreter where Triton is installed."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

WORK = """
import torch
from nanorun.optim.matrix_functions import COEFFICIENTS, newton_schulz
from nanorun.optim.symmetric_products import symmetric_product

generator = torch.Generator().manual_seed(0)
# The interpreter takes the bits of bf16 for integers, so that type is left to a GPU.
for rows, cols, dtype, near in ((130, 70, torch.float32, 1e-5), (70, 200, torch.float16, 1e-3)):
    x = torch.randn(2, rows, cols, generator=generator).to(dtype)
    for one in (x, x.mT):
        size = one.size(1)
        addend = torch.randn(2, size, size, generator=generator).to(dtype)
        addend = addend + addend.mT
        product = one.double() @ one.double().mT
        for wanted, found in (
            (product, symmetric_product(one, None, 1.0, 0.0)),
            (0.5 * product - 2 * addend.double(), symmetric_product(one, addend, 0.5, -2.0)),
        ):
            assert (found.double() - wanted).norm() < near * wanted.norm(), (rows, cols, dtype)
            assert torch.equal(found, found.mT)
for coefficients in ("original", "turbo"):
    for shape in ((1, 20, 40), (1, 40, 20)):
        grad = torch.randn(shape, generator=generator)
        options = {"coefficients": COEFFICIENTS[coefficients], "dtype": torch.float32}
        plain, ours = newton_schulz(grad, **options), newton_schulz(grad, triton=True, **options)
        assert (ours - plain).norm() < 1e-4 * plain.norm()
print("equal")
"""


def test_symmetric_products_and_newton_schulz_are_those_of_torch():
    done = subprocess.run(
        [sys.executable, "-c", WORK],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr[-3000:]
