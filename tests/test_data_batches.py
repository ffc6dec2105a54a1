"""Training rows as a pure function of the row's number; validation that predicts each token once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.data import batches
from nanorun.data.batches import (
    TokenSet,
    n_validation_windows,
    rows_per_epoch,
    token_set,
    train_rows,
    validation_rows,
)
from nanorun.data.readahead import MappedArray, mapped_array
from nanorun.data.shards import HEADER_BYTES, open_shard, write_shard
from nanorun.errors import UserError


def _counting(n, n_shards=1):
    """Tokens 0, 1, 2, …: a token is its own place."""
    return token_set(np.array_split(np.arange(n), n_shards), name="counting")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slices_run_across_shards(data):
    n = data.draw(st.integers(1, 60))
    tokens = _counting(n, data.draw(st.integers(1, 8)))
    start = data.draw(st.integers(0, n))
    length = data.draw(st.integers(0, n - start))
    found = tokens.slice(start, length)
    assert found.dtype == np.int64
    assert found.tolist() == list(range(start, start + length))


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_slices_outside_the_tokens_are_refused(start, length):
    with pytest.raises(IndexError):
        _counting(10, 3).slice(start, length)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 2**40), st.integers(1, 4))
def test_an_epoch_visits_each_window_once_and_no_token_twice(context_len, extra, seed, n_shards):
    tokens = _counting(2 * context_len + extra, n_shards)
    per_epoch = rows_per_epoch(tokens, context_len)
    for epoch in range(3):
        idx_BT, targets_BT = train_rows(
            tokens, seed=seed, first_row=epoch * per_epoch, n_rows=per_epoch, context_len=context_len
        )
        assert idx_BT.shape == targets_BT.shape == (per_epoch, context_len)
        assert idx_BT.dtype == targets_BT.dtype == np.int64
        np.testing.assert_array_equal(targets_BT, idx_BT + 1)
        seen = np.sort(idx_BT, axis=None)
        phase = seen[0]
        assert 0 <= phase < context_len
        np.testing.assert_array_equal(seen, np.arange(phase, phase + per_epoch * context_len))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_gathered_at_once_are_those_sliced_one_by_one(data):
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    context_len = data.draw(st.integers(1, 9))
    n = sum(lengths)
    if n < 2 * context_len:
        return
    shards = np.split(np.arange(n), np.cumsum(lengths)[:-1])
    tokens = token_set([shard.astype(np.uint16) for shard in shards], name="uneven")
    seed, first = data.draw(st.integers(0, 99)), data.draw(st.integers(0, 100))
    rows = data.draw(st.integers(1, 40))
    found = train_rows(tokens, seed=seed, first_row=first, n_rows=rows, context_len=context_len)
    per_epoch = rows_per_epoch(tokens, context_len)
    for i in range(rows):
        epoch, place = divmod(first + i, per_epoch)
        phase, order = batches._epoch(seed, epoch, per_epoch, context_len, 0)
        row = tokens.slice(phase + int(order[place]) * context_len, context_len + 1)
        np.testing.assert_array_equal(found[0][i], row[:-1])
        np.testing.assert_array_equal(found[1][i], row[1:])
    assert all(one.dtype == np.int64 and one.flags.c_contiguous for one in found)


def test_rows_on_disk_are_asked_for_before_the_first_is_read(tmp_path, monkeypatch):
    numbers = np.arange(60_000)
    paths = [tmp_path / "0.bin", tmp_path / "1.bin"]
    for path, part in zip(paths, np.split(numbers, [25_000]), strict=True):
        write_shard(path, part.astype(np.uint16))
    tokens = token_set([np.asarray(open_shard(path)) for path in paths])
    asked = []
    monkeypatch.setattr(MappedArray, "ask_for", lambda self, *span: asked.append((self, *span)))
    gathered = TokenSet._gathered
    at_the_first = []
    monkeypatch.setattr(
        TokenSet, "_gathered", lambda *words: (at_the_first.append(len(asked)), gathered(*words))[1]
    )
    shape = {"seed": 1, "first_row": 7, "n_rows": 50, "context_len": 16}
    idx_BT, _ = train_rows(tokens, **shape)
    assert at_the_first == [50, 50]
    for row, (mapped, first_byte, n_bytes) in zip(idx_BT, asked, strict=True):
        begin = mapped.start + first_byte
        assert mapped.start == HEADER_BYTES
        # What was asked for is the row itself, but for what lies in the next shard.
        held = np.frombuffer(mapped.mapping[begin : begin + n_bytes], dtype="<u2")
        np.testing.assert_array_equal(held[:16], row[: len(held)])
    monkeypatch.undo()
    in_memory = train_rows(token_set(np.split(numbers, [25_000])), **shape)
    np.testing.assert_array_equal(in_memory[0], train_rows(tokens, **shape)[0])


def test_asking_beyond_the_end_of_a_file_or_of_an_array_in_memory_does_no_harm(tmp_path):
    assert mapped_array(np.arange(9)[2:]) is None
    write_shard(tmp_path / "0.bin", np.arange(9000, dtype=np.uint16))
    mapped = mapped_array(np.asarray(open_shard(tmp_path / "0.bin")))
    assert mapped is not None
    mapped.ask_for(17_000, 10**9)
    mapped.ask_for(10**9, 5)


def test_tokens_beyond_uint16_come_out_as_they_are():
    numbers = np.arange(65_000, 70_000)
    narrow, wide = (token_set(np.array_split(numbers.astype(kind), 3)) for kind in (np.int64, np.uint32))
    shape = {"seed": 2, "first_row": 100, "n_rows": 300, "context_len": 16}
    for one, other in zip(train_rows(narrow, **shape), train_rows(wide, **shape), strict=True):
        np.testing.assert_array_equal(one, other)
        assert other.max() > 2**16
    assert wide.slice(4990, 10).tolist() == list(range(69_990, 70_000))


def test_rows_are_a_function_of_their_number():
    tokens = _counting(1000, 3)
    many = train_rows(tokens, seed=7, first_row=0, n_rows=300, context_len=8)
    for first, n in ((0, 1), (5, 40), (100, 60), (123, 7), (240, 60)):
        batches._epoch.cache_clear()
        some = train_rows(tokens, seed=7, first_row=first, n_rows=n, context_len=8)
        for whole, part in zip(many, some, strict=True):
            np.testing.assert_array_equal(whole[first : first + n], part)


def test_ranks_that_slice_a_step_make_up_the_whole_step():
    tokens = _counting(500)
    step = train_rows(tokens, seed=1, first_row=40, n_rows=8, context_len=16)[0]
    ranks = [train_rows(tokens, seed=1, first_row=40 + 4 * r, n_rows=4, context_len=16)[0] for r in (0, 1)]
    np.testing.assert_array_equal(step, np.concatenate(ranks))


def test_seeds_and_epochs_give_other_orders_and_phases():
    tokens = _counting(5000)
    per_epoch = rows_per_epoch(tokens, 32)
    orders = [
        train_rows(tokens, seed=seed, first_row=epoch * per_epoch, n_rows=per_epoch, context_len=32)[0]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    for i, one in enumerate(orders):
        assert not np.array_equal(np.sort(one[:, 0]), one[:, 0])
        for other in orders[:i]:
            assert np.mean(one == other) < 0.1
    assert len({int(order.min()) for order in orders}) > 1


def test_the_order_is_the_same_in_every_release():
    """Raw Philox draws are fixed by numpy's promise; if this changes, no old run can be repeated."""
    idx_BT, _ = train_rows(_counting(100), seed=0, first_row=0, n_rows=11, context_len=8)
    assert idx_BT[:, 0].tolist() == [11, 83, 67, 3, 59, 35, 27, 19, 75, 43, 51]


