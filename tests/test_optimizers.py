"""The pages of `nanorun optimizers`, names that are no optimizers, and optimizers that live outside."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nanorun.cli import app
from nanorun.config import resolve
from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.build import ELSEWHERE, algorithms, build_optimizers, find_algorithm, optimizer_names
from nanorun.optimizers import all_names, describe, state_bytes
from nanorun.records.record import read_records
from nanorun.records.report import TrackView, build_table
from nanorun.tracks import load_track, preset_names
from nanorun.training.run import train_seeds

TEMPLATE = Path(__file__).parent.parent / "docs" / "my_optimizer.py"
ISSUED = (
    *(
        "sgd",
        "adagrad",
        "rmsprop",
        "adadelta",
        "adam",
        "amsgrad",
        "adamw",
        "sparse_adam",
        "nadamw",
        "nadamp",
        "generalized_adam",
    ),
    *(
        "cyclic_lr",
        "lawa_queue",
        "lawa_ema",
        "schedulefree_adamw",
        "prodigy",
        "schedulefree_prodigy",
        "shampoo",
    ),
    *("distributed_shampoo", "caspr", "amos", "soap", "muon", "normuon"),
)
"""Every name of the lecture's table."""


def test_every_optimizer_of_the_lecture_has_a_page():
    assert all_names() == sorted(ISSUED)


@pytest.mark.parametrize("name", ISSUED)
def test_a_page_says_what_it_is_whose_code_it_is_and_what_each_option_means(name):
    page = json.loads(json.dumps(describe(name)))
    assert len(page["summary"]) > 20
    assert page["paper"]
    assert page["source"]
    assert page["options"]
    assert all(len(option["meaning"]) > 5 and option["default"] for option in page["options"])


