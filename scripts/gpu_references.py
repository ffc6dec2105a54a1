"""Two training steps to set nanorun's beside: the simple speedrun trainer's architecture, and GPT-2 in plain PyTorch.

Both read (idx_BT, targets_BT) of a whole step, cut it into micro-batches and update once. They are ours, written after
the published descriptions: `Simple` has the layers, the optimizers and the 12 plain Newton–Schulz steps of
modded-nanogpt's `train_gpt_simple.py`, compiled as there; `Plain` is GPT-2 with torch's own modules and AdamW.

Shapes: B rows, T positions, C channels, H heads, D channels per head, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Reference(nn.Module):
    """A model with optimizers and a step of its own; `forward` returns the summed loss."""

    optimizers: list[torch.optim.Optimizer]
    micro_batch_rows = 64

    def train_step(self, idx_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the step's mean loss, on the device, after one update."""
        total = torch.zeros((), device=idx_BT.device)
        micro = zip(idx_BT.split(self.micro_batch_rows), targets_BT.split(self.micro_batch_rows))
        for rows, targets in micro:
            with torch.autocast(idx_BT.device.type, torch.bfloat16):
                loss = self(rows, targets)
            (loss / idx_BT.numel()).backward()
            total += loss.detach()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total / idx_BT.numel()


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.gain.type_as(x))


class _SimpleBlock(nn.Module):
    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = _Norm(width), _Norm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor, angles_TD: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attend(self.norm_1(x_BTC), angles_TD)
        return x_BTC + self.down(self.up(self.norm_2(x_BTC)).relu().square())

    def attend(self, x_BTC: Tensor, angles_TD: Tensor) -> Tensor:
        q, k, v = (layer(x_BTC).unflatten(-1, (self.n_head, -1)) for layer in (self.q, self.k, self.v))
        q, k = (_turned(F.rms_norm(one, (one.size(-1),)), angles_TD).transpose(1, 2) for one in (q, k))
        y_BHTD = F.scaled_dot_product_attention(
            q, k.type_as(q), v.transpose(1, 2).type_as(q), is_causal=True, scale=0.12
        )
        return self.out(y_BHTD.transpose(1, 2).flatten(2))


def _turned(x_BTHD: Tensor, angles_TD: Tensor) -> Tensor:
    first, second = x_BTHD.float().chunk(2, dim=-1)
    cos, sin = angles_TD.cos()[:, None], angles_TD.sin()[:, None]
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1).bfloat16()


class Simple(Reference):
    """The architecture of the simple speedrun trainer: biases, gains, half of the rotary pairs still, soft cap."""

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, width: int, context_len: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width).bfloat16()
        self.blocks = nn.ModuleList(_SimpleBlock(width, n_head) for _ in range(n_layer))
        self.norm_in, self.norm_out = _Norm(width), _Norm(width)
        self.head = nn.Linear(width, vocab_size)
        quarter = width // n_head // 4
        frequency = torch.cat((torch.logspace(0, -10, quarter, base=2.0), torch.zeros(quarter)))
        self.register_buffer("angles_TD", torch.outer(torch.arange(context_len).float(), frequency))
        with torch.no_grad():
            for layer in [self.head, *(one for block in self.blocks for one in (block.out, block.down))]:
                layer.weight.zero_()
        self.optimizers = []

    def build_optimizers(self) -> None:
        """Make the optimizers; after the model is where it stays."""
        fused = self.head.weight.is_cuda
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [([self.embed.weight], 0.7), ([self.head.weight], 0.004), (vectors, 0.015)]
        adamw = [{"params": params, "lr": lr} for params, lr in groups]
        self.optimizers = [
            torch.optim.AdamW(adamw, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001, fused=fused),
            PlainMuon([p for p in self.blocks.parameters() if p.ndim == 2], lr=0.025, weight_decay=0.05),
        ]

    def forward(self, idx_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTC = self.norm_in(self.embed(idx_BT))
        for block in self.blocks:
            x_BTC = block(x_BTC, self.angles_TD[: idx_BT.size(1)])
        logits_BTV = self.head(self.norm_out(x_BTC)).float()
        logits_BTV = 15 * logits_BTV * torch.rsqrt(logits_BTV.square() + 225)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")


def plain_update(grad: Tensor, momentum: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new momentum and the update of one matrix: Nesterov's, then 12 cubic-quintic steps in bf16."""
    momentum = momentum.lerp(grad, 1 - beta)
    x = grad.lerp(momentum, beta).bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(12):
        gram = x @ x.mT
        x = 2 * x + (-1.5 * gram + 0.5 * gram @ gram) @ x
    return momentum, (x.mT if tall else x) * max(1.0, grad.size(0) / grad.size(1)) ** 0.5


class PlainMuon(torch.optim.Optimizer):
    """Muon one matrix at a time."""

    update = staticmethod(plain_update)

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    state["beta"] = torch.full((), 0.95, device=parameter.device)
                state["momentum"], update = self.update(parameter.grad, state["momentum"], state["beta"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.type_as(parameter), alpha=-group["lr"])


class Plain(Reference):
    """GPT-2 in torch's own modules, eager, with torch's AdamW as its defaults leave it."""

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, width: int, context_len: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(context_len, width)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, n_head, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(n_layer)
        )
        self.norm = nn.LayerNorm(width)
        self.optimizers = []

    def build_optimizers(self) -> None:
        """Make the optimizer; after the model is where it stays."""
        self.optimizers = [torch.optim.AdamW(self.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)]

    def forward(self, idx_BT: Tensor, targets_BT: Tensor) -> Tensor:
        n_positions = idx_BT.size(1)
        x_BTC = self.wte(idx_BT) + self.wpe.weight[:n_positions]
        mask = nn.Transformer.generate_square_subsequent_mask(n_positions, device=idx_BT.device)
        for block in self.blocks:
            x_BTC = block(x_BTC, mask, is_causal=True)
        logits_NV = F.linear(self.norm(x_BTC), self.wte.weight).flatten(0, 1)
        return F.cross_entropy(logits_NV.float(), targets_BT.flatten(), reduction="sum")
