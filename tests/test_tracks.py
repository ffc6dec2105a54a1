"""Tracks: each that ships holds together, a broken one is named, and a contradiction gets its mend."""

import tomllib
from pathlib import Path

import pytest

from nanorun.config import known_keys, resolve
from nanorun.errors import UserError
from nanorun.tables import flattened, nested
from nanorun.tracks import (
    DEFAULT_PRESET,
    DEFAULT_TRACK,
    config_folders,
    load_track,
    preset_names,
    track_names,
)

SHIPPED = Path(__file__).resolve().parents[1] / "configs"
TRACKS = sorted(path.parent.name for path in SHIPPED.glob("*/track.toml"))
MINIMAL = """
summary = "a track"
kind = "open"
target_val_loss = 2.0
scored_in = "seconds"
significance = { rule = "t", n = 3, alpha = 0.05 }
[fixed.data]
corpus = "shakespeare"
tokenizer = "char"
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_track(tmp_path):
    """Return a function that writes a track of the user's, with an AdamW preset, and returns its file."""

    def write(text=MINIMAL, name="mine"):
        folder = tmp_path / "configs" / name
        folder.mkdir(parents=True)
        (folder / "adamw.toml").write_text('[optim.default]\nname = "adamw"\nlr = 0.001\n')
        (folder / "track.toml").write_text(text)
        return folder / "track.toml"

    return write


def test_the_default_track_and_its_default_preset_exist():
    assert DEFAULT_PRESET in preset_names(load_track(DEFAULT_TRACK))


@pytest.mark.parametrize("name", TRACKS)
def test_a_shipped_track_fixes_only_keys_that_there_are(name):
    track = load_track(name)
    assert track.name == name
    assert set(flattened(track.fixed)) <= set(known_keys())
    assert {"data.corpus", "data.tokenizer", "validation.tokens"} <= set(flattened(track.fixed))


@pytest.mark.parametrize("name", TRACKS)
def test_a_shipped_track_compares_muon_with_adamw(name):
    assert {"adamw", "muon"} <= set(preset_names(load_track(name)))


@pytest.mark.parametrize("name", TRACKS)
def test_an_optimizer_track_fixes_all_of_the_model_but_how_it_starts(name):
    track = load_track(name)
    if track.kind == "open":
        assert "model" not in track.fixed
        return
    competing = {"init_std", "head_init_std", "zero_init_projections"}
    assert (
        set(track.fixed["model"])
        == {key.removeprefix("model.") for key in known_keys() if key.startswith("model.")} - competing
    )
    assert set(track.fixed["validation"]) == {"tokens", "every_steps", "from_step", "stride"}


@pytest.mark.parametrize("name", TRACKS)
def test_every_preset_validates_before_its_last_step(name):
    track = load_track(name)
    for preset in preset_names(track):
        plan = resolve(track, preset)
        assert plan.validation.from_step < plan.train.steps


@pytest.mark.parametrize(
    ("track", "key"), [(t, key) for t in TRACKS for key in flattened(load_track(t).fixed)]
)
def test_contradicting_any_fixed_key_names_the_key_both_values_and_the_mend(track, key):
    loaded = load_track(track)
    config = resolve(loaded, "adamw").model_dump()
    wanted = flattened(loaded.fixed)[key]
    section, name = key.split(".")
    others = {bool: lambda v: not v, str: lambda v: "other", list: lambda v: [*v, 2]}
    config[section][name] = others.get(type(wanted), lambda v: v + 1)(wanted)
    with pytest.raises(UserError) as refused:
        loaded.check(config)
    text = str(refused.value)
    assert f"{track!r} fixes {key} = {wanted!r}, and this run has {config[section][name]!r}" in text
    assert f"leave {key} out" in text
    assert track not in text.partition(" track: ")[2].split(", ")


def test_repeating_what_a_track_fixes_is_no_contradiction():
    assert (
        resolve(load_track("sotu"), "muon", ["model.n_layer=3", "train.batch_tokens=4096"]).model.n_layer == 3
    )


