"""A byte-level BPE trained on a corpus."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.data import bpe
from nanorun.data.bpe import cut_at_words, train_bpe
from nanorun.data.sources import Reading, sotu
from nanorun.data.tokenizers import TiktokenTokenizer, json_file, tokenizer_from_manifest, tokenizer_of_file
from nanorun.errors import UserError

GPT2_PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", regex.V1
)


@pytest.fixture(scope="module")
def addresses():
    return [document.text for document in sotu.documents(Reading())][:40]


@pytest.fixture(scope="module")
def content(addresses):
    return train_bpe(iter(addresses), 1000)


@pytest.fixture(scope="module")
def trained(content):
    return tokenizer_of_file(content, "bpe1000")


def test_the_bytes_come_first_and_the_end_of_text_last(content, trained):
    vocab = json.loads(content)["model"]["vocab"]
    chars = sorted(vocab, key=vocab.get)
    assert sorted(chars[:256]) == sorted(json_file.byte_of_char())
    assert len(vocab) == 999
    assert (trained.vocab_size, trained.eot, trained.counts_bytes) == (1000, 999, True)
    assert trained.decode([999]) == "<|endoftext|>"


def test_the_merges_are_those_of_plain_counting(addresses):
    """The textbook algorithm, on the words that the pattern of GPT-2 finds."""
    text = addresses[0][:3000]
    words = Counter(
        tuple(word.encode()[i : i + 1] for i in range(len(word.encode())))
        for word in GPT2_PATTERN.findall(text)
    )
    merges = json.loads(train_bpe([text], 300))["model"]["merges"]
    byte_of = json_file.byte_of_char()
    assert len(merges) == 300 - 257
    for left, right in merges:
        pair = bytes(map(byte_of.get, left)), bytes(map(byte_of.get, right))
        counts = Counter()
        for word, count in words.items():
            for neighbours in itertools.pairwise(word):
                counts[neighbours] += count
        assert counts[pair] == max(counts.values())
        words = Counter({tuple(_merged(word, pair)): count for word, count in words.items()})


def _merged(word, pair):
    i = 0
    while i < len(word):
        n = 2 if word[i : i + 2] == pair else 1
        yield b"".join(word[i : i + n])
        i += n


def test_it_comes_back_from_its_manifest(trained, tmp_path):
    for name, found in trained.files().items():
        (tmp_path / name).write_bytes(found)
    back = tokenizer_from_manifest(json.loads(json.dumps(trained.to_manifest())), tmp_path)
    assert back.name == "bpe1000"
    assert back.to_manifest() == trained.to_manifest()
    assert back.encode("the Union").tolist() == trained.encode("the Union").tolist()


def test_tiktoken_and_the_library_agree_on_every_address(content, trained, addresses):
    assert isinstance(trained._codec, TiktokenTokenizer)
    library = tokenizers.Tokenizer.from_str(content.decode())
    for text in addresses[::4]:
        assert trained.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def odd(trained):
    """A vocabulary of odd merges: runs of one letter, spaces, and characters of several bytes."""
    texts = [
        "aaaaaaaa aaaa aaaaa bbabab abababab",
        "    \n\n\n\t\t  x",
        "東京東京東京 😀😀😀😀 éééé",
        "'s's''ll 111111",
    ]
    content = train_bpe(texts * 2, 300)
    return tokenizer_of_file(content, "bpe300"), tokenizers.Tokenizer.from_str(content.decode())


letters = st.text(
    alphabet=st.sampled_from(list("ab 1'sl\n\t東京é😀")) | st.characters(exclude_categories=["Cs"])
)


@settings(max_examples=200, deadline=None)
@given(letters)
def test_any_text_round_trips_with_the_ids_of_the_library(odd, trained, text):
    tokenizer, library = odd
    ids = tokenizer.encode(text)
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    for codec in (tokenizer, trained):
        ids = codec.encode(text)
        assert codec.decode(ids) == text
        assert codec.bytes_of(ids) == len(text.encode())


def test_the_file_is_the_same_on_any_number_of_threads(addresses):
    code = (
        "import hashlib, sys; from nanorun.data.bpe import train_bpe; from nanorun.data.sources import Reading, sotu; "
        "texts = (d.text for d, _ in zip(sotu.documents(Reading()), range(8))); "
        "print(hashlib.sha256(train_bpe(texts, 600)).hexdigest())"
    )
    here = hashlib.sha256(train_bpe(addresses[:8], 600)).hexdigest()
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == here


@pytest.mark.parametrize("size", [0, 256, -5, 10_000_000])
def test_sizes_that_make_no_sense_are_refused(size):
    with pytest.raises(UserError, match=rf"--train-bpe {size}: expected 257 .* to 262,144"):
        train_bpe([], size)


def test_the_smallest_vocabulary_has_no_merges():
    tokenizer = tokenizer_of_file(train_bpe(["some text"], 257), "bpe257")
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    assert tokenizer.bytes_of(tokenizer.encode("some text")) == len(tokenizer.encode("some text")) == 9


def test_a_corpus_too_small_is_refused_with_the_number_it_gives():
    text = ["one one two two two"]
    with pytest.raises(
        UserError, match=r"no more than (\d+) entries .* use --train-bpe \1 or less"
    ) as caught:
        train_bpe(text, 4096)
    possible = int(str(caught.value).partition("no more than ")[2].split()[0])
    assert tokenizer_of_file(train_bpe(text, possible), "x").vocab_size == possible
    with pytest.raises(UserError, match=f"no more than {possible} entries"):
        train_bpe(text, possible + 1)


def test_what_the_texts_raise_is_raised():
    def texts():
        yield "a text"
        raise UserError("a.txt: cannot be read")

    with pytest.raises(UserError, match=r"^a\.txt: cannot be read$"):
        train_bpe(texts(), 300)


def test_half_a_surrogate_pair_is_named():
    with pytest.raises(UserError, match="half a surrogate pair"):
        train_bpe(["fine", "ab\ud83d"], 300)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'nanorun\[data\]'"):
        train_bpe(["text"], 300)


def test_the_environment_is_as_it_was(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    train_bpe(["text"], 257)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_an_interruption_ends_the_reading(monkeypatch):
    """It would never end by itself, nor the pool with it."""
    reading = threading.Event()

    def texts():
        while True:
            reading.set()
            yield "text and more text"

    class InterruptedPool(ThreadPoolExecutor):
        def submit(self, *args, **kwargs):
            super().submit(*args, **kwargs)
            reading.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(bpe, "ThreadPoolExecutor", InterruptedPool)
    with pytest.raises(KeyboardInterrupt):
        train_bpe(texts(), 300)


def test_reading_ends_where_memory_would(monkeypatch):
    monkeypatch.setattr(bpe, "MOST_WORD_BYTES", 4000)
    read = []

    def texts():
        for i in range(10_000):
            read.append(i)
            yield f"word{i} again"

    found = train_bpe(texts(), 300)
    assert 100 < len(read) < 10_000
    monkeypatch.setattr(bpe, "MOST_FAMILIAR", 3)
    n_read = len(read)
    read.clear()
    assert train_bpe(texts(), 300) == found
    assert len(read) == n_read


def test_reading_ends_after_so_many_bytes(monkeypatch):
    monkeypatch.setattr(bpe, "MOST_BYTES", 1000)
    read = []

    def texts():
        while True:
            read.append(1)
            yield "ten bytes "

    train_bpe(texts(), 260)
    assert len(read) == 101


@settings(max_examples=50)
@given(st.text(alphabet="ab \n\x1c\u00a0", min_size=1, max_size=400))
def test_pieces_are_the_text_and_cut_no_word_at_a_space(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARS", 20)
        patch.setattr(bpe, "WORD_CHARS", 7)
        pieces = list(cut_at_words(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 20
    for at in itertools.accumulate(map(len, pieces[:-1])):
        if text[at] == " " and not text[at - 1].isspace() and not text[at + 1].isspace():
            words = GPT2_PATTERN.findall
            assert words(text[:at]) + words(text[at:]) == words(text)


def test_pieces_begin_with_the_space_of_a_word_where_there_is_one(monkeypatch):
    monkeypatch.setattr(bpe, "PIECE_CHARS", 12)
    monkeypatch.setattr(bpe, "WORD_CHARS", 5)
    assert list(cut_at_words("one two  three four")) == ["one", " two  three", " four"]
    assert list(cut_at_words("x" * 14 + " y")) == ["xxxxx", "xxxxx", "xx", "xx y"]
