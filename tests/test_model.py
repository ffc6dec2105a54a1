"""The model against transformers' GPT-2, and what each of its switches promises."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorun.config import resolve
from nanorun.dropout import kept, row_keys
from nanorun.model import GPT, SquaredReLU, attention_under_dropout, rotate
from nanorun.tracks import load_track


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of nanorun.config.ModelConfig that the model reads, with GPT-2's values."""

    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    context_len: int = 16
    norm: str = "layernorm"
    positions: str = "learned"
    activation: str = "gelu"
    bias: bool = True
    qk_norm: bool = False
    tied_head: bool = True
    zero_init_projections: bool = False
    logit_softcap: float = 0.0
    dropout: float = 0.0
    attention_dropout: bool = True
    document_mask: bool = False
    rotary_base: float = 10000.0
    ngrams: tuple = ()
    ngram_buckets: int = 4096
    ngram_dropout: float = 0.0
    init_std: float = 0.02
    head_init_std: float = 0.0
    mlp_ratio: int = 4
    norm_eps: float = 1e-5

    @property
    def drops(self):
        return bool(self.dropout or self.ngram_dropout)


GPT2 = Config()
MODERN = Config(
    norm="rmsnorm",
    positions="rotary",
    activation="relu2",
    bias=False,
    qk_norm=True,
    tied_head=False,
    zero_init_projections=True,
    logit_softcap=15.0,
    norm_eps=1e-6,
)
SWITCHES = {
    "norm": "rmsnorm",
    "positions": "rotary",
    "activation": "relu2",
    "bias": False,
    "qk_norm": True,
    "tied_head": False,
    "zero_init_projections": True,
    "logit_softcap": 15.0,
}
VOCAB_SIZE = 50
BOTH = pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])


def make_model(config, seed=0, vary_zeros=True):
    """Return a model; zero-initialised weights are drawn at random unless the test is about them."""
    model = GPT(config, VOCAB_SIZE)
    model.initialise(seed)
    if vary_zeros:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_tokens(n_rows=3, n_positions=16, seed=0):
    return torch.randint(VOCAB_SIZE, (n_rows, n_positions), generator=torch.Generator().manual_seed(seed))


def keys_of_rows(n_rows, first_row=0):
    return row_keys(0, first_row, n_rows, torch.device("cpu"))


def test_logits_and_loss_equal_those_of_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ).eval()
    ours = make_model(GPT2).eval()
    state = ours.state_dict()
    converted = {}
    for name, value in theirs.transformer.state_dict().items():
        for old, new in (
            ("h.", "blocks."),
            ("c_attn", "qkv"),
            ("c_proj", "proj"),
            ("c_fc", "fc"),
            ("ln_", "norm_"),
        ):
            name = name.replace(old, new)
        # transformers stores linear layers as (in, out).
        is_linear = name.endswith("weight") and value.ndim == 2 and not name.startswith(("wte", "wpe"))
        converted[name] = state[name].T if is_linear else state[name]
    originals = theirs.transformer.state_dict()
    theirs.transformer.load_state_dict(dict(zip(originals, converted.values(), strict=True)))
    tokens = make_tokens()
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens)
        assert expected.logits.std() > 0.1
        torch.testing.assert_close(ours(tokens), expected.logits, rtol=0, atol=1e-5)
        loss_sum, n_tokens = ours(tokens[:, :-1], tokens[:, 1:])
        torch.testing.assert_close(loss_sum / n_tokens, expected.loss, rtol=0, atol=1e-5)


def test_gelu_exact_is_by_the_error_function():
    config = dataclasses.replace(GPT2, activation="gelu_exact", bias=False)
    mlp = make_model(config).blocks[0].mlp
    x_TC = torch.linspace(-3, 3, 64).view(2, 32)
    hidden = mlp.fc(x_TC)
    expected = mlp.proj(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
    torch.testing.assert_close(mlp(x_TC), expected, rtol=0, atol=1e-6)
    by_tanh = make_model(dataclasses.replace(config, activation="gelu")).blocks[0].mlp
    assert (by_tanh(x_TC) - expected).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("shape", "expected"), [((12, 12, 768), 124_439_808), ((48, 25, 1600), 1_557_611_200)]
)
def test_parameter_counts_are_those_of_gpt2(shape, expected):
    n_layer, n_head, n_embd = shape
    config = dataclasses.replace(GPT2, n_layer=n_layer, n_head=n_head, n_embd=n_embd, context_len=1024)
    with torch.device("meta"):
        model = GPT(config, 50257)
    assert model.n_parameters() == expected


def test_flops_per_token_follow_the_stated_formula():
    matrices = 2 * 12 * 32 * 32
    attention = 12 * 2 * 32 * 16
    for config in (GPT2, MODERN):
        model = GPT(config, VOCAB_SIZE)
        assert model.flops_per_token() == 6 * (matrices + VOCAB_SIZE * 32) + attention
        assert model.flops_per_token(8) == model.flops_per_token() - attention // 2


