"""GPT as one block with switches, and the role each of its parameters plays for an optimizer.

Shapes: B rows, T positions, C = n_embd channels, H heads, D = C / H channels per head, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanorun import head, kernels
from nanorun.block import FusedBlock, Settings, suits
from nanorun.documents import attention_in_documents, document_mask
from nanorun.dropout import dropout, kept, keys_at, lines_and_columns
from nanorun.ngrams import NgramEmbedding

if TYPE_CHECKING:
    from collections.abc import Callable

    from nanorun.config import ModelConfig

Role = Literal["embedding", "table", "head", "matrix", "vector"]

Recomputed = Literal["none", "selective", "block"]
"""What the backward pass computes again instead of keeping it: nothing, all but products and attention, or all."""
CHEAPEST_FIRST: tuple[Recomputed, ...] = get_args(Recomputed)

IGNORED_TARGET = -1


class ParameterRole(NamedTuple):
    """What a parameter is to an optimizer: its role, and how many matrices lie stacked in its rows."""

    role: Role
    n_stacked: int


class Rotary(nn.Module):
    """Tables that turn pairs of channels by an angle proportional to the position (arXiv:2104.09864).

    The tables are functions of the shapes, so they are neither saved nor cast: whatever moves the module
    (`to`, `to_empty`, `bfloat16`) leaves them correct and in fp32 on the new device.
    """

    def __init__(self, head_width: int, context_len: int, base: float) -> None:
        super().__init__()
        self.head_width, self.base = head_width, base
        self.register_buffer("cos_T11D", torch.empty(context_len, 1, 1, head_width), persistent=False)
        self.register_buffer("sin_T11D", torch.empty(context_len, 1, 1, head_width), persistent=False)
        self.fill()

    def fill(self) -> None:
        """Compute both tables where they live."""
        device = self.cos_T11D.device
        half = torch.arange(0, self.head_width, 2, dtype=torch.float32, device=device)
        positions = torch.arange(self.cos_T11D.size(0), dtype=torch.float32, device=device)
        angles = torch.outer(positions, self.base ** (-half / self.head_width))[:, None, None, :]
        self.cos_T11D = torch.cat((angles.cos(), angles.cos()), dim=-1)
        # The sign of the second half lets `rotate` be one roll and one multiply-add.
        self.sin_T11D = torch.cat((angles.sin(), -angles.sin()), dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)
        self.fill()
        return self


def rotate(x_BTNHD: Tensor, cos_T11D: Tensor, sin_T11D: Tensor) -> Tensor:
    """Return `x` with each pair (d, d + D/2) turned by its position's angle."""
    turned = x_BTNHD.roll(x_BTNHD.size(-1) // 2, dims=-1)
    return torch.addcmul(x_BTNHD * cos_T11D, turned, sin_T11D).type_as(x_BTNHD)


class SquaredReLU(torch.autograd.Function):
    """relu(x)², with one kernel in the backward pass where autograd takes four (8 times faster on CPU)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rectified = F.relu(x)
        ctx.save_for_backward(rectified)
        return rectified * rectified

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rectified,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, rectified, value=2.0)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the config's norm over the channels. RMSNorm has no weights: the next matrix can hold them."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=False)
    return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """torch's, by one kernel where that suits."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return kernels.RMSNorm.apply(x, self.eps) if kernels.suit(x) else super().forward(x)


class LayerNorm(nn.LayerNorm):
    """torch's, by one kernel where that suits."""

    def forward(self, x: Tensor) -> Tensor:
        if kernels.suit(x, self.weight, self.bias):
            return kernels.LayerNorm.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class Attention(nn.Module):
    """Causal self-attention; Q, K and V are rows 0..C, C..2C and 2C..3C of one weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qk_norm_eps = config.norm_eps if config.qk_norm else None
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x_BTC: Tensor,
        rotary_T11D: tuple[Tensor, Tensor] | None,
        drop_keys_B: Tensor | None,
        documents: Any = None,
    ) -> Tensor:
        n_rows, n_positions, n_embd = x_BTC.shape
        head_width = n_embd // self.n_head
        qkv_BT3HD = self.qkv(x_BTC).view(n_rows, n_positions, 3, self.n_head, head_width)
        qk_BT2HD, v_BTHD = qkv_BT3HD[:, :, :2], qkv_BT3HD[:, :, 2]
        if self.qk_norm_eps is not None:
            qk_BT2HD = F.rms_norm(qk_BT2HD, (head_width,), eps=self.qk_norm_eps)
        if rotary_T11D is not None:
            qk_BT2HD = rotate(qk_BT2HD, *rotary_T11D)
        q_BTHD, k_BTHD = qk_BT2HD.to(v_BTHD.dtype).unbind(dim=2)
        qkv = q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2)
        if documents is not None:
            y_BHTD = attention_in_documents(*qkv, documents)
        elif drop_keys_B is None:
            y_BHTD = F.scaled_dot_product_attention(*qkv, is_causal=True)
        else:
            y_BHTD = attention_under_dropout(*qkv, drop_keys_B, self.dropout)
        return self.proj(y_BHTD.transpose(1, 2).reshape(n_rows, n_positions, n_embd))


def attention_under_dropout(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, drop_keys_B: Tensor, p: float
) -> Tensor:
    """Return causal attention, a share `p` of its weights dropped by row.

    No fused kernel takes a mask of ours, so the (T, T) weights of every head are held in memory.
    """
    n_rows, n_head, n_positions, head_width = q_BHTD.shape
    scores_BHTT = (q_BHTD / math.sqrt(head_width)) @ k_BHTD.transpose(2, 3)
    future_TT = scores_BHTT.new_full((n_positions, n_positions), -math.inf).triu(1)
    weights_BHTT = (scores_BHTT + future_TT).softmax(-1, dtype=torch.float32).to(v_BHTD.dtype)
    kept_BLT = kept(drop_keys_B, n_head * n_positions, n_positions, p, v_BHTD.dtype)
    y_BHTD = (weights_BHTT * kept_BLT.view(n_rows, n_head, n_positions, n_positions)) @ v_BHTD
    return y_BHTD * (1 / (1 - p))


class MLP(nn.Module):
    """Two matrices around the activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        hidden = self.fc(x_BTC)
        if kernels.suit(hidden):
            return self.proj(kernels.Activation.apply(hidden, self.activation))
        if self.activation == "relu2":
            return self.proj(SquaredReLU.apply(hidden))
        return self.proj(F.gelu(hidden, approximate="none" if self.activation == "gelu_exact" else "tanh"))


class Block(nn.Module):
    """Attention, then the MLP, each normalised at its entrance and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout, self.drops_attention = config.dropout, config.attention_dropout
        self.settings = Settings(
            config.n_head,
            config.norm == "layernorm",
            config.norm_eps,
            config.norm_eps if config.qk_norm else None,
            config.activation,
            config.dropout,
        )
        self.norm_1 = make_norm(config)
        self.attn = Attention(config)
        self.norm_2 = make_norm(config)
        self.mlp = MLP(config)
        self.parts = self.norm_1, self.norm_2, self.attn.qkv, self.attn.proj, self.mlp.fc, self.mlp.proj
        self.n_inside = self.mlp.fc.out_features

    def forward(
        self,
        x_BTC: Tensor,
        rotary_T11D: tuple[Tensor, Tensor] | None,
        drop_keys_B: Tensor | None = None,
        documents: Any = None,
    ) -> Tensor:
        keys = [None if drop_keys_B is None else keys_at(drop_keys_B, place) for place in range(3)]
        attention_keys_B = keys[0] if self.drops_attention else None
        parameters = self.in_order()
        if documents is None and suits(x_BTC, self.settings.n_head, self.n_inside, *parameters):
            tables = self.tables(x_BTC, rotary_T11D, attention_keys_B, *keys[1:])
            fused: Tensor = FusedBlock.apply(x_BTC, self.settings, tables, *parameters)
            return fused
        attended_BTC = self.attn(self.norm_1(x_BTC), rotary_T11D, attention_keys_B, documents)
        x_BTC = x_BTC + self.drop(attended_BTC, keys[1])
        return x_BTC + self.drop(self.mlp(self.norm_2(x_BTC)), keys[2])

    def in_order(self) -> tuple[Tensor | None, ...]:
        """Return the parameters in the order of nanorun.block.PARAMETERS."""
        # Not by attributes, each of which a module looks for in three places: this is asked for in every pass.
        return tuple(
            of.get(name) for of in (part._parameters for part in self.parts) for name in ("weight", "bias")
        )

    def tables(
        self,
        x_BTC: Tensor,
        rotary_T11D: tuple[Tensor, Tensor] | None,
        attention_keys_B: Tensor | None,
        proj_keys_B: Tensor | None,
        down_keys_B: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Return what nanorun.block.TABLES names, for an input."""
        _, n_positions, n_embd = x_BTC.shape
        cos_and_sin = rotary_T11D or (None, None)
        of_attention, of_proj, of_down = (None, None), (None, None), (None, None)
        if attention_keys_B is not None:
            of_attention = lines_and_columns(attention_keys_B, self.attn.n_head * n_positions, n_positions)
        if proj_keys_B is not None and down_keys_B is not None:
            of_proj, of_down = (
                lines_and_columns(keys, n_positions, n_embd) for keys in (proj_keys_B, down_keys_B)
            )
        return *cos_and_sin, *of_attention, of_proj[0], *of_down

    def drop(self, x_BTC: Tensor, drop_keys_B: Tensor | None) -> Tensor:
        """Return `x` under dropout, or `x` itself where there is none."""
        return x_BTC if drop_keys_B is None else dropout(x_BTC, drop_keys_B, self.dropout)


_aten: Any = torch.ops.aten
EXPENSIVE = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""What takes longer to compute again than its memory is worth. No batched products: in a block these are the weights
of attention written out, (T, T) for every head (arXiv:2205.05198)."""


def _keep_the_expensive(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(what: Recomputed, block: Block, *args: Any) -> Tensor:
    """Return `block(*args)`, of which the backward pass computes `what` again: "block" or "selective"."""
    options: dict[str, Any] = {}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_the_expensive)
    # Nothing in a block is drawn from a generator whose state would have to be put back.
    y_BTC: Tensor = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **options)
    return y_BTC


class GPT(nn.Module):
    """A decoder whose every difference between GPT-2 and later practice is a field of the config.

    The weights are torch's until `initialise(seed)` sets them. Set `checkpoint_activations` to "block" to
    keep only each block's input for the backward pass and compute the rest again, or to "selective" to keep
    what its matrix products and its attention came to as well: the bits are the same. Set `document_token` to the
    token that begins a document where the config masks documents, and `fp8_head` for a head whose products are in
    FP8 in training.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        assert config.n_embd % config.n_head == 0, (config.n_embd, config.n_head)
        self.config, self.vocab_size = config, vocab_size
        self.checkpoint_activations: Recomputed = "none"
        self.document_token: int | None = None
        self.fp8_head = False
        n_embd = config.n_embd
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(config.context_len, n_embd) if config.positions == "learned" else None
        self.ngrams = None
        if config.ngrams:
            self.ngrams = NgramEmbedding(config.ngrams, config.ngram_buckets, n_embd, vocab_size)
        self.rotary = None
        if config.positions == "rotary":
            assert n_embd // config.n_head % 2 == 0, "rotary positions turn pairs of channels"
            self.rotary = Rotary(n_embd // config.n_head, config.context_len, config.rotary_base)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = make_norm(config)
        self.head = None if config.tied_head else nn.Linear(n_embd, vocab_size, bias=False)

    def forward(
        self, idx_BT: Tensor, targets_BT: Tensor | None = None, drop_keys_B: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits_BTV in fp32; with targets, the summed loss in nats (fp32) and how many it sums.

        Targets of -1 are left out of both. Dividing once, after all micro-batches and ranks, makes the loss
        independent of how the tokens were split. A model with dropout needs the rows' keys to train
        (nanorun.dropout.row_keys), which its masks are functions of.
        """
        x_BTC = self.norm_f(self.hidden(idx_BT, drop_keys_B))
        if targets_BT is None:
            return self.logits(x_BTC)
        logits_NV, targets_N = self.bare_logits(x_BTC.flatten(0, 1)), targets_BT.flatten()
        if kernels.suit(logits_NV):
            cap = self.config.logit_softcap
            loss_sum = kernels.CrossEntropy.apply(logits_NV, targets_N, float(cap), IGNORED_TARGET)
        else:
            logits_NV = self.capped(logits_NV)
            loss_sum = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED_TARGET, reduction="sum")
        return loss_sum, (targets_N != IGNORED_TARGET).sum()

    def hidden(self, idx_BT: Tensor, drop_keys_B: Tensor | None = None) -> Tensor:
        """Return the residual stream after the last block, (B, T, C)."""
        n_positions = idx_BT.size(1)
        if n_positions > self.config.context_len:
            raise ValueError(
                f"{n_positions} positions are more than the model's context of {self.config.context_len}: "
                f"give it at most the last {self.config.context_len} tokens"
            )
        x_BTC = self.wte(idx_BT)
        rotary_T11D = None
        if self.wpe is not None:
            x_BTC = x_BTC + self.wpe.weight[:n_positions]
        if self.rotary is not None:
            rotary_T11D = self.rotary.cos_T11D[:n_positions], self.rotary.sin_T11D[:n_positions]
        drops = bool(self.config.dropout) and self.training
        assert drop_keys_B is not None or not (self.training and self.config.drops), (
            "a model with dropout needs the keys of its rows to train"
        )
        if self.ngrams is not None:
            token = self.document_token if self.config.document_mask else None
            ngram_keys_B = self._ngram_keys(drop_keys_B)
            x_BTC = x_BTC + self.ngrams(idx_BT, ngram_keys_B, self.config.ngram_dropout, token)
        if drops:
            x_BTC = dropout(x_BTC, keys_at(drop_keys_B, len(self.blocks)), self.config.dropout)
        keeps_all = self.checkpoint_activations == "none" or not (self.training and torch.is_grad_enabled())
        documents = self.document_mask(idx_BT, not keeps_all) if self.config.document_mask else None
        fused = not keeps_all and self.is_fused(n_positions)
        for layer, block in enumerate(self.blocks):
            keys_B = keys_at(drop_keys_B, layer) if drops else None
            # What "selective" keeps is all that a fused block ever does.
            if keeps_all or (self.checkpoint_activations == "selective" and fused):
                x_BTC = block(x_BTC, rotary_T11D, keys_B, documents)
            else:
                x_BTC = recomputed(self.checkpoint_activations, block, x_BTC, rotary_T11D, keys_B, documents)
        return x_BTC

    def is_fused(self, n_positions: int) -> bool:
        """Return whether each block is one operation where rows have so many positions.

        By the shapes, and the weights' dtype and device: outside a block's own pass FSDP has its weights in parts.
        """
        like = {"dtype": self.wte.weight.dtype, "device": self.wte.weight.device}
        x_BTC = torch.empty(1, n_positions, self.config.n_embd, **like)
        inside = self.config.mlp_ratio * self.config.n_embd
        return not self.config.document_mask and suits(x_BTC, self.config.n_head, inside)

    def _ngram_keys(self, drop_keys_B: Tensor | None) -> Tensor | None:
        if drop_keys_B is None or not (self.training and self.config.ngram_dropout):
            return None
        return keys_at(drop_keys_B, len(self.blocks) + 1)

    def document_mask(self, idx_BT: Tensor, recompute: bool) -> Any:
        """Return which positions see each other, in blocks where compiled code on CUDA can pass over some."""
        assert self.document_token is not None, "a model that masks documents needs the token that begins one"
        in_blocks = idx_BT.is_cuda and torch.compiler.is_compiling() and not recompute
        return document_mask(idx_BT, self.document_token, in_blocks=in_blocks)

    def logits(self, x_C: Tensor) -> Tensor:
        """Return the scores of the next token in fp32, bent smoothly under ±logit_softcap where it is set."""
        return self.capped(self.bare_logits(x_C))

    def bare_logits(self, x_C: Tensor) -> Tensor:
        """Return the head's products in fp32."""
        weight_VC = self.wte.weight if self.head is None else self.head.weight
        return head.scores(x_C, weight_VC, fp8=self.fp8_head and self.training).float()

    def capped(self, logits_V: Tensor) -> Tensor:
        """Return the logits under the cap, if there is one."""
        cap = self.config.logit_softcap
        return torch.tanh(logits_V / cap) * cap if cap else logits_V

    @torch.no_grad()
    def initialise(self, seed: int, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Set every weight as a function of the seed and the shapes, whatever the device or global state.

        Embeddings are N(0, init_std²), n-grams' tables and biases 0, norm weights 1. Matrices follow one of two
        rules: GPT-2's, N(0, init_std²) with the two projections into the residual stream divided by √(2·n_layer);
        or, under zero_init_projections, those projections 0, an untied head N(0, head_init_std²) and every other
        matrix N(0, 1/(4·fan_in)), whose output has half the size of its input at any width.
        `put` writes what was drawn for a parameter, on the host and whole, into it.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif std := self._init_std(name, parameter):
                drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
                put(parameter, drawn)
            else:
                parameter.zero_()

    def _init_std(self, name: str, parameter: Tensor) -> float:
        config = self.config
        if name in ("wte.weight", "wpe.weight"):
            return config.init_std
        if name == "ngrams.weight":
            return 0.0
        into_residual = name.endswith("proj.weight")
        if config.zero_init_projections:
            if name == "head.weight":
                return config.head_init_std
            return 0.0 if into_residual else 0.5 / math.sqrt(parameter.size(1))
        return config.init_std / math.sqrt(2 * config.n_layer) if into_residual else config.init_std

    def roles(self) -> dict[str, ParameterRole]:
        """Return the role of every parameter by its name.

        A tied head is the embedding's one shared parameter, with the role "embedding". The fused weight of Q,
        K and V counts as three stacked matrices, because Muon must treat them apart.
        """
        roles: dict[str, ParameterRole] = {}
        for name, parameter in self.named_parameters():
            if name in ("wte.weight", "wpe.weight"):
                roles[name] = ParameterRole("embedding", 1)
            elif name == "ngrams.weight":
                roles[name] = ParameterRole("table", 1)
            elif name == "head.weight":
                roles[name] = ParameterRole("head", 1)
            elif parameter.ndim == 2:
                roles[name] = ParameterRole("matrix", 3 if name.endswith("qkv.weight") else 1)
            else:
                roles[name] = ParameterRole("vector", 1)
        return roles

    def n_parameters(self) -> int:
        """Return how many numbers are trained, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, context_len: float = 0) -> int:
        """Return the floating-point operations that training spends per token, forward and backward.

        `context_len` is that of the rows, or its mean over a run that trains on shorter ones; 0 is the config's.
        6·N + 12·n_layer·n_embd·context_len: N counts the weights that multiply activations (all matrices and
        the head, tied or not; no embedding look-up, bias or norm), and the second term is attention's scores
        and sums over the whole context, the masked half included (the convention of the PaLM paper,
        arXiv:2204.02311, appendix B). Recomputing activations is not counted: it trains nothing.
        """
        config = self.config
        n_matmul = self.vocab_size * config.n_embd
        roles = self.roles()
        n_matmul += sum(p.numel() for name, p in self.named_parameters() if roles[name].role == "matrix")
        return 6 * n_matmul + round(12 * config.n_layer * config.n_embd * (context_len or config.context_len))
