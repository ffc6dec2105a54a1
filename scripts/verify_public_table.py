"""The results table of the public speedrun's track 3, checked row by row against its own logs.

    python scripts/verify_public_table.py records/track_3_optimization/README.md --json public-track3.json

For each row: the runs behind its link, n, the mean loss at the claimed step, and the verdict of the track's rule,
(3.28 - mean)·√n ≥ 0.004, beside what the table says. The README and the logs are those of
https://github.com/KellerJordan/modded-nanogpt, files that are only read.

Which runs a row stands on is told by the link and the claimed n alone: the linked log's runs where they are n, else
those of its folder (where no other row links into it), else those of the folder that are alike with the linked
log's. The loss is `val_loss`, unless another loss of the same runs has the claimed mean and `val_loss` has not.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistakes import telling_mistakes

from nanorun.errors import UserError, printable
from nanorun.files import write_whole
from nanorun.records.runs import VAL_LOSS, ComparedRun, group_runs, read_runs
from nanorun.records.significance import Rule
from nanorun.records.verify import Claim, GroupVerdict, judge_group

TARGET = 3.28
RULE = Rule("margin", n=1, margin=0.004)
FAILS = "Ⓧ"
LAST_DIGIT = 1e-4
"""The table prints means to this."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    number: int
    step: int
    mean: float
    n: int
    passes: bool
    link: str


def table_rows(text: str) -> Iterator[Row]:
    """The rows of the first table whose columns are #, Steps…, Evidence…, Log."""
    columns: dict[str, int] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not columns and cells[0] == "#" and "Evidence" in cells and "Log" in cells:
            columns = {"step": 1, "evidence": cells.index("Evidence"), "log": cells.index("Log") - len(cells)}
        elif columns and not line.startswith("|"):
            return
        elif columns and cells[0].isdigit():
            yield _row(cells, columns)


def _row(cells: Sequence[str], columns: dict[str, int]) -> Row:
    step = re.match(r"(\d{1,9})", cells[columns["step"]])
    evidence = re.match(r"(\d\.\d{1,9}) \(n=(\d{1,6})\)(\S?)", cells[columns["evidence"]])
    link = re.search(r"\]\(([^)\s]+)\)", cells[columns["log"]])
    if not (step and evidence and link):
        raise UserError(f"row {cells[0]} of the table cannot be read: {printable(' | '.join(cells))[:200]}")
    mean, n, mark = evidence.groups()
    return Row(int(cells[0]), int(step[1]), float(mean), int(n), mark != FAILS, link[1])


def runs_of(row: Row, root: Path, shared: set[Path]) -> tuple[list[ComparedRun], str]:
    """Return the runs that a row stands on, and how they were chosen. `shared` are folders of several rows' logs."""
    path = (root / row.link).resolve()
    if not path.is_relative_to(root.resolve()) or not path.exists():
        raise UserError(f"row {row.number} links to {printable(row.link)}, which is not there")
    linked = [] if path.suffix == ".md" else _with_step(read_runs([path]).runs, row.step)
    if linked and (len(linked) == row.n or path.parent in shared):
        return linked, "the linked log"
    beside = _with_step(read_runs([path.parent]).runs, row.step)
    if len(beside) > row.n and linked:
        alike = [run for run in beside if run.identity == linked[0].identity]
        return alike, f"the runs like the linked log's, of {len(beside)} in its folder"
    return beside, "the folder of the link"


def _with_step(runs: Sequence[ComparedRun], step: int) -> list[ComparedRun]:
    return [run for run in runs if run.at(VAL_LOSS, step)]


def verdict_on(row: Row, runs: Sequence[ComparedRun]) -> tuple[GroupVerdict, str]:
    """Return the verdict on a row's runs at its step, and the loss it is of."""
    group = group_runs(runs, pool=True)[0]

    def judged(loss: str) -> GroupVerdict:
        return judge_group(group, Claim(TARGET, RULE, row.step, loss, None))

    plain = judged(VAL_LOSS)
    if _is_off(plain.mean_loss, row.mean, 2 * LAST_DIGIT):
        for key in sorted({key for run in runs for key in run.curves} - {VAL_LOSS}):
            other = judged(key)
            if other.n == plain.n and not _is_off(other.mean_loss, row.mean, LAST_DIGIT):
                return other, key
    return plain, VAL_LOSS