def test_flops_at_the_mean_length_of_a_schedule_are_the_mean_of_its_steps_flops():
    config = resolve(load_track("sotu"), "fast")
    with torch.device("meta"):
        model = GPT(config.model, VOCAB_SIZE)
    by_step = [model.flops_per_token(config.length_at(step)) for step in range(config.train.steps)]
    found = model.flops_per_token(config.mean_length())
    assert found == pytest.approx(sum(by_step) / len(by_step), abs=1)
    assert found < model.flops_per_token()
    assert config.mean_length(2) == config.train.length_schedule[0]
    assert resolve(load_track("sotu"), "muon").mean_length() == config.model.context_len


@BOTH
def test_a_token_changes_no_earlier_logits(config):
    model, tokens = make_model(config), make_tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCAB_SIZE
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_modern_switch_works_alone_and_changes_the_result(switch):
    config = dataclasses.replace(GPT2, **{switch: SWITCHES[switch]})
    model = make_model(config, vary_zeros=switch != "zero_init_projections")
    plain = make_model(GPT2, vary_zeros=switch != "zero_init_projections")
    tokens = make_tokens()
    loss_sum, n_tokens = model(tokens[:, :-1], tokens[:, 1:])
    loss_sum.backward()
    assert loss_sum.isfinite()
    assert n_tokens == 3 * 15
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert not torch.allclose(model(tokens), plain(tokens), atol=1e-4)


def test_squared_relu_and_its_gradient_are_those_of_the_formula():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.equal(SquaredReLU.apply(x), torch.relu(x).square())
    assert torch.autograd.gradcheck(SquaredReLU.apply, (x,))


@BOTH
def test_loss_leaves_out_ignored_targets(config):
    model, tokens = make_model(config), make_tokens()
    targets = tokens.roll(-1, dims=1)
    targets[0, :5] = -1
    targets[2, 7:] = -1
    loss_sum, n_tokens = model(tokens, targets)
    log_probs = model(tokens).double().log_softmax(-1)
    kept = targets != -1
    expected = -log_probs[kept].gather(1, targets[kept][:, None]).sum()
    assert loss_sum.dtype == torch.float32
    assert n_tokens == kept.sum() == 34
    torch.testing.assert_close(loss_sum.double(), expected, rtol=1e-5, atol=0)


def test_loss_of_no_targets_is_zero_not_nan():
    loss_sum, n_tokens = make_model(GPT2)(make_tokens(), torch.full((3, 16), -1))
    assert loss_sum == 0
    assert n_tokens == 0


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_blocks_give_the_same_bits(config, dropout):
    tokens = make_tokens()
    results = []
    for mode in ("none", "block", "selective"):
        model = make_model(dataclasses.replace(config, dropout=dropout)).train()
        model.checkpoint_activations = mode
        loss_sum, _ = model(tokens[:, :-1], tokens[:, 1:], keys_of_rows(3))
        torch.manual_seed(len(results))
        loss_sum.backward()
        results.append([loss_sum.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


def test_selective_checkpointing_computes_no_product_of_a_block_again():
    model, tokens = make_model(MODERN), make_tokens()
    n_flops = {}
    for mode in ("none", "selective", "block"):
        model.checkpoint_activations = mode
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens)[0].backward()
        n_flops[mode] = counter.get_total_flops()
    assert n_flops["none"] == n_flops["selective"] < n_flops["block"]


def test_checkpointing_computes_blocks_again_in_the_backward_pass_only_when_training():
    model, tokens = make_model(MODERN), make_tokens()
    model.checkpoint_activations = "block"
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(tokens, tokens)[0].backward()
    assert len(calls) == 2
    model.eval()
    model(tokens, tokens)[0].backward()
    assert len(calls) == 3


def test_dropout_acts_in_training_alone():
    model, tokens, keys_B = make_model(dataclasses.replace(GPT2, dropout=0.5)), make_tokens(), keys_of_rows(3)
    assert not torch.equal(model.train()(tokens, None, keys_B), model.eval()(tokens, None, keys_B))
    assert torch.equal(model(tokens, None, keys_B), model(tokens))


@BOTH
def test_under_dropout_a_row_depends_on_its_own_key_alone_and_on_no_generator(config):
    model, tokens = make_model(dataclasses.replace(config, dropout=0.3)).train(), make_tokens()
    state = torch.get_rng_state()
    with torch.no_grad():
        whole = model(tokens, None, keys_of_rows(3))
        alone = [model(tokens[row : row + 1], None, keys_of_rows(3)[row : row + 1]) for row in range(3)]
        other = model(tokens, None, keys_of_rows(3, first_row=3))
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=1e-5)
    assert float((other - whole).abs().amax(dim=(1, 2)).min()) > 0.01
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("attention", "places_a_layer"), [(True, 3), (False, 2)])
def test_each_place_in_the_network_has_masks_of_its_own(monkeypatch, attention, places_a_layer):
    seen = []

    def watching(keys_B, n_lines, width, p, dtype):
        seen.append(tuple(keys_B.tolist()))
        return kept(keys_B, n_lines, width, p, dtype)

    monkeypatch.setattr("nanorun.dropout.kept", watching)
    monkeypatch.setattr("nanorun.model.kept", watching)
    config = dataclasses.replace(GPT2, dropout=0.3, attention_dropout=attention)
    make_model(config).train()(make_tokens(), None, keys_of_rows(3))
    # The embedding; then, in each of two layers, attention's weights perhaps and two residual branches.
    assert len(seen) == len(set(seen)) == 1 + places_a_layer * 2


