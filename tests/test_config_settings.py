"""`--set`: every key takes its kind and refuses others by name, and a mistyped one gets the nearest."""

import tomllib
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanorun.config import ARCH_SWITCHES, ModelConfig, RunConfig, known_keys, make_config, resolve
from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.optim.build import build_optimizers
from nanorun.tables import to_toml
from nanorun.tracks import load_track, preset_names, track_names

SET_KEYS = [
    key for key in known_keys() if key not in ("track", "name", "optim") and not key.startswith("data.")
]


def field_of(key):
    *sections, name = key.split(".")
    model = RunConfig
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[name]


def other_kinds(key):
    """Return settings' values that are not of the key's kind."""
    kind = field_of(key).annotation
    if get_origin(kind) is Literal:
        return ["nonsense", "3", "true", "[1]"]
    if get_origin(kind) is list:
        return ["64", "true", "word", "'[64]'"]
    return {
        int: ["1.5", "true", "'3'", "word", "[3]", "-1"],
        float: ["true", "'0.5'", "word", "nan", "inf", "-1.0"],
        bool: ["1", "0", "yes", "'true'"],
        str: ["3", "true"],
    }[kind]


def sprint(*settings):
    return resolve(load_track("shakespeare-sprint"), "muon", settings)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in SET_KEYS for value in other_kinds(key)])
def test_every_key_refuses_a_value_of_another_kind_and_is_named(key, value):
    with pytest.raises(UserError) as refused:
        sprint(f"{key}={value}")
    assert f"{key} = " in str(refused.value)
    assert f"with --set {key}={value}" in str(refused.value)


@pytest.mark.parametrize("key", [key for key in SET_KEYS if get_origin(field_of(key).annotation) is Literal])
def test_every_choice_can_be_chosen_without_quotes(key):
    section, name = key.split(".")
    for choice in get_args(field_of(key).annotation):
        assert getattr(getattr(sprint(f"{key}={choice}"), section), name) == choice


@pytest.mark.parametrize("key", SET_KEYS)
def test_a_mistyped_key_gets_the_nearest(key):
    wrong = f"{key[:-1]}{'x' if key[-1] != 'x' else 'y'}"
    with pytest.raises(UserError, match=f"there is no key '{wrong}'. Did you mean '[a-z0-9_.]+'"):
        sprint(f"{wrong}=1")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.step", "train.steps"),
        ("model.nlayer", "model.n_layer"),
        ("train.warmup", "train.warmup_steps"),
    ],
)
def test_the_nearest_key_is_the_one_that_was_meant(key, nearest):
    with pytest.raises(UserError, match=f"no key '{key}'. Did you mean '{nearest}'"):
        sprint(f"{key}=1")


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(UserError) as refused:
        sprint("train.steps=0", "model.n_layerr=1", "log.every_steps=0")
    for said in ("train.steps = 0", "no key 'model.n_layerr'", "log.every_steps = 0"):
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.n_head=7", "n_embd = 128 is not a multiple of n_head = 7"),
        ("model.n_embd=12", "an even head width, not 3"),
        ("train.batch_tokens=100", "train.batch_tokens = 100 is not a multiple of model.context_len = 64"),
        (
            "train.length_schedule=[16, 48]",
            "train.length_schedule has 48, which does not divide model.context_len = 64",
        ),
        ("train.length_schedule=[0]", "train.length_schedule.0 = 0"),
        ("validation.stride=65", "validation.stride = 65 is above model.context_len = 64"),
        (
            "optim.matirx.lr=1",
            "optim.matirx: the roles are embedding, table, head, matrix, vector and default",
        ),
        ("model=3", "model = 3"),
        ("optim.matrix=3", "optim.matrix = 3"),
        ("model.n_layer.x=1", "model.n_layer = "),
        ("track=sotu", "use --track or --optim"),
        ("name=x", "use --track or --optim"),
        ("track.x=1", "use --track or --optim"),
        ("name.x=1", "use --track or --optim"),
        ("=3", "wanted key=value"),
        ("train.steps=", "wanted key=value"),
        ("train.steps", "wanted key=value"),
    ],
)
def test_what_does_not_fit_together_is_said(setting, said):
    with pytest.raises(UserError) as refused:
        sprint(setting)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.matrix.lr=-1", "muon: lr = -1 is not allowed: wanted a number of at least 0"),
        ("optim.matrix.lr=fast", "muon: lr = 'fast' is not allowed"),
        ("optim.default.lr=true", "adamw: lr = True is not allowed"),
        ("optim.default.betas=3", "adamw: betas = 3 is not allowed: wanted two numbers"),
        ("optim.default.name=3", "optimizer name 3: wanted a string, one of adadelta, adagrad, adam"),
        ("optim.default.name=adam_w", "Did you mean 'adamw'?"),
        ("optim.matrix.name=:", "no module's name"),
        ("optim.matrix.name=.a:B", "no module's name"),
        ("optim.matrix.name=no_such_package.x:B", "cannot import 'no_such_package.x'"),
        ("optim.matrix.name=nowhere.py:B", "no file 'nowhere.py'"),
        ("optim.embedding.name=muon", "muon cannot take the role 'embedding': it takes matrix"),
    ],
)
def test_a_bad_optimizer_is_said_when_it_is_built(setting, said):
    config = sprint(setting)
    with torch.device("meta"):
        model = GPT(config.model, 65)
    with pytest.raises(UserError) as refused:
        build_optimizers(model, config.optim_by_role)
    assert said in str(refused.value)


