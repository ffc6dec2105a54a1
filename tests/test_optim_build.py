"""Names, options and roles to optimizers, and the set that is stepped as one."""

import inspect
import io
import subprocess
import sys

import pytest
import torch
from test_model import GPT2, MODERN, VOCAB_SIZE, make_model, make_tokens

import nanorun.optim
from nanorun.errors import UserError
from nanorun.optim.build import algorithms, build_optimizers, create, find_algorithm
from nanorun.optim.options import REQUIRED

MUON_AND_ADAMW = {
    "matrix": {"name": "muon", "lr": 0.02, "weight_decay": 0.1},
    "default": {"name": "adamw", "lr": 0.004, "betas": [0.8, 0.95]},
}
MUON_WARMING = {**MUON_AND_ADAMW, "matrix": {**MUON_AND_ADAMW["matrix"], "momentum_warmup_steps": 5}}
CONFIGS = {
    "muon": MUON_AND_ADAMW,
    "muon_warm_up": MUON_WARMING,
    "adam": {"default": {"name": "adam", "lr": 0.004}},
    "amsgrad": {"default": {"name": "adam", "lr": 0.004, "amsgrad": True}},
    "adamw": {"default": {"name": "adamw", "lr": 0.004}},
    "outside": {"default": {"name": "torch.optim:RMSprop", "lr": 0.001, "momentum": 0.9}},
}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def train(model, optimizers, steps, skip=None, start=0):
    for step in range(start, start + steps):
        tokens = make_tokens(seed=step)
        loss_sum, n_tokens = model(tokens[:, :-1], tokens[:, 1:])
        (loss_sum / n_tokens).backward()
        optimizers.step(skip)
        optimizers.zero_grad()


def bits(model, optimizers):
    """Return copies of all parameters and state tensors, in a fixed order."""
    tensors = dict(model.named_parameters())
    for number, optimizer in enumerate(optimizers.state_dict()["optimizers"]):
        for index, state in optimizer["state"].items():
            tensors.update({f"{number}.{index}.{key}": value for key, value in state.items()})
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("name", algorithms())
def test_table_of_options_is_the_constructor(name):
    algorithm = find_algorithm(name)
    parameters = list(inspect.signature(algorithm.cls).parameters.values())[1:]
    assert [p.name for p in parameters] == list(algorithm.module.OPTIONS)
    for parameter in parameters:
        assert parameter.kind is parameter.KEYWORD_ONLY
        default = REQUIRED if parameter.default is parameter.empty else parameter.default
        assert algorithm.module.OPTIONS[parameter.name].default == default
    assert algorithm.module.SUMMARY
    assert algorithm.module.PAPER
    assert set(algorithm.roles) <= {"embedding", "table", "head", "matrix", "vector"}


def test_algorithms_are_the_modules_and_no_helper():
    assert {"adam", "adamw", "muon"} <= set(algorithms())
    assert not {"build", "options", "schedules", "matrix_functions"} & set(algorithms())