@pytest.mark.parametrize("name", algorithms())
def test_the_table_of_options_has_the_constructors_defaults(name):
    import inspect

    algorithm = find_algorithm(name)
    for option, parameter in inspect.signature(algorithm.cls).parameters.items():
        if option in ("params", "n_stacked"):
            continue
        default = algorithm.table[option].default
        wanted = parameter.empty if default == "required" else default
        assert parameter.default == wanted, option
        assert parameter.kind is parameter.KEYWORD_ONLY, option


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("sgd", {}, 0),
        ("sgd", {"momentum": 0.9}, 4),
        ("adamw", {}, 8),
        ("amsgrad", {}, 12),
        ("muon", {}, 4),
    ],
)
def test_state_is_told_in_bytes_a_parameter(name, options, wanted):
    assert state_bytes(find_algorithm(name), options) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_create_says_what_a_schedule_or_an_average_is_and_how_to_ask_for_it(name):
    with pytest.raises(
        UserError, match=f"{name!r} is no optimizer but an? (schedule|average) around .* set "
    ):
        create(name, [torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def test_create_takes_every_other_name_of_the_table():
    for name in sorted(set(ISSUED) - set(ELSEWHERE)):
        options = {} if "prodigy" in name else {"lr": 0.01}
        optimizer = create(name, [torch.nn.Parameter(torch.ones(4, 3))], **options)
        assert isinstance(optimizer, torch.optim.Optimizer), name


def test_a_variant_refuses_to_be_something_else():
    with pytest.raises(UserError, match=r"amsgrad holds amsgrad = True: leave amsgrad out, or take .* adam"):
        create("amsgrad", [torch.nn.Parameter(torch.zeros(2))], lr=0.1, amsgrad=False)


def test_every_optimizer_has_a_preset_and_a_search_on_sotu():
    # Its model has no tables to give to sparse_adam.
    named = {*ISSUED} - {"sparse_adam"}
    track = load_track("sotu")
    # `fast` is a recipe of its own, no optimizer of the table.
    assert set(preset_names(track)) == {*named, "fast"}
    assert {path.stem for path in (track.folder / "search").glob("*.toml")} == {*named, "common"}


def test_the_command_shows_one_line_for_each_and_a_page_for_one():
    runner = CliRunner()
    lines = runner.invoke(app, ["optimizers"]).stdout
    assert all(re.search(rf"^{name} ", lines, flags=re.MULTILINE) for name in ISSUED)
    page = runner.invoke(app, ["optimizers", "muon"], env={"COLUMNS": "160"}).stdout
    assert "kellerjordan" in page
    assert "weight of the past in the average gradient" in page
    document = json.loads(runner.invoke(app, ["optimizers", "lawa_ema", "--json"]).stdout)
    assert document["options"][0] == {
        "name": "average.beta",
        "default": "0.9",
        "allowed": "a number of at least 0 and below 1",
        "meaning": "weight of the past, per snapshot",
    }


def test_an_unknown_page_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown optimizer 'shampo'.* Did you mean 'shampoo'"):
        describe("shampo")


TINY = [
    "train.steps=3",
    "train.batch_tokens=512",
    "train.warmup_steps=0",
    "validation.from_step=3",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
]


def train_outside(tmp_path, optim, *settings):
    options = {"runs": tmp_path / "runs", "records": tmp_path / "records", "data": tmp_path / "data"}
    console = Console(quiet=True)
    return train_seeds("shakespeare-sprint", optim, [*TINY, *settings], 0, 1, options, console)[0]


def test_the_template_trains_and_its_record_holds_its_source(tmp_path):
    train_outside(tmp_path, f"{TEMPLATE}:SignMomentum", "optim.default.lr=0.001")
    record = read_records(tmp_path / "records")[0][0]
    assert record.name == "signmomentum"
    assert record.optimizer == f"{TEMPLATE}:SignMomentum"
    assert record.config["optim"] == {"default": {"name": f"{TEMPLATE}:SignMomentum", "lr": 0.001}}
    patch = next((tmp_path / "records").glob("*/*/source.patch")).read_text()
    assert "+class SignMomentum(torch.optim.Optimizer):\n" in patch
    assert record.code.dirty


def test_the_template_is_checked_as_the_optimizers_of_the_house_are(tmp_path):
    name = f"{TEMPLATE}:SignMomentum"
    with pytest.raises(UserError, match=r"\[optim\.default\] .*SignMomentum needs the option 'lr'"):
        train_outside(tmp_path, name)
    with pytest.raises(UserError, match=r"has no option 'beta'.*Did you mean 'betas'"):
        train_outside(tmp_path, name, "optim.default.lr=0.1", "optim.default.beta=0.9")
    with pytest.raises(UserError, match=r"betas = .* wanted two numbers, each of at least 0 and below 1"):
        train_outside(tmp_path, name, "optim.default.lr=0.1", "optim.default.betas=[0.9, 1.0]")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_the_template_matches_lions_formula_over_100_steps():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(4, 3), (5,), ()]]
    plain, averages = [p.clone() for p in parameters], [torch.zeros_like(p) for p in parameters]
    ours = [torch.nn.Parameter(p.clone()) for p in parameters]
    optimizer = create(f"{TEMPLATE}:SignMomentum", ours, lr=0.01, weight_decay=0.1)
    for _ in range(100):
        for i, parameter in enumerate(ours):
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            update = torch.sign(0.9 * averages[i] + 0.1 * parameter.grad)
            averages[i] = 0.99 * averages[i] + 0.01 * parameter.grad
            plain[i] = plain[i] - 0.01 * (update + 0.1 * plain[i])
        optimizer.step()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(plain, ours, strict=True))


MATRICES_ONLY = """
import torch
ROLES = ("matrix",)
class Plain(torch.optim.SGD):
    def __init__(self, params, *, lr):
        assert all(p.ndim == 2 for group in params for p in group["params"])
        super().__init__(params, lr=lr)
CLASS = Plain
"""


def test_what_an_outside_class_does_not_take_is_left_to_adamw(tmp_path):
    (tmp_path / "mine.py").write_text(MATRICES_ONLY)
    train_outside(tmp_path, f"{tmp_path}/mine.py:Plain", "optim.matrix.lr=0.1")
    record = read_records(tmp_path / "records")[0][0]
    assert record.config["optim"]["matrix"] == {"name": f"{tmp_path}/mine.py:Plain", "lr": 0.1}
    assert record.config["optim"]["default"]["name"] == "adamw"