def test_later_settings_win_over_earlier_ones_and_over_the_preset():
    assert sprint("train.steps=5", "train.steps=7").train.steps == 7
    assert resolve(load_track("sotu"), "muon", ["seed=3"], seed=4).seed == 4


@pytest.mark.parametrize(
    ("role", "name", "lr", "momentum"),
    [
        ("default", "adamw", 0.1, None),
        ("head", "adamw", 0.2, None),
        ("matrix", "muon", 0.3, 0.5),
        ("vector", "adam", 0.4, None),
    ],
)
def test_a_role_inherits_default_only_while_it_has_no_name(role, name, lr, momentum):
    config = make_config(
        {
            "track": "t",
            "name": "n",
            "data": {"corpus": "c", "tokenizer": "byte"},
            "optim": {
                "default": {"name": "adamw", "lr": 0.1, "weight_decay": 0.7},
                "head": {"lr": 0.2},
                "matrix": {"name": "muon", "lr": 0.3, "momentum": 0.5},
                "vector": {"name": "adam", "lr": 0.4},
            },
        },
        where="here",
    )
    found = config.optim_by_role[role]
    assert (found["name"], found["lr"], found.get("momentum")) == (name, lr, momentum)
    assert ("weight_decay" in found) == (role in ("default", "head"))


def test_a_config_does_not_change():
    config = sprint()
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


@pytest.mark.parametrize("arch", ARCH_SWITCHES)
def test_an_arch_sets_each_of_its_switches(arch):
    dumped = ModelConfig(arch=arch).model_dump()
    assert {key: dumped[key] for key in ARCH_SWITCHES[arch]} == ARCH_SWITCHES[arch]


@pytest.mark.parametrize("key", ARCH_SWITCHES["gpt2"])
def test_a_switch_set_by_itself_wins_over_its_arch(key):
    other = ARCH_SWITCHES["modern"][key]
    text = str(other).lower() if isinstance(other, bool) else other
    assert getattr(sprint("model.arch=gpt2", f"model.{key}={text}").model, key) == other


@pytest.mark.parametrize(
    ("track", "preset"),
    [(track, preset) for track in track_names() for preset in preset_names(load_track(track))],
)
def test_the_config_of_a_run_reads_back_from_its_file(track, preset):
    config = resolve(load_track(track), preset)
    assert make_config(tomllib.loads(to_toml(config.model_dump())), where="config.toml") == config


@given(
    st.builds(
        lambda lr, steps, clip, decay, seed: (lr, steps, clip, decay, seed),
        st.floats(1e-300, 1e300),
        st.integers(1, 2**40),
        st.floats(0, 1e300),
        st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
        st.integers(0, 2**31 - 1),
    )
)
def test_any_config_reads_back_from_its_file_bit_for_bit(values):
    lr, steps, clip, betas, seed = values
    content = {
        "track": "t",
        "name": 'quo"ted\\ name\x7f\n',
        "seed": seed,
        "data": {"corpus": "c", "tokenizer": "byte"},
        "train": {"steps": steps, "grad_clip": clip},
        "optim": {"default": {"name": "adamw", "lr": lr, "betas": betas}},
    }
    config = make_config(content, where="here")
    assert make_config(tomllib.loads(to_toml(config.model_dump())), where="there") == config