@pytest.mark.parametrize("name", algorithms())
def test_create_returns_a_torch_optimizer_that_lowers_the_loss(name):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = nanorun.optim.create(name, [weight], lr=0.01)
    assert isinstance(optimizer, torch.optim.Optimizer)
    losses = []
    for _ in range(20):
        loss = (weight - torch.eye(4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_adam_and_adamw_are_torchs_over_100_steps():
    for name, theirs in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        one, two = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
        ours = create(name, [one], lr=0.01, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1, amsgrad=True)
        reference = theirs(
            [two], lr=0.01, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1, amsgrad=True, foreach=False
        )
        assert ours.param_groups[0]["fused"]
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            one.grad = torch.randn(4, 3, generator=generator)
            two.grad = one.grad.clone()
            ours.step()
            reference.step()
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("moun", {"lr": 0.1}, r"unknown optimizer 'moun'.*Did you mean 'muon'"),
        ("muon", {}, r"muon needs the option 'lr'"),
        ("muon", {"lr": 0.1, "momentun": 0.9}, r"no option 'momentun'.*Did you mean 'momentum'"),
        ("muon", {"lr": -0.1}, r"lr = -0.1 is not allowed: wanted a number of at least 0"),
        ("muon", {"lr": 0.1, "momentum": 1.0}, r"momentum = 1.0 is not allowed.*at least 0 and below 1"),
        ("muon", {"lr": 0.1, "ns_steps": 2.5}, r"ns_steps = 2.5 is not allowed: wanted a whole number"),
        ("muon", {"lr": 0.1, "ns_steps": 0}, r"ns_steps = 0 is not allowed.*at least 1 and at most 20"),
        ("muon", {"lr": 0.1, "nesterov": 1}, r"nesterov = 1 is not allowed: wanted true or false"),
        (
            "muon",
            {"lr": 0.1, "scale_rule": "other"},
            r"scale_rule = 'other'.*'original' or 'match_rms_adamw'",
        ),
        ("muon", {"lr": 0.1, "scale_rule": ["original"]}, r"scale_rule = \['original'\]"),
        ("adamw", {"lr": "fast"}, r"lr = 'fast' is not allowed"),
        ("adamw", {"lr": True}, r"lr = True is not allowed"),
        ("adamw", {"lr": float("nan")}, r"lr = nan is not allowed"),
        ("adamw", {"lr": 0.1, "betas": [0.9]}, r"betas = \[0.9\] is not allowed: wanted two numbers"),
        ("adamw", {"lr": 0.1, "betas": [0.9, 1.0]}, r"betas = \[0.9, 1.0\] is not allowed"),
        ("adamw", {"lr": 0.1, "betas": 0.9}, r"betas = 0.9 is not allowed"),
        ("adam", {"lr": 0.1, "weight_decay": -1}, r"weight_decay = -1 is not allowed"),
    ],
)
def test_wrong_option_is_refused_by_name(name, options, message):
    with pytest.raises(UserError, match=message):
        create(name, [torch.nn.Parameter(torch.ones(2, 2))], **options)


@EVERY_CONFIG
@pytest.mark.parametrize("model_config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_every_parameter_is_in_exactly_one_group(config, model_config):
    model = make_model(model_config)
    assigned = [id(p) for p in build_optimizers(model, config).parameters()]
    assert sorted(assigned) == sorted(id(p) for p in model.parameters())


def test_roles_get_the_optimizers_of_the_config():
    model = make_model(GPT2)
    rows = {row.role: row for row in build_optimizers(model, MUON_AND_ADAMW).table()}
    assert {role: row.optimizer for role, row in rows.items()} == {
        "embedding": "adamw",
        "matrix": "muon",
        "vector": "adamw",
    }
    assert rows["matrix"].tensors == 8
    assert sum(row.parameters for row in rows.values()) == model.n_parameters()
    assert rows["embedding"].lr == 0.004
    assert rows["embedding"].options["betas"] == (0.8, 0.95)
    assert rows["matrix"].options["weight_decay"] == 0.1
    assert "lr" not in rows["matrix"].options


def test_roles_with_one_algorithm_share_an_optimizer_and_keep_their_options():
    config = {**MUON_AND_ADAMW, "vector": {"name": "adamw", "lr": 0.001, "weight_decay": 0.0}}
    optimizers = build_optimizers(make_model(GPT2), config)
    assert optimizers.names == ["adamw", "muon"]
    groups = {group["role"]: group for group in optimizers.groups()}
    assert groups["vector"]["lr"] == 0.001
    assert groups["vector"]["weight_decay"] == 0.0
    assert groups["embedding"]["weight_decay"] == 0.01


def test_fused_weights_reach_muon_as_three_matrices():
    groups = build_optimizers(make_model(GPT2), MUON_AND_ADAMW).groups()
    (matrix,) = [group for group in groups if group["role"] == "matrix"]
    assert matrix["n_stacked"] == [3, 1, 1, 1] * 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"matrix": {"name": "muon", "lr": 0.02}}, r"role 'embedding'.*wte.weight.*\[optim.embedding\]"),
        ({"default": {"name": "muon", "lr": 0.02}}, r"muon cannot take the role 'embedding'"),
        ({**MUON_AND_ADAMW, "vector": {"name": "muon", "lr": 0.02}}, r"muon cannot take the role 'vector'"),
        ({**MUON_AND_ADAMW, "matrx": {"name": "muon", "lr": 0.02}}, r"optim.matrx.*Did you mean 'matrix'"),
        ({"default": {"lr": 0.02}}, r"\[optim.default\] names no optimizer"),
        ({"default": {"name": "adamv", "lr": 0.02}}, r"unknown optimizer 'adamv'"),
        ({"default": {"name": "adamw", "lrr": 0.02}}, r"adamw has no option 'lrr'"),
    ],
)
def test_wrong_section_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        build_optimizers(make_model(GPT2), config)