def test_a_class_of_a_package_is_found_by_its_dotted_name(tmp_path):
    train_outside(tmp_path, "torch.optim:Adamax", "optim.default.lr=0.001")
    assert read_records(tmp_path / "records")[0][0].optimizer == "torch.optim:Adamax"


def test_a_file_that_fails_is_named_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("import torch\n1 / 0\n")
    with pytest.raises(
        UserError, match=r"broken\.py could not be run \(ZeroDivisionError: division by zero\)"
    ):
        find_algorithm(f"{tmp_path}/broken.py:Mine")
    assert not [name for name in sys.modules if name.startswith("nanorun_external_broken")]


def test_an_edited_file_is_read_anew_and_an_unchanged_one_is_not_run_again(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MATRICES_ONLY)
    first = find_algorithm(f"{path}:Plain")
    assert find_algorithm(f"{path}:Plain").cls is first.cls
    path.write_text(MATRICES_ONLY.replace('("matrix",)', '("matrix", "head")'))
    assert find_algorithm(f"{path}:Plain").roles == ("matrix", "head")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('OPTIONS = {"lr": 0.1}', "OPTIONS must be a dict of names to nanorun.optim.options.Option"),
        ('ROLES = ("matrices",)', "ROLES has 'matrices': wanted embedding, table, head, matrix, vector"),
    ],
)
def test_a_module_laid_out_wrongly_is_refused_with_the_mend(tmp_path, line, message):
    (tmp_path / "mine.py").write_text(MATRICES_ONLY + line + "\n")
    with pytest.raises(UserError, match=message):
        find_algorithm(f"{tmp_path}/mine.py:Plain")


def test_names_that_create_takes_are_all_names_but_schedules_and_averages():
    assert sorted([*optimizer_names(), *ELSEWHERE]) == all_names()


def test_a_schedule_free_optimizer_from_outside_trains(tmp_path):
    settings = ["optim.default.lr=0.01", "optim.default.foreach=false"]
    train_outside(tmp_path, "schedulefree:AdamWScheduleFree", *settings)
    record = read_records(tmp_path / "records")[0][0]
    ours = train_outside(tmp_path / "ours", "nanorun.optim.schedulefree_adamw:ScheduleFreeAdamW", settings[0])
    assert record.final_weights_sha256 == ours["final_weights_sha256"]


def test_two_versions_of_a_file_are_two_rows_of_the_report(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MATRICES_ONLY)
    train_outside(tmp_path, f"{path}:Plain", "optim.matrix.lr=0.1")
    path.write_text(MATRICES_ONLY.replace("lr=lr)", "lr=2 * lr)"))
    train_outside(tmp_path, f"{path}:Plain", "optim.matrix.lr=0.1")
    records = read_records(tmp_path / "records")[0]
    assert len({record.code.outside for record in records}) == 2
    assert all(record.code.outside.startswith("mine.py ") for record in records)
    view = TrackView.of(load_track("shakespeare-sprint"))
    assert [row.n for row in build_table(view, records).rows] == [1, 1]


def test_the_patch_makes_the_outside_file_again(tmp_path):
    import subprocess

    train_outside(tmp_path, f"{TEMPLATE}:SignMomentum", "optim.default.lr=0.001")
    patch = next((tmp_path / "records").glob("*/*/source.patch")).read_text()
    ours = patch[patch.index("diff --git a/outside/my_optimizer.py") :]
    (tmp_path / "tree").mkdir()
    done = subprocess.run(["git", "apply", "-"], input=ours, text=True, cwd=tmp_path / "tree", check=False)
    assert done.returncode == 0
    assert (tmp_path / "tree" / "outside" / "my_optimizer.py").read_text() == TEMPLATE.read_text()


def test_a_constructor_decides_what_becomes_of_its_options(tmp_path):
    (tmp_path / "mine.py").write_text(MATRICES_ONLY.replace("lr=lr)", "lr=2 * lr)"))
    model = torch.nn.Linear(3, 3, bias=False)
    model.roles = lambda: {"weight": ("matrix", 1)}
    built = build_optimizers(model, {"matrix": {"name": f"{tmp_path}/mine.py:Plain", "lr": 0.1}})
    built.set_scale(0.5)
    assert built.groups()[0]["lr"] == pytest.approx(0.1)


