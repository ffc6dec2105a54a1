"""Documents on their way to the tokenizer: copies, splits, long texts."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorun.data import passes
from nanorun.data.passes import Pass, Rule
from nanorun.data.sources import Document, LongText, Reading

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=60)


def _source(texts):
    documents = [Document(f"{place}", text) for place, text in enumerate(texts)]
    return SimpleNamespace(documents=lambda reading: iter(documents))


def _splits(texts, rule=None, **options):
    """Return the texts of each split, and the pass."""
    one = Pass(_source(texts), Reading(), rule, **options)
    found = {"train": [], "val": []}
    for chunk in one.chunks():
        for piece in chunk.pieces:
            if piece.begins:
                found[piece.split].append("")
            found[piece.split][-1] += piece.text
            assert piece.n_bytes == len(piece.text.encode())
    return found, one


def _is_held_out(text):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 20 == 0


@given(TEXTS)
def test_a_document_is_held_out_by_the_hash_of_its_content_alone(texts):
    found, _ = _splits(texts)
    once = list(dict.fromkeys(texts))
    assert found["val"] == [text for text in once if _is_held_out(text)]
    assert found["train"] == [text for text in once if not _is_held_out(text)]


@given(TEXTS, TEXTS)
def test_more_data_moves_no_document_across(texts, more):
    before, _ = _splits(texts)
    after, _ = _splits(more + texts)
    for split in ("train", "val"):
        assert set(before[split]) <= set(after[split])


@given(TEXTS)
def test_copies_that_are_kept_stand_on_one_side(texts):
    found, one = _splits(texts * 2, keep_duplicates=True)
    assert not set(found["train"]) & set(found["val"])
    assert sorted(found["train"] + found["val"]) == sorted(texts * 2)
    assert one.duplicates == 0


@given(TEXTS, st.integers(1, 50))
def test_the_size_of_a_chunk_changes_nothing(texts, chunk_bytes):
    whole, one = _splits(texts)
    before = passes.CHUNK_BYTES
    passes.CHUNK_BYTES = chunk_bytes
    try:
        cut, other = _splits(texts)
    finally:
        passes.CHUNK_BYTES = before
    assert cut == whole
    assert (other.mark, other.duplicates, other.kept) == (one.mark, one.duplicates, one.kept)


def test_the_mark_is_the_hash_of_the_hashes():
    _, one = _splits(["a", "b", "a"])
    lines = "\n".join(hashlib.sha256(text.encode()).hexdigest() for text in ("a", "b"))
    assert one.mark == (3, hashlib.sha256(lines.encode()).hexdigest())


def _alike(is_held_out, n):
    """Return n texts that the rule all sends to one side."""
    texts = (f"text {i}" for i in range(10_000))
    return [text for text in texts if _is_held_out(text) == is_held_out][:n]


@pytest.mark.parametrize(("is_held_out", "empty"), [(False, "val"), (True, "train")])
def test_of_few_documents_one_goes_to_the_split_that_would_be_empty(is_held_out, empty):
    texts = _alike(is_held_out, 5)
    found, one = _splits(texts)
    assert found[empty] == []
    better = one.better_rule()
    found, one = _splits(texts, better)
    assert len(found[empty]) == 1
    assert one.better_rule() is None
    assert _splits(texts[::-1], better)[0][empty] == found[empty]


def test_a_single_document_is_cut_at_a_line_near_its_last_tenth():
    text = "".join(f"line {i}\n" for i in range(100))
    _, one = _splits([text])
    assert one.better_rule() == Rule(cut=True)
    found, one = _splits([text, text], Rule(cut=True))
    assert found["train"][0] + found["val"][0] == text
    assert found["train"][0].endswith("\n")
    assert 0.84 * len(text) < len(found["train"][0]) <= 0.9 * len(text)
    assert one.better_rule() is None


def test_a_text_without_lines_is_cut_at_its_last_tenth():
    found, _ = _splits(["x" * 1000], Rule(cut=True))
    assert [len(found["train"][0]), len(found["val"][0])] == [900, 100]


@given(st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=30), min_size=1, max_size=20))
def test_a_long_text_in_pieces_is_cut_where_it_would_be_whole(pieces):
    text = "".join(pieces)
    whole, one = _splits([text], Rule(cut=True))
    long, other = _splits([LongText(lambda: iter(pieces))], Rule(cut=True))
    assert long == whole
    assert one.mark == other.mark


def test_a_text_too_short_to_cut_names_the_split_that_stays_empty():
    _, one = _splits(["x"], Rule(cut=True))
    with pytest.raises(ValueError, match="train"):
        one.better_rule()


def test_pieces_of_a_long_text_begin_one_document_and_carry_no_mark_but_the_last(monkeypatch):
    monkeypatch.setattr(passes, "CHUNK_BYTES", 4)
    pieces = ["one ", "two ", "three ", "four"]
    one = Pass(_source(["a", LongText(lambda: iter(pieces)), "b"]), Reading(), keep_duplicates=True)
    chunks = list(one.chunks())
    begins = [piece.begins for chunk in chunks for piece in chunk.pieces]
    assert begins == [True, True, False, False, False, True]
    assert [chunk.mark.documents for chunk in chunks if chunk.mark] == [2, 3]
    assert one.kept["train"] + one.kept["val"] == 3


def test_documents_with_a_split_of_their_own_keep_it_and_their_copies():
    documents = [Document("a", "same", "train"), Document("b", "same", "val"), Document("c", "same", "val")]
    one = Pass(SimpleNamespace(documents=lambda reading: iter(documents)), Reading())
    splits = [piece.split for chunk in one.chunks() for piece in chunk.pieces]
    assert splits == ["train", "val", "val"]