def test_scale_multiplies_the_base_and_does_not_compound():
    optimizers = build_optimizers(make_model(GPT2), MUON_AND_ADAMW)
    for scale in (0.5, 0.25, 1.0):
        optimizers.set_scale(scale)
        assert {group["role"]: group["lr"] for group in optimizers.groups()} == {
            "embedding": 0.004 * scale,
            "vector": 0.004 * scale,
            "matrix": 0.02 * scale,
        }


@EVERY_CONFIG
@pytest.mark.parametrize("steps_before", [0, 3])
def test_skipped_step_changes_no_bit_of_parameters_and_state(config, steps_before):
    model = make_model(GPT2)
    optimizers = build_optimizers(model, config)
    train(model, optimizers, steps_before)
    before = bits(model, optimizers)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizers.step(skip=torch.tensor(True))
    after = bits(model, optimizers)
    # Before the first step there is no state; a skipped one may make it, as zeros.
    for name in after.keys() - before.keys():
        assert not after[name].any(), name
    assert_same_bits(before, {name: after[name] for name in before})


@EVERY_CONFIG
def test_training_goes_on_after_a_skipped_step_as_if_there_had_been_none(config):
    results = []
    for skips in (False, True):
        model = make_model(GPT2)
        optimizers = build_optimizers(model, config)
        train(model, optimizers, 2)
        if skips:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, float("inf"))
            optimizers.step(skip=torch.tensor(1.0))
            optimizers.zero_grad()
        train(model, optimizers, 2, start=2)
        results.append(bits(model, optimizers))
    assert_same_bits(*results)


