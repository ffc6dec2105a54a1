"""The head's product: padded as on CUDA, and in FP8 as computed from rounded operands."""

import pytest
import torch

from nanorun import head
from nanorun.config import ModelConfig
from nanorun.errors import UserError
from nanorun.model import GPT


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA, for the path that only shapes things."""

    is_cuda = True


def operands(n_rows=50, n_embd=32, vocab_size=70):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, n_embd, generator=generator)
    weight = torch.randn(vocab_size, n_embd, generator=generator) * 0.1
    return x.requires_grad_(), weight.requires_grad_()


def with_gradients(product, x, weight):
    scores = product(x, weight)
    towards = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    return scores.detach(), *torch.autograd.grad((scores.float() * towards).sum(), (x, weight))


def test_rows_of_zeros_under_the_vocabulary_change_neither_scores_nor_gradients(monkeypatch):
    x, weight = operands()
    plain = with_gradients(head.scores, x, weight)
    real = torch.nn.functional.linear
    shapes = []
    monkeypatch.setattr(
        head.F,
        "linear",
        lambda x, weight: shapes.append(weight.shape) or real(x, weight.as_subclass(torch.Tensor)),
    )
    padded = with_gradients(lambda x, weight: head.scores(x.as_subclass(OnCuda), weight), x, weight)
    assert shapes == [(128, 32)]
    for one, other in zip(padded, plain, strict=True):
        torch.testing.assert_close(one.as_subclass(torch.Tensor), other, rtol=1e-5, atol=1e-5)


def rounded(x, dtype):
    """What a format of that many bits makes of x, written out: the mantissa rounded, the smallest steps kept."""
    bits, smallest = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}[dtype]
    scale = x.abs().max() / torch.finfo(dtype).max
    y = (x / scale).double()
    exponent = torch.floor(torch.log2(y.abs().clamp(min=1e-30))).clamp(min=smallest)
    step = torch.exp2(exponent - bits)
    return torch.round(y / step) * step * scale


def test_fp8_scores_and_gradients_are_products_of_the_rounded_operands():
    x, weight = operands()
    scores, grad_x, grad_weight = with_gradients(lambda *o: head.scores(*o, fp8=True), x, weight)
    towards = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        x8, weight8 = rounded(x, torch.float8_e4m3fn), rounded(weight, torch.float8_e4m3fn)
        expected = (
            x8 @ weight8.T,
            rounded(towards, torch.float8_e5m2) @ weight8,
            towards.double().T @ x.double(),
        )
    for one, other in zip((scores, grad_x, grad_weight), expected, strict=True):
        # What is left is bf16's rounding of the result.
        assert (one.double() - other).norm() < 4e-3 * other.norm()
    exact = x @ weight.T
    assert 0.01 < ((scores - exact).norm() / exact.norm()) < 0.05


def test_fp8_takes_zeros_and_the_largest_numbers():
    zeros = head.scores(torch.zeros(3, 16), torch.zeros(5, 16), fp8=True)
    assert not zeros.any()
    x8, scale = head.to_fp8(torch.tensor([3e38, -3e38, 1.0]), torch.float8_e4m3fn)
    assert torch.equal(x8.float(), torch.tensor([448.0, -448.0, 0.0]))
    assert torch.isfinite(scale)


def test_the_model_s_fp8_head_is_for_training_alone():
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, context_len=16, zero_init_projections=False), 65)
    model.initialise(0)
    idx_BT = torch.arange(16)[None]
    plain = model(idx_BT)
    model.fp8_head = True
    assert not torch.equal(model(idx_BT), plain)
    assert torch.equal(model.eval()(idx_BT), plain)


def test_a_device_without_fp8_and_a_width_that_it_cannot_take_are_refused(monkeypatch):
    with pytest.raises(UserError, match="this cpu device has none"):
        head.refuse_without_fp8(torch.device("cpu"), 64)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, width, named in (
        ((8, 0), 64, "NVIDIA A100 has none"),
        ((9, 0), 24, "multiple of 16, not 24"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(UserError, match=named):
            head.refuse_without_fp8(torch.device("cuda"), width)


def test_a_run_on_a_cpu_with_an_fp8_head_is_refused_before_it_begins(nanorun, shakespeare_folder, tmp_path):
    code, _, err = nanorun(
        *("train", "--track", "shakespeare-sprint", "--optim", "muon", "--data", shakespeare_folder),
        *("--set", "train.fp8_head=true", "--device", "cpu", "--no-record"),
    )
    assert code == 2
    assert "FP8" in err
    assert not list(tmp_path.glob("runs/*"))
