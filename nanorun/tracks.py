"""Tracks: what a competition fixes, what it scores and when a result counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanorun.errors import UserError, nearest
from nanorun.names import is_track_name
from nanorun.tables import flattened, read_toml

DEFAULT_TRACK = "sotu"
DEFAULT_PRESET = "muon"


class Significance(BaseModel):
    """When the mean final loss of a row counts as under the target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["t", "margin", "z"] = "t"
    """`t`: one-sided t-test. `margin`: (target − mean)·√n ≥ margin. `z`: the same test with a known sigma."""
    n: int = Field(3, ge=1)
    """Fewest seeds."""
    alpha: float | None = Field(None, gt=0, lt=1)
    margin: float | None = Field(None, gt=0)
    sigma: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _has_what_its_rule_needs(self) -> Significance:
        needed = {"t": ("alpha",), "margin": ("margin",), "z": ("alpha", "sigma")}[self.rule]
        missing = [key for key in needed if getattr(self, key) is None]
        if missing:
            raise ValueError(f"rule {self.rule!r} needs {', '.join(missing)}")
        return self


class Track(BaseModel):
    """A competition, as its track.toml states it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str
    kind: Literal["optimizer", "open"]
    """`optimizer`: model, corpus and tokens of a step are fixed. `open`: the text, its split and the target."""
    target_val_loss: float = Field(gt=0)
    """Nats a token."""
    scored_in: Literal["seconds", "steps", "tokens"]
    significance: Significance
    fixed: dict[str, Any]
    """Nested config tables that a run may not change."""
    folder: Path

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise UserError for the first fixed key that a config's tables contradict: key, two values, mend."""
        values = flattened(config)
        for key, wanted in flattened(self.fixed).items():
            if values.get(key) != wanted:
                elsewhere = "pick another track" if self.kind == "open" else "pick an open track"
                names = ", ".join(name for name in _tracks_without(key, wanted) if name != self.name)
                raise UserError(
                    f"track {self.name!r} fixes {key} = {wanted!r}, and this run has {values.get(key)!r}: leave "
                    f"{key} out" + (f", or {elsewhere}: {names}" if names else "")
                )


def _tracks_without(key: str, wanted: Any) -> list[str]:
    """Return the tracks that do not fix `key` to `wanted`, optimizer tracks aside; a broken one is left out."""
    names = []
    for name in track_names():
        try:
            track = load_track(name)
        except UserError:
            continue
        if track.kind == "open" and flattened(track.fixed).get(key) != wanted:
            names.append(name)
    return names


def config_folders() -> list[Path]:
    """Return the folders that hold tracks, the user's own `./configs` first."""
    here = Path(__file__).resolve().parent
    found = [Path("configs"), here / "configs", here.parent / "configs"]
    return [folder for folder in found if folder.is_dir()]


def track_names() -> list[str]:
    """Return the names of all tracks at hand, sorted."""
    return sorted({path.parent.name for folder in config_folders() for path in folder.glob("*/track.toml")})


def load_track(name: str) -> Track:
    """Return the track called `name`; raises UserError for an unknown name or a broken file."""
    if name not in track_names():
        known = track_names()
        raise UserError(f"no track {name!r}; there are {', '.join(known)}.{nearest(name, known)}")
    path = next(p for f in config_folders() if (p := f / name / "track.toml").is_file())
    if not is_track_name(name):
        raise UserError(
            f"{path.parent}: {name!r} cannot be a track's name; rename the folder to at most 64 letters, digits, "
            "dots, dashes and underscores that begin with a letter or digit (and not 'benchmarks')"
        )
    values = {**read_toml(path), "name": name, "folder": path.parent}
    try:
        return Track.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key}: {first['msg']}") from None


def preset_names(track: Track) -> list[str]:
    """Return the presets under a track, sorted: what `--optim` takes."""
    return sorted(path.stem for path in track.folder.glob("*.toml") if path.stem != "track")