def test_attention_under_dropout_is_causal_and_without_any_is_torchs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 12, 8, generator=generator) for _ in range(3))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention_under_dropout(q, k, v, keys_of_rows(3), 0.0), plain)
    before = attention_under_dropout(q, k, v, keys_of_rows(3), 0.4)
    k[:, :, 7], v[:, :, 7] = 9.0, 9.0
    after = attention_under_dropout(q, k, v, keys_of_rows(3), 0.4)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.equal(before[:, :, 7:], after[:, :, 7:])


def test_attention_under_dropout_has_the_mean_of_attention_without():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8, generator=generator).expand(4000, -1, -1, -1) for _ in range(3))
    plain = torch.nn.functional.scaled_dot_product_attention(q[:1], k[:1], v[:1], is_causal=True)
    mean = attention_under_dropout(q, k, v, keys_of_rows(4000), 0.2).mean(0, keepdim=True)
    torch.testing.assert_close(mean, plain, rtol=0, atol=0.05)


@BOTH
def test_initial_weights_depend_on_the_seed_alone(config):
    torch.manual_seed(1)
    first = make_model(config, seed=3, vary_zeros=False)
    torch.manual_seed(2)
    second = make_model(config, seed=3, vary_zeros=False)
    other = make_model(config, seed=4, vary_zeros=False)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.wte.weight, other.wte.weight)


def test_initialise_draws_nothing_from_the_global_generator():
    model = GPT(GPT2, VOCAB_SIZE)
    state = torch.get_rng_state()
    model.initialise(0)
    assert torch.equal(state, torch.get_rng_state())


def test_gpt2_initialisation_has_its_scales():
    model = make_model(dataclasses.replace(GPT2, n_embd=128, n_layer=8), vary_zeros=False)
    assert model.blocks[0].mlp.fc.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for proj in (model.blocks[3].mlp.proj, model.blocks[3].attn.proj):
        assert proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
        assert not proj.bias.any()
    assert torch.equal(model.norm_f.weight, torch.ones(128))


def test_zero_initialised_model_starts_at_the_uniform_loss():
    model, tokens = make_model(MODERN, vary_zeros=False), make_tokens()
    loss_sum, n_tokens = model(tokens[:, :-1], tokens[:, 1:])
    assert (loss_sum / n_tokens).item() == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert model.blocks[0].mlp.fc.weight.std().item() == pytest.approx(0.5 / math.sqrt(32), rel=0.05)
    started = make_model(dataclasses.replace(MODERN, head_init_std=0.3), vary_zeros=False)
    assert started.head.weight.std().item() == pytest.approx(0.3, rel=0.05)


@BOTH
def test_every_parameter_has_one_role(config):
    model = GPT(config, VOCAB_SIZE)
    roles = model.roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        role, n_stacked = roles[name]
        assert (role == "vector") == (parameter.ndim == 1)
        assert n_stacked == (3 if "qkv.weight" in name else 1)
    assert {name for name, (role, _) in roles.items() if role == "head"} == (
        set() if config.tied_head else {"head.weight"}
    )
    assert roles["wte.weight"].role == "embedding"
    assert sum(role == "matrix" for role, _ in roles.values()) == 4 * config.n_layer


def test_rotated_dot_products_depend_on_the_distance_alone():
    rotary = GPT(dataclasses.replace(MODERN, context_len=64), VOCAB_SIZE).rotary
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator).expand(1, 64, 1, 1, 8) for _ in range(2))
    q, k = (rotate(x, rotary.cos_T11D, rotary.sin_T11D)[0, :, 0, 0] for x in (q, k))
    scores_TT = q @ k.T
    for distance in (0, 1, 30):
        diagonal = scores_TT.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores_TT[0, 0] - scores_TT[30, 0]).abs() > 1e-3


def test_rotary_tables_survive_casts_and_the_meta_device():
    with torch.device("meta"):
        model = GPT(MODERN, VOCAB_SIZE)
    model.to_empty(device="cpu")
    model.initialise(0)
    expected = make_model(MODERN, vary_zeros=False)
    assert torch.equal(model.rotary.sin_T11D, expected.rotary.sin_T11D)
    model.bfloat16()
    assert torch.equal(model.rotary.cos_T11D, expected.rotary.cos_T11D)
    assert model(make_tokens()).dtype == torch.float32


@BOTH
def test_shorter_rows_give_the_same_logits_and_longer_ones_are_refused(config):
    model, tokens = make_model(config), make_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"17 positions.*context of 16"):
        model(make_tokens(n_positions=17))


def test_soft_cap_bounds_the_logits():
    model = make_model(dataclasses.replace(GPT2, logit_softcap=2.0))
    with torch.no_grad():
        model.wte.weight.mul_(100)
        logits = model(make_tokens())
    assert logits.abs().max() <= 2.0
    assert logits.abs().max() > 1.9
