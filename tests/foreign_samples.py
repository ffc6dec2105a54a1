"""Token files as other programs write them, by a plain statement of each form."""

from __future__ import annotations

import pickle
import struct

import numpy as np

EOT = 50256


def write_llmc(path, tokens, *, magic=20240520, version=1, n_tokens=None, wide=False):
    """256 int32 and the tokens: as uint16, or wide, as llm.c does for larger vocabularies."""
    if wide:
        magic, version = 20240801, 7
    header = struct.pack("<256i", magic, version, len(tokens) if n_tokens is None else n_tokens, *[0] * 253)
    path.write_bytes(header + np.asarray(tokens, dtype="<u4" if wide else "<u2").tobytes())
    return path


def write_nanogpt(folder, text, *, chars=None, protocol=4, held_out=0.1):
    """The files of nanoGPT's character corpora: bare ids, and a pickled table of characters."""
    folder.mkdir(parents=True, exist_ok=True)
    chars = sorted(set(text)) if chars is None else chars
    stoi = {char: i for i, char in enumerate(chars)}
    ids = np.array([stoi[char] for char in text], dtype=np.uint16)
    cut = int(len(ids) * (1 - held_out))
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=protocol))
    return ids


def write_datatrove(
    path, documents, *, token_size=2, tokenizer="gpt2", index=True, metadata=True, loss=False
):
    """One tokenized file of datatrove: tokens, where documents end, and three lines about them."""
    ends = np.cumsum([len(document) for document in documents])
    n_tokens = int(ends[-1]) if len(ends) else 0
    tokens = np.concatenate([np.asarray(d) for d in documents]) if documents else np.empty(0)
    path.write_bytes(tokens.astype(f"<u{token_size}").tobytes())
    if index:
        path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends.tolist()))
    if metadata:
        path.with_name(f"{path.name}.metadata").write_text(metadata_lines(tokenizer, token_size, n_tokens))
    if loss:
        path.with_name(f"{path.name}.loss").write_bytes(b"\1" * n_tokens)
    return tokens.astype(np.int64)


def metadata_lines(tokenizer, token_size, n_tokens):
    """The count's third line has three digits: 512 T, 12.3 kT."""
    power = 0 if n_tokens < 1000 else 3 if n_tokens < 1_000_000 else 6
    value = n_tokens / 10**power
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{tokenizer}|{token_size}\n{n_tokens}\n{value:.{digits}f} {['', 'k', 'M'][power // 3]}T"


def documents(n, *, seed=0, eot_first=False, largest=50255, eot=EOT):
    """Some documents of a few dozen made-up ids, each with an end of text."""
    random = np.random.default_rng(seed)
    bodies = [random.integers(0, largest, int(length)).tolist() for length in random.integers(5, 60, n)]
    return [[eot, *body] if eot_first else [*body, eot] for body in bodies]


def joined(documents):
    return np.concatenate([np.asarray(document) for document in documents])


def flipped(content, place, bit):
    """The bytes of `content` with one bit the other way."""
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)
