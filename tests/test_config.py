"""What a run is: every preset resolves, fixed keys hold, TOML comes back as it went out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanorun.config import known_keys, make_config, resolve
from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.optim.build import build_optimizers
from nanorun.tables import flattened, merged, nested, parse_setting, to_toml
from nanorun.tracks import load_track, preset_names, track_names

PRESETS = [(track, preset) for track in track_names() for preset in preset_names(load_track(track))]


@pytest.mark.parametrize(("track", "preset"), PRESETS)
def test_every_preset_builds_its_model_and_its_optimizers(track, preset):
    config = resolve(load_track(track), preset)
    with torch.device("meta"):
        model = GPT(config.model, 257)
    rows = build_optimizers(model, config.optim_by_role).table()
    assert sum(row.parameters for row in rows) == model.n_parameters()


def test_the_sotu_model_has_one_to_three_million_parameters():
    config = resolve(load_track("sotu"), "muon")
    with torch.device("meta"):
        assert 1_000_000 <= GPT(config.model, 257).n_parameters() <= 3_000_000


@pytest.mark.parametrize("key", ["train.batch_tokens=8192", "model.dropout=0.1", "validation.tokens=1000"])
def test_a_fixed_key_is_refused_with_both_values_and_the_mend(key):
    with pytest.raises(
        UserError, match=r"fixes .* = .*, and this run has .*: leave .* out, or pick an open track: .*text"
    ):
        resolve(load_track("sotu"), "muon", [key])


def test_initialisation_is_free_in_an_optimizer_track():
    config = resolve(load_track("sotu"), "muon", ["model.init_std=0.1", "model.zero_init_projections=false"])
    assert config.model.init_std == 0.1


def test_an_open_track_leaves_the_model_free():
    config = resolve(load_track("shakespeare-sprint"), "muon", ["model.arch=gpt2", "model.n_layer=7"])
    assert config.model.n_layer == 7


def test_arch_sets_the_switches_that_are_not_set_by_themselves():
    values = {"track": "t", "name": "n", "data": {"corpus": "c", "tokenizer": "byte"}, "optim": {}}
    config = make_config({**values, "model": {"arch": "gpt2", "bias": False}}, where="here")
    assert (config.model.norm, config.model.tied_head, config.model.bias) == ("layernorm", True, False)


def test_a_role_without_a_name_takes_the_default_beneath():
    config = resolve(load_track("shakespeare-sprint"), "adamw", ["optim.matrix.lr=0.001"])
    assert config.optim_by_role["matrix"]["name"] == "adamw"
    assert config.optim_by_role["matrix"]["lr"] == 0.001


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a=1e-3", 0.001),
        ("a=true", True),
        ("a=[0.8, 0.9]", [0.8, 0.9]),
        ("a=muon", "muon"),
        ("a='3'", "3"),
    ],
)
def test_set_values_are_toml_and_bare_words_are_strings(text, value):
    assert parse_setting(text)[1] == value


def test_known_keys_reach_into_every_section():
    assert {"train.steps", "train.micro_batch_rows", "checkpoint.every_steps", "model.n_layer"} <= set(
        known_keys()
    )


scalars = st.one_of(
    st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
tables = st.recursive(
    st.dictionaries(st.text(min_size=1), st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=4),
    lambda inner: st.dictionaries(st.text(min_size=1), st.one_of(scalars, inner), max_size=4),
    max_leaves=12,
)


@given(tables)
def test_toml_reads_back_what_was_written(table):
    import tomllib

    try:
        text = to_toml(table)
        text.encode()
    except UnicodeEncodeError:
        return  # half a character can't stand in a file
    assert tomllib.loads(text) == table


@given(st.dictionaries(st.from_regex(r"[a-c](\.[a-c]){0,2}", fullmatch=True), st.integers(), max_size=5))
def test_dotted_keys_come_back_from_nested_tables(settings):
    table = nested(settings.items())
    assert nested(flattened(table).items()) == table
    assert merged(table, table) == table


def test_a_line_break_in_a_setting_begins_no_other_key():
    assert parse_setting("train.steps=1\nother = 3") == ("train.steps", "1\nother = 3")
