"""A whole block of the model as one operation on a CPU: attention and MLP, forward and backward, in kernels.c.

Each thread takes its own tokens through norm, product, activation and product while they are in its cache, and the
products are the kernels' own: at the widths of a small model they run at 1.1 to 1.3 times the rate of the library's,
which shares each product out anew. What is kept for the backward pass is what products and attention came to; norms,
activation and dropout are computed again from it.

Shapes: as in nanorun/model.py; N = B·T tokens, M channels inside the MLP.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from nanorun import kernels

LONGEST, WIDEST_HEAD = 1024, 128
"""Positions and channels up to which a head's share of attention stays in a thread's cache; beyond, torch's tiles are
faster."""
TILE = 48
"""Tokens that a thread takes through a chain of products at once: ROWS of kernels.c."""
COLUMNS = 32
"""Columns of a weight that lie together when it is packed: at least PANEL of kernels.c."""
ACTIVATIONS = ("gelu", "gelu_exact", "relu2")
"""By the numbers that kernels.c knows them by."""
PARAMETERS = (
    *("norm_1_weight", "norm_1_bias", "norm_2_weight", "norm_2_bias"),
    *(
        "qkv_weight",
        "qkv_bias",
        "proj_weight",
        "proj_bias",
        "up_weight",
        "up_bias",
        "down_weight",
        "down_bias",
    ),
)
TABLES = ("cos", "sin", "attention_lines", "attention_columns", "proj_lines", "down_lines", "columns")
KEPT = ("qkv", "y", "log_sum", "middle", "hidden")
GRADIENTS = tuple(name.replace("weight", "dweight").replace("bias", "dbias") for name in PARAMETERS)
BETWEEN = (
    *("normed_1", "normed_2", "dmiddle", "dproj", "ddown", "dy", "activated", "dhidden", "dqkv", "parts"),
)


class _Fields(ctypes.Structure):
    """Struct Block of kernels.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "C", "H", "M", "layer_norm", "activation", "least")),
        *((name, ctypes.c_float) for name in ("eps", "qk_eps", "scale")),
        *(
            (name, ctypes.c_void_p)
            for name in (*PARAMETERS, *TABLES, "x", *KEPT, "out", "packed", "grad", "dx")
        ),
        *((name, ctypes.c_void_p) for name in (*GRADIENTS, *BETWEEN)),
    ]


class Settings(NamedTuple):
    """What a block is, its shapes aside."""

    n_head: int
    layer_norm: bool
    """Else RMSNorm, without weights."""
    norm_eps: float
    qk_norm_eps: float | None
    activation: str
    dropout: float


def suits(x_BTC: Tensor, n_head: int, n_inside: int, *parameters: Tensor | None) -> bool:
    """Return whether `FusedBlock` can take this input and these parameters here and now."""
    _, n_positions, n_embd = x_BTC.shape
    head_width = n_embd // n_head
    in_vectors = n_positions % 16 == head_width % 16 == n_inside % 16 == 0
    in_cache = n_positions <= LONGEST and head_width <= WIDEST_HEAD
    return in_vectors and in_cache and kernels.suit(x_BTC, *parameters)


