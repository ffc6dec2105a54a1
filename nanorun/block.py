"""A whole block of the model as one operation on a CPU: attention and MLP, forward and backward, in kernels.c.

Each thread takes its own tokens through norm, product, activation and product while they are in its cache, and the
products are the kernels' own: at the widths of a small model they run at 1.1 to 1.3 times the rate of the library's,
which shares each product out anew. What is kept for the backward pass is what products and attention came to; norms,
activation and dropout are computed again from it.

Shapes: as in nanorun/model.py; N = B·T tokens, M channels inside the MLP.
"""

from __future__ import annotations

import ctypes
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
KEPT = ("x", "qkv", "y", "log_sum", "middle", "hidden")
GRADIENTS = tuple(name.replace("weight", "dweight").replace("bias", "dbias") for name in PARAMETERS)
BETWEEN = (
    *("normed_1", "normed_2", "activated", "dhidden", "dmiddle", "dproj", "ddown", "dy", "dqkv", "parts"),
)


class _Fields(ctypes.Structure):
    """Struct Block of kernels.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "C", "H", "M", "layer_norm", "activation", "least")),
        *((name, ctypes.c_float) for name in ("eps", "qk_eps", "scale")),
        *((name, ctypes.c_void_p) for name in (*PARAMETERS, *TABLES, *KEPT, "out", "packed", "grad", "dx")),
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
        n_rows, n_positions, n_embd = x_BTC.shape
        up = parameters[PARAMETERS.index("up_weight")]
        assert up is not None
        new = x_BTC.new_empty
        kept = {
            "x": x_BTC,
            "qkv": new(n_rows, n_positions, 3 * n_embd),
            "y": torch.empty_like(x_BTC),
            "log_sum": new(n_rows, settings.n_head, n_positions),
            "middle": torch.empty_like(x_BTC),
            "hidden": new(n_rows, n_positions, up.size(0)),
        }
        out = torch.empty_like(x_BTC)
        given = dict(zip((*PARAMETERS, *TABLES), (*parameters, *tables), strict=True))
        _call("block", settings, given | kept | {"out": out, "packed": _packed(x_BTC, up.size(0))})
        ctx.save_for_backward(*kept.values(), *parameters, *tables)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        given = dict(zip((*KEPT, *PARAMETERS, *TABLES), ctx.saved_tensors, strict=True))
        x_BTC, hidden = given["x"], given["hidden"]
        n_inside, n_tiles = hidden.size(-1), -(-x_BTC[..., 0].numel() // TILE)
        dropped = [f"d{name}" for name in ("proj", "down") if given[f"{name}_lines"] is not None]
        like_x = ("dx", "normed_1", "normed_2", "dmiddle", "dy", *dropped)
        made = {name: torch.empty_like(x_BTC) for name in like_x}
        made |= {name: torch.empty_like(hidden) for name in ("activated", "dhidden")}
        made |= {"dqkv": torch.empty_like(given["qkv"]), "parts": x_BTC.new_empty(n_tiles, 4, x_BTC.size(-1))}
        made |= {"grad": grad_BTC.contiguous(), "packed": _packed(x_BTC, n_inside)}
        gradients = {
            name: None if given[of] is None else torch.empty_like(given[of])
            for name, of in zip(GRADIENTS, PARAMETERS, strict=True)
        }
        _call("block_backward", ctx.settings, given | made | gradients)
        return made["dx"], None, None, *gradients.values()


def _packed(x_BTC: Tensor, n_inside: int) -> Tensor:
    """Return room for the four weights in panels, whichever way they are turned."""
    n_embd = x_BTC.size(-1)
    wide, inside = -(-n_embd // COLUMNS) * COLUMNS, -(-n_inside // COLUMNS) * COLUMNS
    return x_BTC.new_empty(4 * wide * wide + 2 * wide * inside)


def _call(name: str, settings: Settings, tensors: dict[str, Tensor | None]) -> None:
    """Call a kernel of struct Block, unless on stand-ins."""
    x_BTC, hidden = tensors["x"], tensors["hidden"]
    assert x_BTC is not None
    assert hidden is not None
    if isinstance(x_BTC, FakeTensor):
        return
    fields = _Fields(*x_BTC.shape, settings.n_head, hidden.size(-1), settings.layer_norm)
    fields.activation = ACTIVATIONS.index(settings.activation)
    # Kept is what is drawn from `least` upwards, of all int32.
    fields.least, fields.scale = round(settings.dropout * 2**32) - 2**31, 1 / (1 - settings.dropout)
    fields.eps, fields.qk_eps = (
        settings.norm_eps,
        -1.0 if settings.qk_norm_eps is None else settings.qk_norm_eps,
    )
    for field, tensor in tensors.items():
        if tensor is not None:
            setattr(fields, field, tensor.data_ptr())
    library = kernels.library()
    assert library is not None
    if getattr(library, name)(ctypes.byref(fields)):
        raise MemoryError("out of memory: a thread's share of a block")
