"""The public results table, checked against its own logs: which runs a row stands on, and what is said of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from runs_samples import log_text, write_log
from scripts_loader import script

HEAD = "| # | Steps to 3.28 | Evidence | Description | Date | Log | Contributors |\n" + "| - " * 7 + "|\n"


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Return a function that checks a table of these rows: its rows by their numbers, and what was printed."""
    monkeypatch.chdir(tmp_path)

    def check(*rows: str):
        Path("README.md").write_text(
            "# Results\n\n" + HEAD + "".join(f"| {row} | by me |\n" for row in rows) + "\n| 9 |\n"
        )
        monkeypatch.setattr(sys, "argv", ["verify_public_table.py", "README.md", "--json", "out.json"])
        with script("verify_public_table") as module:
            module.main()
        document = json.loads(Path("out.json").read_text())
        return {row["row"]: row for row in document["table"]}, capsys.readouterr().out

    return check


def row(number: int, link: str, mean: str, n: int, mark: str = "✓", step: int = 100) -> str:
    return f"{number} | {step}(!) | {mean} (n={n}){mark} | Muon \\o/ | 2026/01/01 | [log]({link})"


def test_a_row_is_judged_by_its_linked_log_or_by_the_folder_of_its_own(checked):
    write_log(Path("results/one.txt"), 3.27)
    write_log(Path("results/two.txt"), 3.279)
    for index in range(4):
        write_log(Path(f"results/many/{index}.txt"), 3.2775 + index / 1e4)
    rows, out = checked(
        row(1, "results/one.txt", "3.2700", 1),
        row(2, "results/two.txt", "3.2790", 1, "Ⓧ"),
        row(3, "results/many/2.txt", "3.2776", 4),
    )
    assert [(one["n"], one["mean_loss"], one["passes"]) for one in rows.values()] == [
        (1, 3.27, True),
        (1, 3.279, False),
        (4, 3.27765, True),
    ]
    assert not rows[1]["differs"]
    assert not rows[2]["differs"]
    assert "2 of 3 rows pass; failing: [2]" in out


def test_logs_of_another_configuration_in_the_folder_are_not_averaged(checked):
    for index in range(3):
        write_log(Path(f"results/x/a{index}.txt"), 3.271 + index / 1e4)
        write_log(Path(f"results/x/b{index}.txt"), 3.2 + index / 1e4, steps=200)
    rows, _ = checked(row(1, "results/x/a0.txt", "3.2711", 3))
    assert rows[1]["n"] == 3
    assert rows[1]["mean_loss"] == pytest.approx(3.2711)
    assert "of 6 in its folder" in rows[1]["runs"]


def test_what_the_table_and_the_logs_say_differently_is_told(checked):
    write_log(Path("results/x/a.txt"), 3.279)
    Path("results/x/README.md").write_text("about these runs")
    rows, out = checked(row(1, "results/x/README.md", "3.2780", 20))
    assert rows[1]["passes"] is False
    assert len(rows[1]["differs"]) == 3
    assert "1 of 20 runs are there" in out
    assert "the table says it passes, the logs say it fails" in out


def test_another_loss_is_taken_only_where_it_alone_has_the_claimed_mean(checked):
    text = log_text({50: 3.4, 100: 3.29}, steps=100).replace(
        " train_time", " val_ema_loss:3.27000 train_time"
    )
    Path("results").mkdir()
    Path("results/a.txt").write_text(text)
    assert checked(row(1, "results/a.txt", "3.2700", 1))[0][1]["loss"] == "val_ema_loss"
    assert checked(row(1, "results/a.txt", "3.2900", 1))[0][1]["loss"] == "val_loss"
    assert checked(row(1, "results/a.txt", "3.2600", 1))[0][1]["loss"] == "val_loss"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (row(1, "../secret.txt", "3.27", 1), "which is not there"),
        (row(1, "results/none.txt", "3.27", 1), "which is not there"),
        (row(1, "results/a.txt", "3.27", 1, step=77), "at step 77"),
        ("1 | many | 3.27 (n=1) | x | y | [log](a.txt)", "row 1 of the table cannot be read"),
    ],
)
def test_a_row_that_cannot_be_checked_ends_in_a_sentence(line: str, said: str, checked, capsys):
    Path("../secret.txt").write_text(log_text({100: 3.2}, steps=100))
    write_log(Path("results/a.txt"), 3.27)
    with pytest.raises(SystemExit, match="2"):
        checked(line)
    assert said in capsys.readouterr().err
