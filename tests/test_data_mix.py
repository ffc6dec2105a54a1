"""Rows of several corpora by weight: exact shares, and a pure function of the row's number."""

from __future__ import annotations

import numpy as np
import pytest
from corpora_samples import BYTE, a_corpus, a_manifest
from hypothesis import given
from hypothesis import strategies as st

from nanorun.data import batches, mix
from nanorun.data.batches import rows_per_epoch, token_set, train_rows
from nanorun.data.mix import (
    BLOCK_ROWS,
    Mix,
    MixPart,
    make_mix,
    mixed_rows,
    normalised,
    rows_of_block,
    training_rows,
)
from nanorun.errors import UserError

CONTEXT = 4
PLACES = {"low": 0, "middle": 10_000, "high": 20_000}
SHARES = {"low": 0.5, "middle": 0.3, "high": 0.2}


def a_mix(shares=SHARES, length=1003) -> Mix:
    """Return a mix of corpora of counting tokens, each in a range of its own, so that a token tells its corpus."""
    tokens = {name: a_corpus(name, PLACES[name] + np.arange(length)) for name in shares}
    return make_mix(shares, tokens, validated_on=a_manifest("low"))


def rows(mixed, first, n, seed=0):
    return mixed_rows(mixed, seed=seed, first_row=first, n_rows=n, context_len=CONTEXT)


def corpus_of(idx_BT):
    return idx_BT[:, 0] // 10_000


def test_each_block_holds_the_share_of_each_corpus_exactly():
    mixed = a_mix()
    for block in range(2):
        counts = np.bincount(corpus_of(rows(mixed, block * BLOCK_ROWS, BLOCK_ROWS)[0]))
        assert counts.tolist() == [32_768, 19_661, 13_107]
    assert {part.name: part.rows for part in mixed.parts} == {"low": 32_768, "middle": 19_661, "high": 13_107}


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_a_block_is_shared_out_to_the_last_row_and_nobody_is_a_row_away_from_their_share(weights):
    shares = list(normalised(dict(enumerate(weights))).values())
    counts = rows_of_block(shares)
    assert sum(counts) == BLOCK_ROWS
    assert all(abs(count - share * BLOCK_ROWS) < 1 for count, share in zip(counts, shares))
    # What a record says of its mix makes the same mix again.
    assert normalised(dict(enumerate(shares))) == dict(enumerate(shares))


def test_a_stretch_of_a_block_has_about_the_shares_too():
    counts = np.bincount(corpus_of(rows(a_mix(), 40_000, 2000)[0])) / 2000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.04)


def test_any_stretch_of_rows_alone_is_that_stretch_of_all_of_them():
    mixed = a_mix()
    first = BLOCK_ROWS - 300
    whole = rows(mixed, first, 600)
    for start, n in ((0, 1), (7, 100), (290, 20), (299, 1), (300, 1), (301, 299)):
        batches._epoch.cache_clear()
        mix._block.cache_clear()
        part = rows(mixed, first + start, n)
        for all_of_them, some in zip(whole, part, strict=True):
            np.testing.assert_array_equal(all_of_them[start : start + n], some)


def test_two_ranks_that_slice_a_step_make_up_the_whole_step():
    mixed = a_mix()
    step = rows(mixed, 96, 16)[0]
    shares = [rows(mixed, 96 + 8 * rank, 8)[0] for rank in (0, 1)]
    np.testing.assert_array_equal(step, np.concatenate(shares))


