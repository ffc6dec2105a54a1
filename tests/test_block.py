"""The block as one operation against the block of plain operations, in fp64."""

import ctypes
import dataclasses
import math
import re

import pytest
import torch
from test_model import GPT2, MODERN, VOCAB_SIZE, keys_of_rows, make_tokens

from nanorun import block, kernels
from nanorun.dropout import keys_at
from nanorun.model import GPT

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="no C compiler here")
SIZES = [  # rows, positions, heads, channels of a head
    (5, 16, 3, 16),  # the last tile of tokens is short, and so is the last panel of a weight
    (2, 48, 2, 32),
    (1, 80, 1, 48),
    (
        2,
        144,
        11,
        16,
    ),  # rows of weights that are packed in the backward pass too, and more tokens than are summed at once
]
SHAPES = {
    "gpt2": GPT2,
    "gpt2 without biases": dataclasses.replace(GPT2, bias=False, activation="gelu_exact"),
    "modern": MODERN,
    "mixed": dataclasses.replace(MODERN, norm="layernorm", activation="gelu", bias=True, mlp_ratio=3),
}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(config, **changes):
    model = GPT(dataclasses.replace(config, **changes), VOCAB_SIZE)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.1 * drawn(*parameter.shape, seed=number) + (parameter.ndim == 1))
    return model


def passed(layer, x_BTC, rotary, keys_B):
    """Return what a block makes of an input, and the gradients of a random sum of it."""
    x_BTC = x_BTC.clone().requires_grad_()
    y_BTC = layer(x_BTC, rotary, keys_B)
    y_BTC.backward(drawn(*y_BTC.shape, seed=9).to(y_BTC))
    return [y_BTC.detach(), x_BTC.grad, *(parameter.grad for parameter in layer.parameters())]


def calls_of(monkeypatch):
    """Return the list of the kernels' names that are called from now on."""
    called, real = [], block._call
    monkeypatch.setattr(block, "_call", lambda name, *rest: called.append(name) or real(name, *rest))
    return called


@needs_compiler
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("drops", ["nothing", "all", "all but attention"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_fused_block_is_the_plain_one(config, drops, size, monkeypatch):
    n_rows, n_positions, n_head, head_width = size
    changes = {"n_embd": n_head * head_width, "n_head": n_head, "context_len": n_positions, "n_layer": 1}
    changes |= {"dropout": 0.3 * (drops != "nothing"), "attention_dropout": drops == "all"}
    model = make_model(config, **changes)
    x_BTC = drawn(n_rows, n_positions, n_head * head_width, seed=3)
    keys_B = None if drops == "nothing" else keys_at(keys_of_rows(n_rows), 0)
    rotary = None if model.rotary is None else (model.rotary.cos_T11D, model.rotary.sin_T11D)
    called = calls_of(monkeypatch)
    found = passed(model.blocks[0], x_BTC, rotary, keys_B)
    assert called == ["block", "block_backward"]
    model.zero_grad()
    in_fp64 = None if rotary is None else tuple(table.double() for table in rotary)
    expected = passed(model.double().blocks[0], x_BTC.double(), in_fp64, keys_B)
    assert len(called) == 2
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * scale)


@needs_compiler
@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_the_number_of_threads_does_not_change_the_bits(config):
    model = make_model(config, n_embd=64, n_head=2, context_len=32, dropout=0.3)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            rotary = model.rotary and (model.rotary.cos_T11D, model.rotary.sin_T11D)
            model.zero_grad()
            found.append(passed(model.blocks[0], drawn(7, 32, 64), rotary, keys_of_rows(7)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))


@needs_compiler
def test_a_block_keeps_what_products_and_attention_came_to_and_nothing_else():
    model = make_model(MODERN, n_embd=64, n_head=2, context_len=32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model.blocks[0](drawn(2, 32, 64).requires_grad_(), None)
    held = [x.numel() for x in kept if not isinstance(x, torch.nn.Parameter)]
    # Of a token: x and the middle, three of qkv, attention's, four inside the MLP; and one number for each head.
    assert sum(held) == 2 * 32 * (64 * (2 + 3 + 1 + 4) + 2)


@needs_compiler
def test_nothing_is_computed_again_under_selective_and_all_of_it_under_block(monkeypatch):
    config = dataclasses.replace(MODERN, n_embd=64, dropout=0.2)
    called, found, times = calls_of(monkeypatch), [], []
    for way in ("none", "selective", "block"):
        model, tokens = GPT(config, VOCAB_SIZE), make_tokens()
        model.initialise(0)
        model.checkpoint_activations = way
        model(tokens, tokens.roll(-1, 1), keys_of_rows(3))[0].backward()
        found.append([parameter.grad for parameter in model.parameters()])
        times.append((called.count("block"), called.count("block_backward")))
        called.clear()
    assert times == [(n * config.n_layer, config.n_layer) for n in (1, 1, 2)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


@needs_compiler
def test_what_is_not_a_number_is_carried_on_and_stays_in_its_row():
    model = make_model(MODERN, n_embd=64, n_head=2, context_len=32)
    x_BTC = drawn(3, 32, 64)
    x_BTC[1, 5, 7] = math.nan
    y_BTC = model.blocks[0](x_BTC, None)
    assert y_BTC[1, 5:].isnan().any(dim=-1).all()
    assert y_BTC[[0, 2]].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("n_positions", [15, 16])
def test_shapes_that_it_is_not_made_for_go_the_plain_way(n_positions, monkeypatch):
    called = calls_of(monkeypatch)
    with torch.no_grad():
        make_model(GPT2, n_embd=32, n_head=2).blocks[0](drawn(2, n_positions, 32), None)
        make_model(GPT2, n_embd=32, n_head=4).blocks[0](drawn(2, n_positions, 32), None)
    assert called == ["block"] * (n_positions == 16)


@needs_compiler
def test_a_thread_without_memory_is_an_error_of_memory(monkeypatch):
    class Full:
        block = staticmethod(lambda fields: 1)

    model = make_model(MODERN, n_embd=64, n_head=2)
    monkeypatch.setattr(kernels, "library", Full)
    with pytest.raises(MemoryError, match="a thread's share of a block"):
        model.blocks[0](drawn(2, 16, 64), None)


def test_python_and_c_agree_on_the_fields_and_the_sizes():
    source = kernels.SOURCE.read_text()
    struct = re.search(r"typedef struct \{([^}]*)\} Block;", source)[1]
    fields = []
    for line in re.sub(r"/\*.*?\*/", "", struct, flags=re.DOTALL).split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(?:const )?(\w+) (.*)", line, re.DOTALL).groups()
        for name in re.split(r",\s*", names):
            field = (
                ctypes.c_void_p if "*" in name else {"int64_t": ctypes.c_int64, "float": ctypes.c_float}[kind]
            )
            fields.append((name.strip("* "), field))
    assert fields == block._Fields._fields_
    assert f"#define ROWS {block.TILE}\n" in source
    assert 2 * max(map(int, re.findall(r"#define W (\d+)", source))) == block.COLUMNS
