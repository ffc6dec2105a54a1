"""`records/README.md`: the tables of every track, rendered from the records and never edited.

The same records give the same bytes: no time of rendering, no path of this machine.
"""

from __future__ import annotations

from pathlib import Path

from nanorun.errors import RunFailed, UserError
from nanorun.files import write_whole
from nanorun.records.index import indexed_records
from nanorun.records.record import Skipped
from nanorun.records.report import TrackView, build_table, markdown_text, to_markdown
from nanorun.records.show import target_of
from nanorun.records.states import states_of
from nanorun.tracks import load_track, track_names

COMMAND = "nanorun report --readme"
INTRODUCTION = f"""# Records

Rendered from the records in this folder by `{COMMAND}`, and never edited: CI fails when it is stale, and a merge
that conflicts here is mended by rendering it again. A record is a folder, `<track>/<date>-<name>-<id>/`, written once.
"""


def readme_text(root: Path) -> str:
    """Return the README of the records under `root`."""
    records, skipped = indexed_records(root, None, target_of)
    states = states_of(root, records)
    beside = [Skipped(path.relative_to(root), why) for path, why in skipped]
    held = sorted({record.track for record in records} | {path.parent.name for path, _ in beside})
    known = track_names()
    parts = [INTRODUCTION]
    if not held:
        parts.append("There are none yet. Make one: `nanorun train`\n")
    for name in held:
        if name in known:
            of_track = [one for one in beside if one.path.parent.name == name]
            view = TrackView.of(load_track(name))
            parts.append(to_markdown(build_table(view, records, skipped=of_track, states=states)))
        else:
            parts.append(f"### {markdown_text(name)}\n\nRecords of a track that is not here.\n")
    return "\n".join(parts)


def render_readme(root: Path, *, out: Path | None, check: bool) -> str:
    """Write the README, or check that it is what it would be; return one line that says so.

    Raises RunFailed where it is stale, with the command that mends it.
    """
    place = out or root / "README.md"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; name the folder of records with --records")
    text = readme_text(root)
    if not check:
        write_whole(place, text, mend="choose another --out")
        return f"{place} is rendered"
    if _content(place) != text:
        options = ("" if root == Path("records") else f" --records {root}") + (f" --out {out}" if out else "")
        found = "is stale" if place.exists() else "is missing"
        raise RunFailed(f"{place} {found}; render it again: {COMMAND}{options}")
    return f"{place} is what the records say"


def _content(path: Path) -> str | None:
    """What a file holds, line ends aside; None for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