class FusedBlock(torch.autograd.Function):
    """What nanorun.model.Block makes of x (B, T, C), by its parameters in the order of PARAMETERS.

    `tables` are those of TABLES: cos and sin (T, D) of rotary positions; the lines and columns of nanorun.dropout for
    the weights of attention and for what both projections made. A parameter or table that is None is left out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        settings: Settings,
        tables: tuple[Tensor | None, ...],
        *parameters: Tensor | None,
    ) -> Tensor:
        # One piece of memory for all that is kept, and one for all that is not: a call costs by the tensor.
        n_inside = _n_inside(parameters)
        out, packed = torch.empty_like(x_BTC), _packed(x_BTC, n_inside)
        kept = x_BTC.new_empty(sum(_kept(x_BTC, settings.n_head, n_inside)))
        given = (x_BTC, kept, *parameters, *tables)
        _call("block", settings, given, {"out": out, "packed": packed})
        ctx.save_for_backward(*given)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        x_BTC, parameters = given[0], given[2 : 2 + len(PARAMETERS)]
        dx, grad_BTC, packed = (
            torch.empty_like(x_BTC),
            grad_BTC.contiguous(),
            _packed(x_BTC, _n_inside(parameters)),
        )
        between = x_BTC.new_empty(sum(_between(x_BTC, _n_inside(parameters))))
        gradients = [None if one is None else torch.empty_like(one) for one in parameters]
        made = {"grad": grad_BTC, "dx": dx, "packed": packed, "between": between}
        _call("block_backward", ctx.settings, given, made | dict(zip(GRADIENTS, gradients, strict=True)))
        return dx, None, None, *gradients


def _n_inside(parameters: Sequence[Tensor | None]) -> int:
    """Return the channels inside the MLP, M."""
    up = parameters[PARAMETERS.index("up_weight")]
    assert up is not None
    return up.size(0)


def _kept(x_BTC: Tensor, n_head: int, n_inside: int) -> tuple[int, ...]:
    """Return how many numbers each of KEPT has, in order."""
    n_rows, n_positions, n_embd = x_BTC.shape
    n = n_rows * n_positions
    return 3 * n * n_embd, n * n_embd, n * n_head, n * n_embd, n * n_inside


def _between(x_BTC: Tensor, n_inside: int) -> tuple[int, ...]:
    """Return how many numbers each of BETWEEN has, in order."""
    n_embd = x_BTC.size(-1)
    numbers = x_BTC.numel()
    n = numbers // n_embd
    of_x = (numbers,) * 6
    return *of_x, n * n_inside, n * n_inside, 3 * numbers, -(-n // TILE) * 4 * n_embd


def _packed(x_BTC: Tensor, n_inside: int) -> Tensor:
    """Return room for the four weights in panels, whichever way they are turned."""
    n_embd = x_BTC.size(-1)
    wide, inside = -(-n_embd // COLUMNS) * COLUMNS, -(-n_inside // COLUMNS) * COLUMNS
    return x_BTC.new_empty(4 * wide * wide + 2 * wide * inside)


def _call(
    name: str, settings: Settings, given: Sequence[Tensor | None], made: dict[str, Tensor | None]
) -> None:
    """Call a kernel of struct Block, unless on stand-ins; `given` are x, what is kept, PARAMETERS and TABLES."""
    x_BTC, kept, *rest = given
    assert x_BTC is not None
    assert kept is not None
    if isinstance(x_BTC, FakeTensor):
        return
    n_inside = _n_inside(rest)
    fields = _Fields(*x_BTC.shape, settings.n_head, n_inside, settings.layer_norm)
    fields.activation = ACTIVATIONS.index(settings.activation)
    # Kept is what is drawn from `least` upwards, of all int32.
    fields.least, fields.scale = round(settings.dropout * 2**32) - 2**31, 1 / (1 - settings.dropout)
    fields.eps, fields.qk_eps = (
        settings.norm_eps,
        -1.0 if settings.qk_norm_eps is None else settings.qk_norm_eps,
    )
    fields.x = x_BTC.data_ptr()
    _place(fields, KEPT, _kept(x_BTC, settings.n_head, n_inside), kept)
    between = made.pop("between", None)
    if between is not None:
        _place(fields, BETWEEN, _between(x_BTC, n_inside), between)
    for field, tensor in (*zip((*PARAMETERS, *TABLES), rest, strict=True), *made.items()):
        if tensor is not None:
            setattr(fields, field, tensor.data_ptr())
    library = kernels.library()
    assert library is not None
    if getattr(library, name)(ctypes.byref(fields)):
        raise MemoryError("out of memory: a thread's share of a block")


def _place(fields: _Fields, names: Sequence[str], numbers: Sequence[int], memory: Tensor) -> None:
    """Have the fields point to one place of the memory behind the other."""
    address = memory.data_ptr()
    for name, n in zip(names, numbers, strict=True):
        setattr(fields, name, address)
        address += 4 * n