def test_a_corpus_too_small_for_its_context_is_refused_with_numbers():
    assert rows_per_epoch(_counting(128), 64) == 1
    with pytest.raises(UserError, match=r"127 tokens are too few for a context of 64, .* at least 128"):
        train_rows(_counting(127), seed=0, first_row=0, n_rows=1, context_len=64)


def _all_windows(tokens, **shape):
    n = n_validation_windows(tokens, **shape)
    return validation_rows(tokens, **shape, first_window=0, n_windows=n)


@pytest.mark.parametrize("context_len", [1, 2, 3, 5, 8])
def test_validation_predicts_every_token_but_the_first_exactly_once(context_len):
    """Every size up to a few windows, every stride: from earlier tokens only, with the promised context."""
    for n_tokens in range(2, 4 * context_len + 4):
        tokens = _counting(n_tokens + 5, 3)
        for stride in range(1, context_len + 1):
            idx_BT, targets_BT = _all_windows(
                tokens, n_tokens=n_tokens, context_len=context_len, stride=stride
            )
            rows, columns = np.nonzero(targets_BT >= 0)
            predicted = targets_BT[rows, columns]
            assert sorted(predicted) == list(range(1, n_tokens))
            np.testing.assert_array_equal(idx_BT[rows, columns], predicted - 1)
            for row, column, target in zip(rows, columns, predicted, strict=True):
                # What the model may look at: the row up to here, a gapless stretch that ends just before
                # the target.
                seen = idx_BT[row, : column + 1]
                np.testing.assert_array_equal(seen, np.arange(target - len(seen), target))
                assert len(seen) >= min(target, context_len - stride + 1)
            assert (targets_BT >= 0).any(axis=1).all(), "no window is in vain"


def test_validation_windows_without_overlap_are_plain_consecutive_blocks():
    idx_BT, targets_BT = _all_windows(_counting(11), n_tokens=None, context_len=4, stride=4)
    assert idx_BT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert targets_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, -1, -1]]


def test_validation_in_pieces_equals_the_whole_and_pads_past_the_end():
    tokens, shape = _counting(100, 2), {"n_tokens": 90, "context_len": 8, "stride": 5}
    n = n_validation_windows(tokens, **shape)
    whole = _all_windows(tokens, **shape)
    pieces = [validation_rows(tokens, **shape, first_window=w, n_windows=4) for w in range(0, n, 4)]
    for kind in (0, 1):
        together = np.concatenate([piece[kind] for piece in pieces])
        np.testing.assert_array_equal(together[:n], whole[kind])
    assert len(together) > n
    assert (together[n:] == -1).all()


@pytest.mark.parametrize("n_tokens", [0, 1, 101])
def test_validation_on_an_impossible_number_of_tokens_is_refused(n_tokens):
    with pytest.raises(UserError, match=rf"validation on {n_tokens} tokens .* there are 100"):
        n_validation_windows(_counting(100), n_tokens=n_tokens, context_len=8, stride=8)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(UserError, match=f"stride of {stride} does not fit a context of 8"):
        n_validation_windows(_counting(100), n_tokens=None, context_len=8, stride=stride)