def test_the_rows_of_a_corpus_in_their_order_are_those_of_its_own_stream_epoch_by_epoch():
    mixed = a_mix()
    idx_BT, targets_BT = rows(mixed, 0, 2000)
    np.testing.assert_array_equal(targets_BT, idx_BT + 1)
    for part in mixed.parts:
        mine = idx_BT[corpus_of(idx_BT) == PLACES[part.name] // 10_000]
        alone = train_rows(
            part.tokens, seed=0, first_row=0, n_rows=len(mine), context_len=CONTEXT, stream=part.stream
        )
        np.testing.assert_array_equal(mine, alone[0])
        per_epoch = rows_per_epoch(part.tokens, CONTEXT)
        assert len(np.unique(mine[:per_epoch])) == per_epoch * CONTEXT


def test_orders_of_two_corpora_and_of_a_corpus_alone_have_nothing_in_common():
    tokens = token_set([np.arange(40_000)])
    orders = [
        train_rows(tokens, seed=3, first_row=0, n_rows=5000, context_len=CONTEXT, stream=stream)[0][:, 0] // 4
        for stream in (0, *(part.stream for part in a_mix().parts))
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one == other) < 0.01
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_blocks_and_seeds_put_the_corpora_at_other_places():
    mixed = a_mix()
    which = [
        corpus_of(rows(mixed, first, 1000, seed)[0]) for first, seed in ((0, 0), (BLOCK_ROWS, 0), (0, 1))
    ]
    for i, one in enumerate(which):
        for other in which[:i]:
            # As often alike as draws by the shares are: 0.5² + 0.3² + 0.2².
            assert np.mean(one == other) == pytest.approx(0.38, abs=0.06)


def test_neither_names_nor_their_order_nor_a_common_factor_of_the_shares_moves_a_row():
    tokens = {name: a_corpus(name, PLACES[name] + np.arange(1003)) for name in SHARES}
    wanted = rows(a_mix(), 0, 500)
    for shares in (
        {"high": 0.2, "middle": 0.3, "low": 0.5},
        {"low": 5.0, "middle": 3.0, "high": 2.0},
    ):
        found = rows(make_mix(shares, tokens, validated_on=a_manifest("low")), 0, 500)
        np.testing.assert_array_equal(wanted, found)
    paths = {"low": "./a", "middle": "./b", "high": "./0"}
    moved = make_mix(
        {paths[name]: share for name, share in SHARES.items()},
        {paths[name]: one for name, one in tokens.items()},
        validated_on=a_manifest("low"),
    )
    np.testing.assert_array_equal(wanted, rows(moved, 0, 500))
    assert moved.identity() == a_mix().identity()


def test_the_mix_is_the_same_in_every_release():
    """Raw Philox draws are fixed by numpy's promise; if this changes, no old run on a mix can be repeated."""
    part_of, rank_of = mix._block(7, 2, (40_000, 20_000, 5536))
    assert part_of[:12].tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert rank_of[:12].tolist() == [0, 1, 0, 2, 1, 3, 4, 5, 6, 7, 8, 9]
    idx_BT = train_rows(token_set([np.arange(100)]), seed=0, first_row=0, n_rows=11, context_len=8, stream=1)[
        0
    ]
    assert idx_BT[:, 0].tolist() == [7, 71, 15, 63, 87, 23, 79, 39, 31, 55, 47]


def test_tokens_without_a_mix_are_read_as_ever():
    tokens = token_set([np.arange(1000)])
    shape = {"seed": 5, "first_row": 30, "n_rows": 20, "context_len": 8}
    np.testing.assert_array_equal(training_rows(tokens, **shape), train_rows(tokens, **shape))


def test_a_corpus_that_is_there_twice_is_refused_by_both_its_names():
    tokens = {name: a_corpus("low", np.arange(100)) for name in ("low", "./elsewhere")}
    with pytest.raises(UserError, match=r"'low' and './elsewhere' are the same corpus; name it once"):
        make_mix({"low": 1.0, "./elsewhere": 1.0}, tokens, validated_on=a_manifest("low"))


def test_a_share_of_less_than_a_row_in_a_block_is_refused():
    with pytest.raises(UserError, match=r"'high' has a share of 2e-06, less than one row in 65,536"):
        a_mix({"low": 1.0, "high": 2e-6})


CHARS = {"name": "char", "vocab_size": 2, "eot": None, "chars": "ab"}


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (
            {**CHARS, "chars": "cd"},
            CHARS,
            r"'char' has those characters that occur .* --set data.tokenizer=byte and: "
            r"nanorun prepare-data novels --tokenizer byte",
        ),
        (
            {"name": "gpt2", "vocab_size": 50257, "eot": 50256},
            BYTE,
            r" in 'gpt2' tokens \(50,257 entries\), while .* 'sotu' in 'byte' tokens \(257 entries\)\. "
            r"Prepare it again.*: nanorun prepare-data novels --tokenizer byte --out DIR",
        ),
        (
            {"name": "bpe4096", "vocab_size": 4096, "eot": 4095, "file": "tokenizer.json", "sha256": "1"},
            {"name": "bpe4096", "vocab_size": 4096, "eot": 4095, "file": "tokenizer.json", "sha256": "2"},
            r"another vocabulary of that name\. .*nanorun prepare-data novels --tokenizer FOLDER/tokenizer.json "
            r"--out DIR \(FOLDER: where 'sotu' lies\)",
        ),
    ],
)
def test_corpora_of_other_vocabularies_are_refused_with_the_command_that_mends_it(theirs, ours, said):
    tokens = {"./novels": a_corpus("novels", np.arange(2), theirs)}
    with pytest.raises(UserError, match=r"share one vocabulary, and './novels' holds 'novels'.*" + said):
        make_mix({"./novels": 1.0}, tokens, validated_on=a_manifest("sotu", ours))


def test_a_mix_is_told_with_the_largest_share_first():
    assert a_mix().describe() == "low 50 %, middle 30 %, high 20 %"


def test_parts_of_one_name_are_told_apart_by_their_hashes():
    parts = [
        MixPart("text", 0.5, sha256, 1, a_corpus("text", np.arange(2))) for sha256 in ("a" * 64, "b" * 64)
    ]
    assert Mix(tuple(parts)).describe() == "text (aaaaaaaa) 50 %, text (bbbbbbbb) 50 %"
