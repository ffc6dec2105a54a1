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
from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.build import ELSEWHERE, algorithms, find_algorithm, optimizer_names
from nanorun.optimizers import all_names, describe, state_bytes
from nanorun.records.record import read_records
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
        ('ROLES = ("matrices",)', "ROLES has 'matrices': wanted embedding, head, matrix, vector"),
    ],
)
def test_a_module_laid_out_wrongly_is_refused_with_the_mend(tmp_path, line, message):
    (tmp_path / "mine.py").write_text(MATRICES_ONLY + line + "\n")
    with pytest.raises(UserError, match=message):
        find_algorithm(f"{tmp_path}/mine.py:Plain")


def test_names_that_create_takes_are_all_names_but_schedules_and_averages():
    assert sorted([*optimizer_names(), *ELSEWHERE]) == all_names()
