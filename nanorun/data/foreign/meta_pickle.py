"""The plain data in a pickle, without unpickling it.

A pickle is a program. Unpickling runs it, and its opcodes can import and call anything. Here the program is read by
`pickletools`, which runs nothing, and only the opcodes that build dicts, lists, strings, whole numbers, booleans and
None are carried out, on a stack of our own; everything else is refused by its name and place.
"""

from __future__ import annotations

import pickletools
from typing import Any

from nanorun.errors import UserError

MOST_BYTES = 16 << 20
"""65,536 characters and their ids, both ways, take four million."""
MOST_KEY_BITS = 60
"""Whole numbers up to there hash to themselves; larger ones could be chosen to make a dict slow without end."""
NEWEST_PROTOCOL = 5
_MEND = "make the file again, or leave it out and say --tokenizer"


class _Mark:
    """Where the items of a list or dict begin on the stack."""


class _Refused(Exception):
    """What is wrong; where is added by whoever knows it."""


def read_plain_pickle(data: bytes, where: str) -> Any:
    """Return the dicts, lists, str, int, bool and None that a pickle of any protocol holds.

    `UserError`, which begins with `where`, for a pickle that needs anything else, holds one container twice or within
    itself, is broken, cut, followed by something, or larger than `MOST_BYTES`.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"{where}: {len(data):,} bytes, at most {MOST_BYTES:,} are read; {_MEND}.")
    machine = _Machine(len(data))
    name, place = "", 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            name, place = opcode.name, position or 0
            machine.carry_out(name, argument, place)
        return machine.result(place + 1)
    except _Refused as error:
        raise UserError(f"{where}: byte {place}, opcode {name}: {error}; {_MEND}.") from None
    except (ValueError, OverflowError, MemoryError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not a whole pickle, from byte {place} on ({said}); {_MEND}.") from None


class _Machine:
    """Carries out the opcodes that plain data needs."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._frame_end = 0

    def carry_out(self, name: str, argument: Any, place: int) -> None:
        stack = self._stack
        match name:
            case "PROTO":
                self._check_protocol(argument, place)
            case "FRAME":
                self._enter_frame(place + 9 + argument)
            case "MARK":
                stack.append(_Mark)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4":
                stack.append(argument)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if name == "EMPTY_LIST" else {})
            case "LIST":
                stack.append(self._pop_to_mark())
            case "DICT":
                stack.append(self._put_in({}, self._pop_to_mark()))
            case "APPEND" | "APPENDS":
                items = self._pop_to_mark() if name == "APPENDS" else [self._pop()]
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop_to_mark() if name == "SETITEMS" else [self._pop(), self._pop()][::-1]
                self._put_in(self._top(dict), items)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._top(object)
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._remembered(argument))
            case "STOP":
                pass
            case _:
                raise _Refused(
                    "not needed for dicts, lists, strings, whole numbers, booleans and None: refused"
                )

    def result(self, end: int) -> Any:
        """Return what is left on the stack when STOP, the byte before `end`, is reached."""
        if len(self._stack) != 1 or self._stack[0] is _Mark:
            raise _Refused(f"{len(self._stack)} values are left, expected 1")
        if end != self._size:
            raise _Refused(f"{self._size - end:,} bytes follow the end")
        if end < self._frame_end:
            raise _Refused("a frame that is longer than the pickle")
        return self._stack[0]

    def _check_protocol(self, protocol: int, place: int) -> None:
        if place or not 2 <= protocol <= NEWEST_PROTOCOL:
            raise _Refused(f"protocol {protocol} at byte {place}, expected 2 to {NEWEST_PROTOCOL} at byte 0")

    def _enter_frame(self, end: int) -> None:
        if end > self._size:
            raise _Refused(f"a frame that ends at byte {end:,} of {self._size:,}")
        self._frame_end = end

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _Mark:
            raise _Refused("takes a value where there is none")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _Mark:
                items = self._stack[at + 1 :]
                del self._stack[at:]
                return items
        raise _Refused("there is no MARK before it")

    def _top(self, kind: type[Any]) -> Any:
        if not self._stack or self._stack[-1] is _Mark or not isinstance(self._stack[-1], kind):
            raise _Refused(f"expected {kind.__name__} on the stack")
        return self._stack[-1]

    def _put_in(self, table: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise _Refused("a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            if isinstance(key, list | dict):
                raise _Refused(f"a {type(key).__name__} as a key")
            if isinstance(key, int) and key.bit_length() > MOST_KEY_BITS:
                raise _Refused(f"a number of {key.bit_length():,} bits as a key")
            table[key] = value
        return table

    def _remembered(self, place: int) -> Any:
        if place not in self._memo:
            raise _Refused(f"asks for value {place}, which was never kept")
        value = self._memo[place]
        # A container twice could be one within itself; what is left is a tree.
        if isinstance(value, list | dict):
            raise _Refused(f"the same {type(value).__name__} a second time")
        return value
