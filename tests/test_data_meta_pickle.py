"""Pickles are read and never run."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct

import pytest
from foreign_samples import flipped
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.data.foreign import meta_pickle
from nanorun.data.foreign.meta_pickle import read_plain_pickle
from nanorun.errors import UserError

PROTOCOLS = range(6)
CHARS = "\n !,.:abcdefgæé中😀"
META = {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": {c: i for i, c in enumerate(CHARS)}}

scalars = st.none() | st.booleans() | st.integers() | st.text()
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.integers(-(2**50), 2**50), inner, max_size=4)
    ),
    max_leaves=12,
)


class Evil:
    """Unpickling one makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _read(data):
    return read_plain_pickle(data, "meta.pkl")


def _read_or_refused(data):
    """What a pickle holds, or what it is refused with; any other error ends the test."""
    try:
        return _read(data)
    except UserError as error:
        return str(error)


@given(plain, st.sampled_from(PROTOCOLS))
@settings(max_examples=200, deadline=None)
def test_plain_data_comes_back_from_every_protocol(value, protocol):
    found = _read(pickle.dumps(value, protocol=protocol))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_table_of_characters_comes_back_from_every_protocol(protocol):
    assert _read(pickle.dumps(META, protocol=protocol)) == META


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_table_that_is_larger_than_a_frame_comes_back(protocol):
    chars = [chr(i) for i in range(0x4E00, 0x4E00 + 20000)]
    table = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }
    assert _read(pickle.dumps(table, protocol=protocol)) == table


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_that_would_run_a_command_runs_nothing_and_is_refused_by_name_and_place(protocol, tmp_path):
    marker = tmp_path / "ran"
    data = pickle.dumps({"vocab_size": 3, "itos": Evil(marker)}, protocol=protocol)
    name = "GLOBAL" if protocol < 4 else "STACK_GLOBAL"
    place = next(place for opcode, _, place in pickletools.genops(data) if opcode.name == name)
    with pytest.raises(UserError, match=rf"^meta\.pkl: byte {place}, opcode {name}: .*refused"):
        _read(data)
    assert not marker.exists()
    # The same bytes do run where a pickle is trusted: the test would notice.
    pickle.loads(data)
    assert marker.exists()


NEEDED = {
    name
    for line in (
        "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4",
        "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST EMPTY_DICT LIST DICT APPEND APPENDS",
        "SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET",
    )
    for name in line.split()
}


@pytest.mark.parametrize(
    "opcode", [o for o in pickletools.opcodes if o.name not in NEEDED], ids=lambda o: o.name
)
def test_every_opcode_that_plain_data_does_not_need_is_refused(opcode):
    lines = {"stringnl": b"'a'\n", "stringnl_noescape_pair": b"os\nsystem\n", "floatnl": b"1.5\n"}
    argument = b""
    if opcode.arg is not None:
        argument = lines.get(opcode.arg.name) or (
            b"1\n" if opcode.arg.n == pickletools.UP_TO_NEWLINE else bytes(8)
        )
    data = b"\x80\x04N" + opcode.code.encode("latin-1") + argument + b"."
    with pytest.raises(UserError, match=rf"byte 3, opcode {opcode.name}: not needed"):
        _read(data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_cut_anywhere_is_refused(protocol):
    data = pickle.dumps(META, protocol=protocol)
    for length in range(len(data)):
        with pytest.raises(UserError, match=r"^meta\.pkl: "):
            _read(data[:length])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_flipped_bit_is_refused_or_changes_the_table(protocol):
    data = pickle.dumps(META, protocol=protocol)
    same = 0
    for place in range(len(data)):
        for bit in range(8):
            found = _read_or_refused(flipped(data, place, bit))
            same += found == META
            assert not isinstance(found, str) or found.startswith("meta.pkl: ")
    # What is left is other ways of saying the same: the number of a protocol, a place in a memo that nobody asks for.
    assert same < len(data)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(data):
    for start in (b"", b"\x80\x04", b"\x80\x04]", b"\x80\x04}("):
        found = _read_or_refused(start + data)
        assert not isinstance(found, str) or found.startswith("meta.pkl: ") or found.encode() in data


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_container_within_itself_is_refused(kind, protocol):
    inner = kind()
    if kind is list:
        inner.append(inner)
    else:
        inner["again"] = inner
    with pytest.raises(UserError, match=rf"GET: the same {kind.__name__} a second time"):
        _read(pickle.dumps({"itos": inner}, protocol=protocol))


def test_a_pickle_that_doubles_itself_is_refused():
    value: list = []
    for _ in range(50):
        value = [value, value]
    with pytest.raises(UserError, match="the same list a second time"):
        _read(pickle.dumps(value))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a.",
        b"\x80\x04\x8b" + struct.pack("<i", (1 << 31) - 1) + b"a.",
        b"\x80\x04\x8b" + struct.pack("<i", -1) + b"a.",
        b"\x80\x04X" + struct.pack("<I", (1 << 32) - 1) + b"a.",
        b"I" + b"9" * 10_000 + b"\n.",
        b"L" + b"9" * 10_000 + b"L\n.",
    ],
    ids=["text of 2**62 bytes", "number of 2 GiB", "number of -1", "text of 4 GiB", "digits", "long digits"],
)
def test_lengths_that_lie_are_refused_at_once(data):
    with pytest.raises(UserError, match="not a whole pickle"):
        _read(data)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not a whole pickle"),
        (b".", "0 values are left"),
        (b"NN.", "2 values are left"),
        (b"(.", "1 values are left"),
        (b"N.N", "1 bytes follow the end"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\x80\x00N.", "protocol 0"),
        (b"N\x80\x04.", "protocol 4 at byte 1"),
        (b"\x80\x04\x95" + struct.pack("<Q", 99) + b"N.", "a frame that ends at byte 110"),
        (b"Nu.", "no MARK"),
        (b"}(Nu.", "a key without a value"),
        (b"(e.", "list on the stack"),
        (b"}(Ne.", "list on the stack"),
        (b"](NNu.", "dict on the stack"),
        (b"]a.", "expected list on the stack"),
        (b"(a.", "takes a value where there is none"),
        (b"}]Ns.", "a list as a key"),
        (b"}}Ns.", "a dict as a key"),
        (b"h\x07.", "value 7, which was never kept"),
        (b"q\x00.", "expected object on the stack"),
        (b"(\x94.", "expected object on the stack"),
    ],
)
def test_a_broken_program_is_refused_with_the_reason(data, complaint):
    with pytest.raises(UserError, match=complaint):
        _read(data)


def test_numbers_that_would_make_a_dict_slow_are_no_keys():
    modulus = (1 << 61) - 1
    with pytest.raises(UserError, match="a number of 61 bits as a key"):
        _read(pickle.dumps({modulus: 1}))


def test_nesting_has_no_depth_that_ends_the_process():
    depth = 100_000
    found = _read(b"]" * depth + b"a" * (depth - 1) + b".")
    assert isinstance(found, list)
    while found:
        (found,) = found


def test_a_large_memo_costs_what_it_holds():
    data = b"\x80\x04" + b"".join(b"Nr" + struct.pack("<I", 4_000_000_000 + i) for i in range(3))
    with pytest.raises(UserError, match="3 values are left"):
        _read(data + b".")


def test_a_file_beyond_the_limit_is_refused_by_its_size(monkeypatch):
    monkeypatch.setattr(meta_pickle, "MOST_BYTES", 100)
    with pytest.raises(UserError, match=r"^meta\.pkl: \d+ bytes, at most 100 are read; make the file again"):
        _read(pickle.dumps(META))