def _is_off(found: float | None, claimed: float, by: float) -> bool:
    return found is None or abs(found - claimed) > by


def check(row: Row, root: Path, shared: set[Path]) -> dict[str, Any]:
    """Return one row of the output: the claim, what the logs say, and where the two are not alike."""
    runs, chosen = runs_of(row, root, shared)
    if not runs:
        raise UserError(f"row {row.number}: no run of its logs has a validation at step {row.step}")
    found, loss = verdict_on(row, runs)
    assert found.mean_loss is not None
    differs = []
    if found.n != row.n:
        differs.append(f"{found.n} of {row.n} runs are there")
    if found.passes != row.passes:
        differs.append(f"the table says {_verdict(row.passes)}, the logs say {_verdict(found.passes)}")
    if _is_off(found.mean_loss, row.mean, LAST_DIGIT / 2 + 1e-9):
        differs.append(f"the mean of the logs is {found.mean_loss:.6f}, the table's {row.mean:.4f}")
    return {
        "row": row.number,
        "step": row.step,
        "claimed": {"n": row.n, "mean_loss": row.mean, "passes": row.passes},
        "n": found.n,
        "mean_loss": round(found.mean_loss, 6),
        "std_loss": None if found.std_loss is None else round(found.std_loss, 6),
        "margin": None if found.margin is None else round(found.margin, 6),
        "passes": found.passes,
        "earliest_passing_step": found.earliest_passing_step,
        "loss": loss,
        "runs": chosen,
        "differs": differs,
        "weaknesses": list(found.weaknesses),
        "files": sorted({str(Path(run.file).resolve().relative_to(root.resolve())) for run in runs}),
    }


def _verdict(passes: bool) -> str:
    return "it passes" if passes else "it fails"


def check_table(readme: Path) -> dict[str, Any]:
    """Return the output for a whole table."""
    try:
        rows = list(table_rows(readme.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme}: cannot be read ({error})") from None
    if not rows:
        raise UserError(f"{readme} holds no results table with the columns #, Steps, Evidence and Log")
    folders = Counter((readme.parent / row.link).resolve().parent for row in rows)
    shared = {folder for folder, count in folders.items() if count > 1}
    found = [check(row, readme.parent, shared) for row in rows]
    return {
        "target": TARGET,
        "rule": RULE.describe(TARGET).replace("declared last", "claimed"),
        "rows": len(found),
        "passing": sum(row["passes"] for row in found),
        "failing": [row["row"] for row in found if not row["passes"]],
        "table": found,
    }


def lines(document: dict[str, Any]) -> Iterator[str]:
    """The output as a person reads it."""
    yield f"{'row':>3} {'step':>5} {'n':>3} {'mean loss':>10} {'margin':>9}  verdict  (claimed)"
    for row in document["table"]:
        claim = row["claimed"]
        yield (
            f"{row['row']:>3} {row['step']:>5} {row['n']:>3} {row['mean_loss']:>10.6f} {row['margin']:>9.5f}  "
            f"{'passes ' if row['passes'] else 'fails  '}  (n={claim['n']}, {claim['mean_loss']:.4f}, "
            f"{'passes' if claim['passes'] else 'fails'})"
        )
        for text in [*row["differs"], *([f"by {row['loss']}"] if row["loss"] != VAL_LOSS else [])]:
            yield f"{'':>8}{printable(text)}"
    yield f"{document['passing']} of {document['rows']} rows pass; failing: {document['failing']}"


@telling_mistakes("verify_public_table")
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readme", type=Path, help="the track's README.md, beside its results folder")
    parser.add_argument("--json", type=Path, help="write all of it here")
    asked = parser.parse_args()
    document = check_table(asked.readme)
    if asked.json:
        text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_whole(asked.json, text, mend="choose another --json")
    print("\n".join(lines(document)))


if __name__ == "__main__":
    main()
