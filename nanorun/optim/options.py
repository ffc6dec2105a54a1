"""What an optimizer may be told, in one table that the checks, the configs and the help pages share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nanorun.errors import UserError, nearest

REQUIRED = "required"


@dataclass(frozen=True)
class Option:
    """One option: what it is if nobody sets it, which values it takes, and what it means."""

    default: Any
    """The value if none is given; REQUIRED where there must be one, None where unset means something."""
    meaning: str
    """One line for the help page."""
    low: float = -math.inf
    """The smallest value allowed."""
    high: float = math.inf
    """The largest value allowed, or the first one that is not, under `below_high`."""
    below_high: bool = False
    """Whether `high` itself is refused."""
    choices: tuple[str, ...] = ()
    """The words allowed, where the value is a word."""

    @property
    def kind(self) -> str:
        """One of "choice", "bool", "int", "pair" and "float"."""
        if self.choices:
            return "choice"
        kinds = {bool: "bool", int: "int", tuple: "pair"}
        return kinds.get(type(self.default), "float")

    @property
    def allowed(self) -> str:
        """The allowed values, as a message or a help page names them."""
        if self.choices:
            return " or ".join(repr(choice) for choice in self.choices)
        if self.kind == "bool":
            return "true or false"
        noun = {"int": "a whole number", "pair": "two numbers, each", "float": "a number"}[self.kind]
        low = f" of at least {self.low:g}" if math.isfinite(self.low) else ""
        high = f"{' and' if low else ''} {'below' if self.below_high else 'at most'} {self.high:g}"
        unset = ", or none at all" if self.default is None else ""
        return noun + low + (high if math.isfinite(self.high) else "") + unset

    def accept(self, value: Any) -> Any:
        """Return the value as the constructor wants it; raise ValueError where it is not allowed."""
        if value is None and self.default is None:
            return None
        if self.kind == "choice":
            if value not in self.choices:
                raise ValueError
            return value
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise ValueError
            return value
        if self.kind == "pair":
            if isinstance(value, str) or len(value) != 2:
                raise ValueError
            return tuple(self._number(number) for number in value)
        return self._number(value)

    def _number(self, value: Any) -> float | int:
        whole = self.kind == "int"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValueError
        number = value if whole else float(value)
        if not math.isfinite(number) or not self.low <= number <= self.high:
            raise ValueError
        if self.below_high and number == self.high:
            raise ValueError
        return number


@dataclass(frozen=True)
class Variant:
    """An algorithm under another name: some of its options held, others with another default."""

    summary: str
    """One line for the help page."""
    paper: str
    held: Mapping[str, Any] = field(default_factory=dict)
    """Options that make it what it is; they cannot be given."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options with a default of their own, which can be given."""

    def options(self, table: Mapping[str, Option]) -> dict[str, Option]:
        """Return the table of the options that can be given."""
        return {
            name: replace(option, default=self.defaults[name]) if name in self.defaults else option
            for name, option in table.items()
            if name not in self.held
        }


def check_options(algorithm: str, table: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option of the table with its given or default value, in the table's order.

    Raises UserError that names an option which is unknown, missing or out of range, its value and what is
    allowed.
    """
    for name in given:
        if name not in table:
            hint = nearest(name, list(table))
            raise UserError(f"{algorithm} has no option {name!r}: it takes {', '.join(table)}.{hint}")
    accepted = {}
    for name, option in table.items():
        value = given.get(name, option.default)
        if name not in given and option.default is REQUIRED:
            raise UserError(
                f"{algorithm} needs the option {name!r} ({option.meaning}): give it {option.allowed}"
            )
        try:
            accepted[name] = option.accept(value)
        except (TypeError, ValueError):
            raise UserError(
                f"{algorithm}: {name} = {value!r} is not allowed: wanted {option.allowed}"
            ) from None
    return accepted
