"""Bits per byte of the tokens that were predicted, and of no others."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from corpora_samples import BYTE, a_corpus, a_manifest

from nanorun.config import ModelConfig
from nanorun.data import text_bytes
from nanorun.data.batches import token_set
from nanorun.data.text_bytes import predicted_text
from nanorun.data.tokenizers import make_tokenizer
from nanorun.data.tokenizers.tiktoken_files import gpt2_vocabulary_status
from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.training.distributed import Ranks
from nanorun.training.evaluate import validation_loss

TEXTS = ("Fellow citizens of the Senate,\n" * 9, "naïve café — déjà vu 𝄞 " * 7, "and the rest. " * 20)
needs_gpt2 = pytest.mark.skipif(not gpt2_vocabulary_status()[0], reason="GPT-2's vocabulary is not here")


def encoded(name, texts=TEXTS):
    """Return the tokens of some documents, and their tokenizer."""
    tokenizer = make_tokenizer(name, texts)
    ids = []
    for text in texts:
        ids += [] if tokenizer.eot is None else [tokenizer.eot]
        ids += tokenizer.encode(text).tolist()
    tokens = a_corpus("texts", np.array(ids), tokenizer.to_manifest())
    n_bytes = sum(len(text.encode()) for text in texts)
    return replace(tokens, n_bytes=n_bytes), tokenizer


@pytest.mark.parametrize("name", ["byte", "char", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("n_tokens", [0, 2, 50, 201])
@pytest.mark.parametrize("at_once", [7, 1_000_000])
def test_bytes_are_those_of_the_text_between_the_first_token_and_the_last(
    name, n_tokens, at_once, monkeypatch, tmp_path
):
    monkeypatch.setattr(text_bytes, "TOKENS_AT_ONCE", at_once)
    tokens, tokenizer = encoded(name)
    found = predicted_text(tokens, n_tokens, tmp_path)
    ids = tokens.slice(0, n_tokens or tokens.n_tokens)[1:]
    assert found.exact
    assert found.n_tokens == len(ids)
    assert found.n_bytes == sum(tokenizer.bytes_of(ids[i : i + 1]) for i in range(len(ids)))
    if name == "byte":
        assert found.n_bytes == np.count_nonzero(ids != 256)


def test_of_a_text_of_one_byte_a_token_bits_are_what_they_were_before(tmp_path):
    tokens, _ = encoded("char", (TEXTS[0], TEXTS[2]))
    by_average = 1.8266 / math.log(2) / (tokens.n_bytes / tokens.n_tokens)
    assert predicted_text(tokens, 0, tmp_path).bits_per_byte(1.8266) == pytest.approx(by_average, rel=1e-15)
    assert predicted_text(tokens, 100, tmp_path).bits_per_byte(1.8266) == pytest.approx(by_average, rel=1e-15)


@needs_gpt2
def test_two_tokenizers_are_compared_by_the_same_text(tmp_path):
    """A loss that charges each byte alike, whoever cut the text, is the same number of bits a byte."""
    charged = 0.83  # nats a byte
    for name in ("byte", "gpt2"):
        tokens, tokenizer = encoded(name)
        text = predicted_text(tokens, 0, tmp_path)
        assert text.n_bytes == tokens.n_bytes
        losses = [charged * tokenizer.bytes_of(tokens.slice(i, 1)) for i in range(1, tokens.n_tokens)]
        assert text.bits_per_byte(float(np.mean(losses))) == pytest.approx(charged / math.log(2))


@needs_gpt2
def test_a_model_that_knows_nothing_costs_the_logarithm_of_its_vocabulary_for_each_token(tmp_path):
    found = {}
    for name in ("byte", "gpt2"):
        tokens, tokenizer = encoded(name)
        model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_len=32), tokenizer.vocab_size)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        loss, n_predicted = validation_loss(
            model,
            tokens,
            n_tokens=0,
            context_len=32,
            stride=32,
            device=torch.device("cpu"),
            ranks=Ranks(),
            autocast=torch.autocast("cpu", enabled=False),
        )
        text = predicted_text(tokens, 0, tmp_path)
        assert n_predicted == text.n_tokens
        found[name] = text.bits_per_byte(loss)
        bits = n_predicted * math.log2(tokenizer.vocab_size) / sum(len(one.encode()) for one in TEXTS)
        assert found[name] == pytest.approx(bits, rel=1e-5)
    # By the token gpt2 looks worse (10.8 nats to 5.5), and by the text it is better.
    assert found["gpt2"] < found["byte"]


def without_a_manifest(tokens, monkeypatch):
    return replace(tokens, manifest=None)


def that_cannot_count(tokens, monkeypatch):
    class Guessing(type(make_tokenizer("byte"))):
        counts_bytes = False

    monkeypatch.setattr(text_bytes, "tokenizer_from_manifest", lambda *_: Guessing())
    return tokens


def that_is_not_known_here(tokens, monkeypatch):
    return replace(tokens, manifest=a_manifest("texts", {**BYTE, "name": "sentencepiece"}))


def that_would_be_fetched(tokens, monkeypatch):
    def fetching(*_):
        raise AssertionError("a run fetches nothing")

    monkeypatch.setattr(text_bytes, "is_at_hand", lambda name: False)
    monkeypatch.setattr(text_bytes, "tokenizer_from_manifest", fetching)
    return replace(tokens, manifest=a_manifest("texts", {**BYTE, "name": "gpt2"}))


@pytest.mark.parametrize(
    "of_a_tokenizer",
    [without_a_manifest, that_cannot_count, that_is_not_known_here, that_would_be_fetched],
)
def test_the_splits_average_stands_in_and_says_about(of_a_tokenizer, monkeypatch, tmp_path):
    tokens, _ = encoded("byte")
    found = predicted_text(of_a_tokenizer(tokens, monkeypatch), 101, tmp_path)
    assert not found.exact
    assert found.n_bytes == pytest.approx(100 * tokens.n_bytes / tokens.n_tokens)
    assert found.describe(1.0) == f"about {tokens.n_tokens / tokens.n_bytes / math.log(2):.4f} bits a byte"


def test_without_any_bytes_there_is_no_number(tmp_path):
    found = predicted_text(token_set([np.arange(9)]), 0, tmp_path)
    assert found.bits_per_byte(2.0) is None
    assert found.describe(2.0) == ""


def test_a_tokenizer_that_is_broken_ends_no_run(monkeypatch, tmp_path):
    def broken(*_):
        raise UserError("tokenizer.json is gone")

    tokens, _ = encoded("byte")
    monkeypatch.setattr(text_bytes, "tokenizer_from_manifest", broken)
    assert not predicted_text(tokens, 0, tmp_path).exact