def test_an_optimizer_that_needs_a_closure_is_refused_with_the_reason(tmp_path):
    with pytest.raises(
        UserError, match=r"torch\.optim:LBFGS failed in its first step \(TypeError: .*closure"
    ):
        train_outside(tmp_path, "torch.optim:LBFGS", "optim.default.lr=0.1")


def test_a_module_that_fails_on_import_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "failing_module.py").write_text("raise RuntimeError('no such luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"could not be imported \(RuntimeError: no such luck\)"):
        find_algorithm("failing_module:Mine")


def test_a_file_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_it_lies.py").write_text("import torch\nBase = torch.optim.SGD\n")
    (tmp_path / "mine.py").write_text("from beside_it_lies import Base\nclass Mine(Base):\n    pass\n")
    assert find_algorithm(f"{tmp_path}/mine.py:Mine").cls.__mro__[1].__name__ == "SGD"
    assert str(tmp_path) not in sys.path


def test_a_tracks_lack_of_a_preset_is_said_with_the_mend(tmp_path, monkeypatch):
    theirs = load_track("shakespeare-sprint").folder.resolve() / "track.toml"
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "bare"
    folder.mkdir(parents=True)
    (folder / "track.toml").write_text(theirs.read_text())
    console = Console(quiet=True)
    with pytest.raises(UserError, match=r"track 'bare' has no preset to take model and schedule from: add "):
        train_seeds("bare", f"{TEMPLATE}:SignMomentum", [], 0, 1, {}, console)
    (folder / "adamw.toml").write_text('[optim.matrix]\nname = "adamw"\nlr = 0.1\n')
    (tmp_path / "mine.py").write_text(MATRICES_ONLY)
    with pytest.raises(UserError, match=r"takes matrix alone, and .* has no \[optim\.default\] for the rest"):
        train_seeds("bare", "mine.py:Plain", [], 0, 1, {}, console)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -1.0}, r"lr = -1\.0 is not allowed"),
        ({"bogus": 3}, "no option 'bogus'"),
        ({"betas": (0.9, 1.0)}, r"betas = .* is not allowed"),
    ],
)
def test_the_options_of_a_single_group_are_checked_as_well(group, message):
    with pytest.raises(UserError, match=message):
        create("adamw", [{"params": [torch.nn.Parameter(torch.zeros(2))], **group}], lr=0.1)


def test_an_option_may_come_with_the_groups_alone():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in (0.1, 0.2)]
    assert [group["lr"] for group in create("adamw", groups).param_groups] == [0.1, 0.2]


def test_another_name_drops_the_options_of_the_optimizer_before():
    name = f"{TEMPLATE}:SignMomentum"
    changes = [f"optim.matrix.name={name}", "optim.matrix.lr=0.001"]
    config = resolve(load_track("shakespeare-sprint"), "adamw", changes)
    assert config.optim["matrix"] == {"name": name, "lr": 0.001}
    kept = resolve(load_track("shakespeare-sprint"), "adamw", ["optim.matrix.lr=0.5"]).optim["matrix"]
    assert kept["lr"] == 0.5
    assert set(kept) > {"name", "lr"}


def test_a_page_of_an_outside_class_lists_what_its_constructor_takes():
    options = {option["name"]: option["default"] for option in describe("torch.optim:Adamax")["options"]}
    assert options["betas"] == "[0.9, 0.999]"
    assert options["lr"] == "0.002"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.cycles=2"], "train.cycles = 2 means nothing under train.schedule = 'wsd'"),
        (
            ["average.kind=ema", "average.every_steps=5"],
            "every_steps = 5 takes no snapshot in train.steps = 3",
        ),
        (
            ["average.kind=queue", "average.every_steps=1", "average.from_step=9"],
            "from_step = 9 takes no snapshot",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        resolve(load_track("shakespeare-sprint"), "adamw", ["train.steps=3", *settings])
