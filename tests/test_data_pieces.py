"""Pieces of long texts: the same however the text was read, and as good to tokenize as the whole."""

from __future__ import annotations

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from nanorun.data.pieces import LONG_CHARS, PIECE_CHARS, cut, cut_stream
from nanorun.data.tokenizers.tiktoken_files import load_encoding

PIECE = 20
# words, spaces of all kinds, scripts without spaces, contractions, digits, combining marks
TEXTS = st.text(st.sampled_from("abZ  \n\r\t\u00a0'sé 中文1२.!\u0301\U0001f600ſ"), max_size=300)


def _in_blocks(text, sizes):
    blocks, begin = [], 0
    for size in sizes:
        blocks.append(text[begin : begin + size])
        begin += size
    return [*blocks, text[begin:]]


@given(TEXTS, st.lists(st.integers(0, 60)))
def test_a_stream_gives_the_pieces_of_the_text_however_it_comes(text, sizes):
    pieces = list(cut(text, PIECE))
    assert "".join(pieces) == text
    assert list(cut_stream(_in_blocks(text, sizes), PIECE)) == pieces


@given(TEXTS)
def test_pieces_have_their_size(text):
    *full, last = list(cut(text, PIECE)) or [""]
    assert all(PIECE <= len(piece) <= 2 * PIECE for piece in full)
    assert len(last) <= 2 * PIECE


@given(TEXTS)
def test_the_first_pieces_of_a_text_do_not_change_when_it_grows_at_its_end(text):
    pieces = list(cut(text, PIECE))
    assert list(cut(text + "x" * PIECE, PIECE))[: len(pieces) - 1] == pieces[:-1]


def test_a_text_that_is_not_long_is_one_piece():
    assert list(cut("")) == []
    assert list(cut("x")) == ["x"]
    words = "ab " * (LONG_CHARS // 3 + 1)
    assert list(cut(words[:LONG_CHARS])) == [words[:LONG_CHARS]]
    assert [len(piece) for piece in cut(words[: LONG_CHARS + 1])] == [PIECE_CHARS + 1, PIECE_CHARS]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("x" * 19 + " a" + "y" * 40, None),
        ("x" * 20 + " a" + "y" * 40, 20),
        ("x" * 27 + " a b" + "y" * 40, 27),
        ("x" * 38 + " ab" + "y" * 40, 38),
        ("x" * 39 + " ab" + "y" * 40, 39),
        ("x" * 40 + " ab" + "y" * 40, 40),
        ("1 " * 40, 21),
        ("é\n" + "中" * 30 + "。\u3000" + "文" * 40, 33),
        ("   " * 30, 40),
        ("中" * 90, 40),
        ("1 2 " * 6 + "word word" + "中" * 40, 28),
    ],
)
def test_where_a_piece_ends(text, end):
    first = next(cut(text, PIECE))
    assert len(first) == (end or 40)


def test_a_piece_ends_after_a_letter_with_a_space_and_a_letter_to_come():
    text = "It was 1859, the best of times; it was the worst of times… " * 40
    *full, _ = cut(text, PIECE)
    assert len(full) > 50
    assert all(piece[-1].isalpha() for piece in full)
    assert all(piece[0] == " " and piece[1].isalpha() for piece in list(cut(text, PIECE))[1:])


LEFT = st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace").decode())
LETTER = st.sampled_from("aZsS")


@given(LEFT, LETTER, LETTER, LEFT)
def test_gpt2_tokens_of_pieces_are_those_of_the_text(before, letter, next_letter, after):
    encode = load_encoding("gpt2").encode_ordinary
    left, right = before + letter, f" {next_letter}{after}"
    assert encode(left) + encode(right) == encode(left + right)


@given(
    st.lists(
        st.sampled_from(["don't", "12", "中文", " ", "\n\n", "word", "naïve", "A.B", "\U0001f600 ", "'s"])
    )
)
def test_gpt2_tokens_of_a_text_cut_between_words_are_those_of_the_whole(parts):
    encode = load_encoding("gpt2").encode_ordinary
    text = " some words in between ".join(parts)
    assert [i for piece in cut(text, PIECE) for i in encode(piece)] == encode(text)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_the_newer_patterns_split_there_too(name, monkeypatch):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
    pattern = regex.compile(getattr(openai_public, name)()["pat_str"])

    @given(LEFT, LETTER, LETTER, LEFT)
    def check(before, letter, next_letter, after):
        left, right = before + letter, f" {next_letter}{after}"
        assert pattern.findall(left) + pattern.findall(right) == pattern.findall(left + right)

    check()
