"""What holds on a GPU as on a CPU, and the fast paths that are there alone."""

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE
from optim_samples import largest_difference, parameters_of, set_grads
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanorun import head
from nanorun.config import ModelConfig, resolve
from nanorun.data.batches import token_set
from nanorun.documents import attention_in_documents, document_mask
from nanorun.model import GPT
from nanorun.optim import create
from nanorun.optim.build import build_optimizers
from nanorun.optim.matrix_functions import newton_schulz
from nanorun.optim.muon import Muon
from nanorun.tracks import load_track
from nanorun.training.distributed import Ranks
from nanorun.training.step import Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(128, 64), (64, 128), (64, 64), (64, 64)]


@pytest.fixture
def make_cuda_stepper(tiny_settings):
    numbers = np.random.default_rng(0).integers(0, VOCAB_SIZE, 5000)
    tokens = token_set([np.minimum(numbers, np.roll(numbers, 1))])
    made = []

    def make(*settings, device="cuda"):
        config = resolve(load_track("shakespeare-sprint"), "muon", [*tiny_settings, *settings])
        model = GPT(config.model, VOCAB_SIZE)
        model.initialise(0)
        model.to(device)
        model.checkpoint_activations, model.fp8_head = (
            config.train.checkpoint_activations,
            config.train.fp8_head,
        )
        optimizers = build_optimizers(model, config.optim_by_role)
        made.append(Stepper(model, optimizers, tokens, config, device=torch.device(device), ranks=Ranks()))
        made[-1].warm_up()
        return made[-1]

    yield make
    for stepper in made:
        stepper.close()


def losses(stepper, n_steps=6):
    return [float(stepper.step(step, 1.0).loss) for step in range(n_steps)]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fused_optimizers_follow_the_cpu_and_skip_bad_steps(name):
    on_cpu = parameters_of(SHAPES, torch.float32)()
    on_gpu = [torch.nn.Parameter(one.detach().cuda()) for one in on_cpu]
    cpu, gpu = create(name, on_cpu, lr=0.01), create(name, on_gpu, lr=0.01)
    assert gpu.param_groups[0]["fused"]
    for step in range(50):
        set_grads(on_cpu, step)
        bad = step % 7 == 3
        gpu.found_inf = torch.tensor(float(bad), device="cuda")
        for one, other in zip(on_gpu, on_cpu, strict=True):
            one.grad = torch.full_like(one, float("nan")) if bad else other.grad.cuda()
        gpu.step()
        if not bad:
            cpu.step()
    assert largest_difference([one.cpu() for one in on_gpu], on_cpu) < 1e-5


@pytest.mark.parametrize("options", [{}, {"compiled": True}, {"compiled": True, "triton_products": True}])
@pytest.mark.parametrize("coefficients", ["original", "turbo"])
def test_muon_in_bf16_follows_fp32(options, coefficients):
    options = dict(options)
    compiled = options.pop("compiled", False)
    on_cpu = parameters_of(SHAPES, torch.float32)()
    on_gpu = [torch.nn.Parameter(one.detach().cuda()) for one in on_cpu]
    before = [one.detach().clone() for one in on_cpu]
    cpu = Muon(on_cpu, lr=0.02, coefficients=coefficients)
    gpu = Muon(on_gpu, lr=0.02, coefficients=coefficients, **options)
    gpu.compiled = compiled
    for step in range(5):
        set_grads(on_cpu, step)
        for one, other in zip(on_gpu, on_cpu, strict=True):
            one.grad = other.grad.cuda()
        cpu.step()
        gpu.step()
    for one, other, start in zip(on_gpu, on_cpu, before, strict=True):
        assert (one.cpu() - other).norm() < 0.05 * (other - start).norm()


def test_the_triton_kernel_s_products_are_torchs():
    from nanorun.optim.symmetric_products import symmetric_product

    for shape in ((3, 768, 768), (2, 200, 1000), (2, 1000, 200)):
        x = torch.randn(shape, device="cuda").bfloat16()
        addend = x @ x.mT
        for view, other in ((x, addend), (x.mT, None)):
            exact = view.double() @ view.double().mT
            wanted = exact if other is None else 0.5 * exact - 2 * other.double()
            found = symmetric_product(view, other, *((1.0, 0.0) if other is None else (0.5, -2.0)))
            assert torch.equal(found, found.mT)
            assert (found.double() - wanted).norm() < 5e-3 * wanted.norm()


