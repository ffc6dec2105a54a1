"""Masks as functions of a row's key and a place: what they are, and that they look like chance."""

import math

import numpy as np
import pytest
import torch

from nanorun.dropout import dropout, kept, keys_at, mix, row_keys

CPU = torch.device("cpu")
N_ROWS, N_LINES, WIDTH = 8, 512, 256
N = N_ROWS * N_LINES * WIDTH
SURELY = 5.0
"""Standard deviations that no sample here lies outside of, unless something is wrong."""


def signs(*, seed=0, first_row=0, place=0, p=0.5):
    """Whether each number is kept, in units of its standard deviation from its mean, (B, L, C)."""
    keys_B = keys_at(row_keys(seed, first_row, N_ROWS, CPU), place)
    kept_BLC = kept(keys_B, N_LINES, WIDTH, p, torch.float64)
    return (kept_BLC - (1 - p)) / math.sqrt(p * (1 - p))


def mixed(x):
    """The same as `mix`, on Python's whole numbers in an array of objects."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 15)


@pytest.mark.parametrize("first_row", [0, 2**32 - 2, 2**40])
def test_masks_are_those_of_whole_numbers_without_overflow(first_row):
    rows = np.array(range(first_row, first_row + 3), dtype=object)
    keys = mixed(mixed(mixed(rows % 2**32) ^ (rows >> 32)) ^ 1234)
    keys = mixed(keys ^ 7)
    lines = mixed(keys[:, None] ^ mixed(np.array(range(5), dtype=object)))
    x = (lines[:, :, None] + mixed(np.array(range(6), dtype=object))) % 2**32
    for _ in range(2):
        x = x * (2 * x + 1) % 2**32
    # The code's int32 are these less 2³¹: line and column lose it twice, which is a multiple of 2³².
    wanted = (x + 2**31) % 2**32 >= round(0.3 * 2**32)
    found = kept(keys_at(row_keys(1234, first_row, 3, CPU), 7), 5, 6, 0.3, torch.float32)
    assert np.array_equal(found.numpy().astype(bool), wanted.astype(bool))
    assert 0 < found.sum() < found.numel()


def test_a_row_has_its_mask_whatever_rows_are_beside_it():
    whole = kept(row_keys(3, 100, 8, CPU), 4, 16, 0.5, torch.float32)
    parts = [kept(row_keys(3, first, 2, CPU), 4, 16, 0.5, torch.float32) for first in (100, 102, 104, 106)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_one_asked_for(p):
    assert abs(float(signs(p=p).mean())) < SURELY / math.sqrt(N)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(
    "other",
    [{"first_row": N_ROWS}, {"first_row": 2**32}, {"place": 1}, {"seed": 1}, {"seed": 2**30}],
    ids=["next step", "far step", "place", "seed", "far seed"],
)
def test_masks_of_two_steps_places_and_seeds_have_nothing_to_do_with_each_other(p, other):
    assert abs(float((signs(p=p) * signs(p=p, **other)).mean())) < SURELY / math.sqrt(N)


@pytest.mark.parametrize("distance", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["rows", "lines", "columns"])
def test_neighbours_have_nothing_to_do_with_each_other(dim, distance):
    one = signs(p=0.1)
    distance = min(distance, one.size(dim) - 1)
    assert abs(float((one * one.roll(distance, dim)).mean())) < SURELY / math.sqrt(N)


@pytest.mark.parametrize(("dy", "dx"), [(1, 1), (1, 2), (3, 1), (16, 32)])
def test_the_corners_of_a_rectangle_have_nothing_to_do_with_each_other(dy, dx):
    """A hash of line plus column that mixed too little would tell the fourth corner from three."""
    one = signs()
    corners = one * one.roll(dy, 1) * one.roll(dx, 2) * one.roll((dy, dx), (1, 2))
    assert abs(float(corners.mean())) < SURELY / math.sqrt(N)


@pytest.mark.parametrize("dim", [1, 2], ids=["columns", "lines"])
def test_counts_along_lines_and_columns_spread_as_chance_has_it(dim):
    sums = signs(p=0.1).sum(dim) / math.sqrt(signs().size(dim))
    # A chi-square over its degrees of freedom, whose standard deviation is √(2/n).
    assert abs(float((sums**2).mean()) - 1) < SURELY * math.sqrt(2 / sums.numel())


def test_each_pattern_of_eight_neighbours_is_as_frequent_as_another():
    bits = (signs() > 0).view(-1, 8).long()
    counts = torch.bincount(bits @ (1 << torch.arange(8)), minlength=256).double()
    expected = N / 8 / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < SURELY * math.sqrt(2 * 255)


def test_a_flipped_bit_flips_every_bit_half_the_time():
    numbers = torch.arange(20_000)
    for bit in range(32):
        flipped = mix(numbers) ^ mix(numbers ^ (1 << bit))
        shares = torch.stack([(flipped >> place & 1).double().mean() for place in range(33)])
        assert float((shares[:32] - 0.5).abs().max()) < 0.03, bit
        assert shares[32] == 0


def test_what_is_kept_is_scaled_up_to_the_same_mean():
    x_BLC = torch.ones(4, 64, 128)
    dropped = dropout(x_BLC, row_keys(0, 0, 4, CPU), 0.2)
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.slow
def test_compiled_masks_are_the_same():
    def mask(keys_B):
        return kept(keys_at(keys_B, 3), 33, 70, 0.5, torch.float32)

    keys_B = row_keys(5, 9, 3, CPU)
    assert torch.equal(torch.compile(mask, fullgraph=True, dynamic=False)(keys_B), mask(keys_B))