@EVERY_CONFIG
@pytest.mark.parametrize("model_config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_flag_that_is_false_changes_no_bit_of_the_result(config, model_config):
    results = []
    for skip in (None, torch.tensor(False), torch.tensor(0.0)):
        model = make_model(model_config)
        optimizers = build_optimizers(model, config)
        train(model, optimizers, 4, skip=skip)
        assert not any(hasattr(optimizer, "found_inf") for optimizer in optimizers.optimizers)
        results.append(bits(model, optimizers))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@EVERY_CONFIG
def test_saved_set_continues_with_the_same_bits(config):
    model = make_model(GPT2)
    optimizers = build_optimizers(model, config)
    train(model, optimizers, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optim": optimizers.state_dict()}, file)
    train(model, optimizers, 3, start=3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model = make_model(GPT2, seed=9)
    resumed_model.load_state_dict(saved["model"])
    resumed = build_optimizers(resumed_model, config)
    resumed.load_state_dict(saved["optim"])
    train(resumed_model, resumed, 3, start=3)
    assert_same_bits(bits(model, optimizers), bits(resumed_model, resumed))


def test_state_of_another_config_or_model_is_refused():
    state = build_optimizers(make_model(GPT2), MUON_AND_ADAMW).state_dict()
    with pytest.raises(UserError, match=r"optimizers adamw, muon.*has adam:"):
        build_optimizers(make_model(GPT2), {"default": {"name": "adam", "lr": 0.1}}).load_state_dict(state)
    with pytest.raises(UserError, match="does not fit this model"):
        build_optimizers(make_model(MODERN), MUON_AND_ADAMW).load_state_dict(state)


def test_state_bytes_count_what_the_optimizers_hold():
    model = make_model(GPT2)
    optimizers = build_optimizers(model, MUON_AND_ADAMW)
    assert optimizers.state_bytes() == 0
    train(model, optimizers, 1)
    n_matrix = sum(row.parameters for row in optimizers.table() if row.role == "matrix")
    n_adamw_tensors = sum(row.tensors for row in optimizers.table() if row.role != "matrix")
    expected = 4 * n_matrix + 8 * (model.n_parameters() - n_matrix) + 4 * n_adamw_tensors
    assert optimizers.state_bytes() == expected


OUTSIDE = """
import torch

class Sign(torch.optim.Optimizer):
    def __init__(self, params, *, lr, scale=1.0):
        if scale <= 0:
            raise ValueError(f"scale must be positive and is {scale}")
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * group["scale"] * p.grad.sign())
"""


def test_optimizer_from_a_file_is_checked_built_and_stepped(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OUTSIDE)
    model = make_model(GPT2)
    optimizers = build_optimizers(model, {"default": {"name": f"{path}:Sign", "lr": 0.01, "scale": 2.0}})
    assert {row.role: row.options for row in optimizers.table()}["matrix"] == {"scale": 2.0}
    before = model.wte.weight.detach().clone()
    train(model, optimizers, 1, skip=torch.tensor(True))
    assert torch.equal(model.wte.weight, before)
    train(model, optimizers, 1, skip=torch.tensor(False))
    moved = (model.wte.weight - before).abs()
    assert moved.max().item() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize(
    ("suffix", "options", "message"),
    [
        (":Sign", {"lr": 0.1, "scal": 1.0}, r"no option 'scal'.*Did you mean 'scale'"),
        (":Sign", {}, r"needs the option 'lr'"),
        (":Sign", {"lr": 0.1, "scale": -1.0}, r"scale must be positive"),
        (":Sgn", {"lr": 0.1}, r"no torch Optimizer called 'Sgn': it has Sign.*Did you mean 'Sign'"),
    ],
)
def test_outside_optimizer_gets_the_same_checks(tmp_path, suffix, options, message):
    path = tmp_path / "mine.py"
    path.write_text(OUTSIDE)
    with pytest.raises(UserError, match=message):
        create(f"{path}{suffix}", [torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere/mine.py:Sign", "no file 'nowhere/mine.py'"), ("no_such_package.optim:Sign", "cannot import")],
)
def test_outside_optimizer_that_is_not_there_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        create(name, [torch.nn.Parameter(torch.ones(2))], lr=0.1)


def test_muon_and_adamw_learn_and_beat_the_uniform_guess():
    model = make_model(MODERN, vary_zeros=False)
    optimizers = build_optimizers(model, MUON_AND_ADAMW)
    tokens = make_tokens(n_rows=8)
    losses = []
    for _ in range(30):
        loss_sum, n_tokens = model(tokens[:, :-1], tokens[:, 1:])
        (loss_sum / n_tokens).backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append((loss_sum / n_tokens).item())
    assert losses[-1] < 0.5 * losses[0]


def test_importing_the_package_imports_no_torch():
    code = "import sys, nanorun.optim; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tied_head_is_trained_by_the_embedding_group_alone():
    rows = build_optimizers(make_model(GPT2), MUON_AND_ADAMW).table()
    (embedding,) = [row for row in rows if row.role == "embedding"]
    assert embedding.tensors == 2
    assert embedding.parameters == (VOCAB_SIZE + GPT2.context_len) * GPT2.n_embd


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "nonsense", "lr": 0.1}, "unknown optimizer 'nonsense'"),
        ({"lr": 0.1}, r"\[optim.vector\] names no optimizer"),
        ({"name": "adamw", "lrr": 0.1}, "Did you mean 'lr'"),
        ({"name": "muon", "lr": 0.1}, "muon cannot take the role 'vector'"),
    ],
)
def test_a_role_that_the_model_lacks_is_checked_all_the_same(entry, said):
    model = make_model(MODERN)
    assert "vector" not in {role.role for role in model.roles().values()}
    with pytest.raises(UserError, match=said):
        build_optimizers(model, {**MUON_AND_ADAMW, "vector": entry})


def test_making_stepping_and_saving_optimizers_imports_no_compiler():
    code = """if True:
        import sys, torch
        from nanorun.optim import create
        for name in ("adam", "adamw", "adagrad", "muon"):
            weight = torch.nn.Parameter(torch.ones(4, 4))
            optimizer = create(name, [weight], lr=0.1)
            weight.grad = torch.ones(4, 4)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())
            assert bool((weight < 1).all())
        sys.exit("torch._dynamo" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