def test_newton_schulz_takes_bf16_there_and_ends_near_fp32():
    grad = torch.randn(2, 64, 128, device="cuda")
    exact = newton_schulz(grad, dtype=torch.float32)
    found = newton_schulz(grad)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.05


def test_fp32_losses_are_those_of_the_cpu(make_cuda_stepper):
    gpu, cpu = (make_cuda_stepper("train.precision=fp32", device=device) for device in ("cuda", "cpu"))
    on_gpu, on_cpu = losses(gpu), losses(cpu)
    assert on_gpu[0] == pytest.approx(on_cpu[0], abs=1e-5)
    # Newton–Schulz is in bf16 on the GPU.
    assert on_gpu == pytest.approx(on_cpu, abs=0.02)


def test_a_compiled_step_has_the_losses_of_a_plain_one(make_cuda_stepper):
    compiled, plain = make_cuda_stepper("model.n_layer=2"), make_cuda_stepper("model.n_layer=2")
    compiled.compile()
    compiled.warm_up()
    assert all(getattr(one, "compiled", True) for one in compiled.optimizers.optimizers)
    assert losses(compiled) == pytest.approx(losses(plain), abs=0.02)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_has_the_host_wait_for_the_device(make_cuda_stepper, compiled):
    stepper = make_cuda_stepper("train.micro_batch_rows=4", "train.grad_clip=1.0")
    if compiled:
        stepper.compile()
        stepper.warm_up()
    losses(stepper, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [stepper.step(step, 1.0) for step in range(2, 5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(result.loss) for result in results)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_give_the_same_losses(make_cuda_stepper, precision):
    kinds = [
        make_cuda_stepper(f"train.checkpoint_activations={kind}", f"train.precision={precision}")
        for kind in ("none", "block")
    ]
    assert losses(kinds[0]) == losses(kinds[1])


def test_attention_takes_a_flash_kernel_as_the_model_calls_it():
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=128, context_len=64), VOCAB_SIZE).cuda()
    idx_BT = torch.randint(VOCAB_SIZE, (2, 64), device="cuda")
    # Where no flash kernel takes the tensors, this raises.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        loss, n = model(idx_BT, idx_BT)
        (loss / n).backward()
    assert torch.isfinite(loss)


def test_compiled_blocks_of_documents_are_the_mask():
    idx_BT = torch.randint(60, (2, 256), device="cuda")
    qkv = torch.randn(3, 2, 2, 256, 64, device="cuda", requires_grad=True)

    def attend(in_blocks):
        return attention_in_documents(*qkv, document_mask(idx_BT, 0, in_blocks=in_blocks))

    towards = torch.randn(2, 2, 256, 64, device="cuda")
    found = torch.compile(attend, dynamic=False)(True)
    expected = attend(False)
    gradients = [torch.autograd.grad((one * towards).sum(), qkv)[0] for one in (found, expected)]
    assert (found - expected).norm() < 5e-3 * expected.norm()
    assert (gradients[0] - gradients[1]).norm() < 5e-3 * gradients[1].norm()


def test_padded_scores_are_those_of_the_vocabulary():
    x, weight = torch.randn(30, 64, device="cuda"), torch.randn(70, 64, device="cuda")
    torch.testing.assert_close(head.scores(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < head.FP8_CAPABILITY,
    reason="needs FP8 units",
)
@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_on_the_device_is_what_the_cpu_computes(compiled):
    found = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, 64, generator=generator).to(device).requires_grad_() for n in (48, 70))

        def product(x, weight):
            return head.scores(x, weight, fp8=True)

        call = torch.compile(product, dynamic=False) if compiled and device == "cuda" else product
        scores = call(x, weight)
        towards = torch.randn(scores.shape, generator=generator).to(device)
        gradients = torch.autograd.grad((scores.float() * towards).sum(), (x, weight))
        found[device] = [one.detach().cpu().float() for one in (scores, *gradients)]
    for one, other in zip(found["cuda"], found["cpu"], strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_training_with_an_fp8_head_ends_near_bf16(make_cuda_stepper):
    if torch.cuda.get_device_capability() < head.FP8_CAPABILITY:
        pytest.skip("needs FP8 units")
    fp8, bf16 = make_cuda_stepper("train.fp8_head=true"), make_cuda_stepper()
    assert losses(fp8) == pytest.approx(losses(bf16), abs=0.05)