def test_a_preset_may_not_change_what_its_track_fixes_either(own_track):
    preset = own_track().parent / "adamw.toml"
    preset.write_text(preset.read_text() + '[data]\ntokenizer = "byte"\n')
    with pytest.raises(UserError, match=r"'mine' fixes data\.tokenizer = 'char', and this run has 'byte'"):
        resolve(load_track("mine"), "adamw")


def test_a_track_of_the_users_is_found_beside_those_that_ship(own_track):
    own_track()
    assert set(track_names()) == {*TRACKS, "mine"}
    assert config_folders()[0] == Path("configs")
    config = resolve(load_track("mine"), "adamw")
    assert (config.track, config.name, config.data.corpus) == ("mine", "adamw", "shakespeare")


def test_the_users_own_track_comes_before_a_shipped_one_of_that_name(own_track):
    own_track(name="sotu")
    assert load_track("sotu").summary == "a track"


def test_an_unknown_track_gets_the_nearest_name_and_all_names():
    with pytest.raises(
        UserError, match=r"no track 'shakespear'; there are .*sotu.* Did you mean 'shakespeare'\?"
    ):
        load_track("shakespear")


def test_an_unknown_preset_gets_the_nearest_name_and_all_names():
    with pytest.raises(
        UserError, match=r"no preset 'adam_w' under track 'sotu'; there are .*Did you mean 'adamw'\?"
    ):
        resolve(load_track("sotu"), "adam_w")


@pytest.mark.parametrize("preset", ["track", "search/adamw", "../sotu/muon"])
def test_only_presets_of_the_track_itself_are_presets(preset):
    with pytest.raises(UserError, match="no preset"):
        resolve(load_track("sotu"), preset)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("target_val_loss = 2.0", "", "target_val_loss: Field required"),
        ("target_val_loss = 2.0", "target_val_loss = 0.0", "target_val_loss: Input should be greater than 0"),
        ("target_val_loss", "target_val_los", "target_val_loss"),
        ('kind = "open"', 'kind = "shut"', "kind: Input should be 'optimizer' or 'open'"),
        ('scored_in = "seconds"', 'scored_in = "metres"', "scored_in: Input should be"),
        (", alpha = 0.05", "", "significance: Value error, rule 't' needs alpha"),
        ('rule = "t"', 'rule = "margin"', "rule 'margin' needs margin"),
        ('rule = "t"', 'rule = "z"', "rule 'z' needs sigma"),
        ("n = 3", "n = 0", "significance.n: Input should be greater than or equal to 1"),
        ("alpha = 0.05", "alpha = 1.0", "significance.alpha: Input should be less than 1"),
        ("[fixed.data]", "[fixed.data", "not readable as TOML"),
    ],
)
def test_a_broken_track_file_is_named_with_the_key(own_track, old, new, said):
    path = own_track(MINIMAL.replace(old, new, 1))
    with pytest.raises(UserError) as refused:
        load_track("mine")
    assert str(path.relative_to(Path.cwd())) in str(refused.value)
    assert said in str(refused.value)


def test_a_track_that_is_no_text_is_named(own_track):
    own_track().write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"track\.toml: not readable as TOML"):
        load_track("mine")


@pytest.mark.parametrize("name", TRACKS)
def test_dotted_keys_of_a_shipped_file_come_back_as_tables(name):
    table = tomllib.loads((SHIPPED / name / "track.toml").read_text())
    assert nested(flattened(table).items()) == table


@pytest.mark.parametrize("name", ["my track", "benchmarks", "a" * 65, ".hidden"])
def test_a_folder_that_cannot_be_a_tracks_name_is_refused_before_anything_is_trained(
    name, tmp_path, monkeypatch
):
    folder = tmp_path / "configs" / name
    folder.mkdir(parents=True)
    (folder / "track.toml").write_text((SHIPPED / "sotu/track.toml").read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be a track's name"):
        load_track(name)


def test_a_track_is_called_what_its_folder_is(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "mine"
    folder.mkdir(parents=True)
    (folder / "track.toml").write_text('name = "other"\n' + (SHIPPED / "sotu/track.toml").read_text())
    monkeypatch.chdir(tmp_path)
    assert load_track("mine").name == "mine"
