"""Checkpoints that somebody made to do harm, their hashes right: nothing runs or swells, each is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hostile_samples import QUIET, changed_options, copied, newest, sealed, stopped_run

from nanorun.config import resolve
from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.optim.build import build_optimizers
from nanorun.sample import sample
from nanorun.tracks import load_track, preset_names
from nanorun.training import saved
from nanorun.training.memory import foreseen_states, shapes_of
from nanorun.training.run import resume_run


@pytest.fixture(scope="module")
def run_of_module(tmp_path_factory, shakespeare_folder):
    return stopped_run(tmp_path_factory.mktemp("run"), shakespeare_folder)


@pytest.fixture
def run(run_of_module, tmp_path, monkeypatch):
    """The folder of a run that was stopped after step 4, to damage."""
    monkeypatch.chdir(tmp_path)
    return copied(run_of_module, tmp_path)


@pytest.fixture
def state(run):
    return json.loads((newest(run) / "state.json").read_text())


def write_state(run, state):
    (newest(run) / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    sealed(newest(run))


def refused(run, said):
    with pytest.raises(UserError) as error:
        resume_run(run, QUIET)
    assert said in str(error.value)
    assert newest(run).name in str(error.value)


def test_a_sealed_checkpoint_is_resumed(run):
    sealed(newest(run))
    assert resume_run(run, QUIET)["steps"] == 6


BROKEN_STATES = {
    "no JSON": ("{", "state.json cannot be read"),
    "no object": ("[]", "no JSON object"),
    "deep": ("[" * 100_000, "state.json cannot be read"),
    "NaN": ('{"step": NaN}', "NaN is no JSON number"),
    "a number of 5000 digits": (f'{{"step": {"9" * 5000}}}', "state.json cannot be read"),
    "empty": ("{}", "state.json: step is missing"),
    "half a letter": ('{"step": "\\udc80"}', "step is"),
}


@pytest.mark.parametrize("what", BROKEN_STATES)
def test_a_state_that_is_none_is_refused_by_name(run, what):
    content, said = BROKEN_STATES[what]
    write_state(run, content)
    refused(run, said)


WRONG_VALUES = {
    "step": (7, "step is 7, of a run of 6 steps"),
    "clock": ({"train": "long"}, "clock is {'train': 'long'}"),
    "choices.n_threads": (10**9, "choices.n_threads is 1000000000; wanted 1 to 4096"),
    "choices.micro_batch_rows": (0, "choices.micro_batch_rows is 0"),
    "outcome.validation": ([{"step": 2}], "tokens is missing"),
    "outcome.code": ({}, "version is missing"),
    "corpus_sha256": (5, "corpus_sha256 is 5; wanted a text"),
    "mix": ([{"name": "a"}], "mix[0].share is missing"),
}


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_a_state_with_a_wrong_value_is_refused_by_its_key(run, state, key):
    value, said = WRONG_VALUES[key]
    *outer, last = key.split(".")
    table = state
    for part in outer:
        table = table[part]
    table[last] = value
    write_state(run, state)
    refused(run, said)


NONSENSE = (None, True, -1, 0, 2**70, 1e308, "x", "\x1b[2J", [], [[]], {}, {"a": {"b": [1]}})


def mutations(value, path=()):
    """Yield (place, changed copy) for every place of a JSON value: each nonsense in its stead, and without it."""
    if path:
        yield from ((path, one) for one in NONSENSE)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield ((*path, key), KeyError)
            yield from mutations(inner, (*path, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from mutations(inner, (*path, index))


def changed(state, path, value):
    copy = json.loads(json.dumps(state))
    table = copy
    for part in path[:-1]:
        table = table[part]
    if value is KeyError:
        del table[path[-1]]
    else:
        table[path[-1]] = value
    return copy


def test_any_change_of_a_state_is_refused_by_name_or_a_value_of_the_same_kind(run, state):
    said = []
    for path, value in mutations(state):
        try:
            saved.check_state(changed(state, path, value), newest(run), steps=6)
            said.append("")
        except UserError as error:
            said.append(str(error))
    assert all("state.json: " in one for one in said if one)
    assert sum(map(bool, said)) > 200
    assert said.count("") > 20


@pytest.mark.slow
def test_any_change_of_a_state_ends_in_a_run_or_a_sentence(run, state, monkeypatch):
    threads = torch.get_num_threads()
    for path, value in list(mutations(state))[::7]:
        write_state(run, changed(state, path, value))
        try:
            resume_run(run, QUIET)
            (run / "result.json").unlink()
            for made in (run / "checkpoints").glob("step-00000006*/*"):
                made.unlink()
            (run / "checkpoints/step-00000006").rmdir()
        except UserError:
            pass
        torch.set_num_threads(threads)


class Payload:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


def test_a_pickle_that_would_run_code_is_refused_in_every_form(run, tmp_path):
    place = tmp_path / "ran"
    target = newest(run) / "optimizer.pt"
    for write in (
        lambda: torch.save({"x": Payload(place)}, target),
        lambda: torch.save({"x": Payload(place)}, target, _use_new_zipfile_serialization=False),
        lambda: target.write_bytes(pickle.dumps(Payload(place))),
    ):
        write()
        sealed(target.parent)
        refused(run, "optimizer.pt cannot be read")
    assert not place.exists()


def rezipped(path, compression=zipfile.ZIP_DEFLATED, replace=None):
    """Write an archive of torch's again, compressed, or with other content in its largest part."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    if replace is not None:
        name = max(parts, key=lambda one: len(parts[one]))
        parts[name] = replace
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def ended_as_torch_ends(path):
    """Put the end for large archives, which torch always writes, before the small one."""
    content = path.read_bytes()
    body, end = content[:-22], content[-22:]
    (n_entries, size, offset) = struct.unpack("<HII", end[10:20])
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, n_entries, n_entries, size, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(body), 1)
    path.write_bytes(body + wide + locator + end)
    return path


def test_a_bomb_that_unpacks_to_far_more_than_itself_is_refused_unopened(run, monkeypatch):
    path = newest(run) / "optimizer.pt"
    torch.save({"names": [], "optimizers": [torch.zeros(25_000_000)], "average": None}, path)
    ended_as_torch_ends(rezipped(path))
    assert path.stat().st_size < 200_000
    sealed(path.parent)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was opened"))
    refused(run, "it is compressed, and a run does not compress")


def test_an_archive_of_parts_that_lie_over_each_other_is_refused_unopened(run, monkeypatch):
    path = newest(run) / "optimizer.pt"
    torch.save({"x": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        large = max(parts, key=lambda one: one.file_size)
    with zipfile.ZipFile(path, "a") as archive:
        for n in range(50):
            again = zipfile.ZipInfo(f"again-{n}")
            again.file_size = again.compress_size = large.file_size
            again.CRC, again.header_offset = large.CRC, large.header_offset
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    ended_as_torch_ends(path)
    sealed(path.parent)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was opened"))
    refused(run, "it says that it holds more than its own")


def test_an_archive_whose_directory_two_readers_would_find_in_two_places_is_refused(run):
    path = newest(run) / "optimizer.pt"
    content = path.read_bytes()
    path.write_bytes(b"x" * 64 + content)
    sealed(path.parent)
    refused(run, "optimizer.pt cannot be read")


class Wide:
    """A tensor of a terabyte over a storage of one number."""

    def __reduce__(self):
        storage = torch.zeros(1).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return (torch._utils._rebuild_tensor_v2, (typed, 0, (2**38,), (0,), False, {}))


def test_a_tensor_that_claims_a_terabyte_is_refused(run):
    path = newest(run) / "optimizer.pt"
    torch.save({"names": ["muon"], "optimizers": [Wide()], "average": None}, path)
    sealed(path.parent)
    refused(run, "its tensors would take more than its own")


def sparse():
    return torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (2**40,))


STRANGE = {
    "a list": [1, 2],
    "a sparse tensor": {"optimizers": [sparse()]},
    "a tensor without a place": {"optimizers": [torch.zeros(2**40, device="meta")]},
    "bytes": {"optimizers": [bytearray(10)]},
    "no names": {"optimizers": []},
    "names that are none": {"names": 3, "optimizers": []},
    "no optimizers": {"names": ["muon", "adamw"]},
}


@pytest.mark.parametrize("what", STRANGE)
def test_an_optimizer_file_of_anything_else_is_refused_by_name(run, what):
    torch.save(STRANGE[what], newest(run) / "optimizer.pt")
    sealed(newest(run))
    refused(run, "")


def test_a_structure_that_holds_itself_is_read_to_its_end(tmp_path):
    knot = {"names": []}
    knot["self"] = [knot, [knot]]
    torch.save(knot, tmp_path / "optimizer.pt")
    assert saved.read_optimizer(tmp_path / "optimizer.pt")["names"] == []


def changed_optimizer(run, change):
    path = newest(run) / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    change(content["optimizers"][0])
    torch.save(content, path)
    sealed(path.parent)


WRONG_OPTIONS = {
    "another kind": (lambda one: one["param_groups"][0].update(lr="fast"), "'lr' is a str"),
    "one more": (lambda one: one["param_groups"][0].update(hook="x"), "hook"),
    "one less": (lambda one: one["param_groups"][0].pop("lr"), "lr"),
    "a parameter that is none": (lambda one: one["state"].update({99: {}}), "a state for 99"),
    "a state that is none": (lambda one: one["state"].update({0: 5}), "a state for 0"),
    "no groups": (lambda one: one.pop("param_groups"), "param_groups"),
    "no state": (lambda one: one.pop("state"), "state"),
    "a group less": (lambda one: one["param_groups"].pop(), "zip()"),
}


@pytest.mark.parametrize("what", WRONG_OPTIONS)
def test_an_optimizer_with_other_options_than_the_runs_is_refused_by_name(run, what):
    change, said = WRONG_OPTIONS[what]
    changed_optimizer(run, change)
    refused(run, said)


@pytest.mark.parametrize("shape", [(1, 1), (7,)])
def test_a_state_of_another_shape_is_refused_with_the_tensor_and_both_shapes(run, shape):
    def change(one):
        (number, state), *_ = one["state"].items()
        key, tensor = next((key, value) for key, value in state.items() if value.ndim == 2)
        state[key] = torch.ones(shape)
        said.append(
            f"optimizer.pt: the state {key!r} of adamw, parameter {number} has shape {shape}, and the run's config "
            f"makes it {tuple(tensor.shape)}; remove this folder"
        )

    said = []
    changed_optimizer(run, change)
    refused(run, said[0])


@pytest.mark.parametrize("preset", [name for name in preset_names(load_track("sotu")) if name != "fast"])
def test_the_states_that_are_foreseen_are_those_that_steps_make(preset, make_stepper):
    optim = resolve(load_track("sotu"), preset).optim
    config = make_stepper().config.model_copy(update={"optim": optim})
    model = GPT(config.model, 65)
    model.initialise(0)
    optimizers = build_optimizers(model, config.optim_by_role)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers.step()
    made = [
        {number: shapes_of(state) for number, state in one.state_dict()["state"].items()}
        for one in optimizers.optimizers
    ]
    assert foreseen_states(config, 65, torch.device("cpu")) == made


def with_header(header, body=b"\0" * 16):
    return struct.pack("<Q", len(header)) + header + body


def entry(begin, end, shape=(4,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "a header of an exabyte": struct.pack("<Q", 2**60) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "parts over each other": with_header(json.dumps({"a": entry(0, 16), "b": entry(0, 16)}).encode()),
    "a hole": with_header(json.dumps({"a": entry(8, 24)}).encode(), b"\0" * 24),
    "a shape of a terabyte": with_header(json.dumps({"a": entry(0, 16, (2**38,))}).encode()),
    "a shape that overflows": with_header(json.dumps({"a": entry(0, 16, (2**33, 2**33))}).encode()),
    "offsets below zero": with_header(json.dumps({"a": entry(-16, 0)}).encode()),
    "deep": with_header(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "no text": with_header(b"\xff\xfe\x00"),
    "empty": b"",
    "another model": with_header(json.dumps({"a": entry(0, 16)}).encode()),
}


@pytest.mark.parametrize("what", HEADERS)
def test_weights_with_a_header_that_lies_are_refused_by_name(run, what):
    (newest(run) / "model.safetensors").write_bytes(HEADERS[what])
    sealed(newest(run))
    refused(run, "")
    with pytest.raises(UserError, match=newest(run).name):
        sample(run, prompt="a", n_tokens=1, temperature=1.0, top_k=0, seed=0)


def test_weights_of_another_dtype_are_refused_and_not_converted(run):
    from safetensors.torch import load_file, save_file

    path = newest(run) / "model.safetensors"
    save_file({name: one.double() for name, one in load_file(path).items()}, path)
    sealed(path.parent)
    refused(run, "is torch.float64 of shape")


@pytest.mark.parametrize("tokenizer", [None, 5, {}, {"name": "../../etc/passwd"}, {"name": "/dev/zero"}])
def test_a_sample_takes_no_tokenizer_from_where_a_checkpoint_points(run, state, tokenizer):
    write_state(run, {**state, "tokenizer": tokenizer})
    with pytest.raises(UserError):
        sample(run, prompt="a", n_tokens=1, temperature=1.0, top_k=0, seed=0)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
def test_a_file_that_is_a_link_or_a_pipe_is_refused_and_not_waited_for(run, tmp_path, name):
    path = newest(run) / name
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused(run, name)
    path.unlink()
    os.mkfifo(path)
    refused(run, name)


def test_checkpoints_that_are_links_are_not_followed(run, tmp_path):
    others = tmp_path / "others"
    (run / "checkpoints").rename(others)
    before = sorted(path.name for path in others.iterdir())
    (run / "checkpoints").symlink_to(others)
    with pytest.raises(UserError, match="checkpoints: is a link"):
        resume_run(run, QUIET)
    (run / "checkpoints").unlink()
    (run / "checkpoints").mkdir()
    for path in others.iterdir():
        (run / "checkpoints" / path.name).symlink_to(path)
    with pytest.raises(UserError, match="no checkpoint here"):
        resume_run(run, QUIET)
    assert sorted(path.name for path in others.iterdir()) == before


BAD_OPTIONS = {
    "another kind": ({"record": "yes"}, "record is 'yes'; wanted a bool"),
    "unknown": ({"spam": 1}, "'spam' is no option"),
    "a path with a zero": ({"records": "a\0b"}, "records is"),
    "wandb": ({"wandb": "always"}, "wandb is 'always'"),
    "a number": ({"runs": 5}, "runs is 5; wanted a str"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_options_that_are_none_are_refused_by_name(run, what):
    changes, said = BAD_OPTIONS[what]
    changed_options(run, **changes)
    with pytest.raises(UserError, match=r"options\.json is missing or broken") as error:
        resume_run(run, QUIET)
    assert said in str(error.value)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "\x00", '{"runs": NaN}'])
def test_options_of_anything_else_are_refused_by_name(run, content):
    (run / "options.json").write_text(content)
    with pytest.raises(UserError, match=r"options\.json is missing or broken"):
        resume_run(run, QUIET)


def test_a_run_that_somebody_sent_does_not_say_where_to_write_or_whom_to_tell(run, tmp_path):
    theirs = tmp_path / "theirs"
    changed_options(run, runs=str(theirs / "runs"), records=str(theirs / "records"), wandb="online")
    with pytest.raises(UserError, match="give --data and --records anew"):
        resume_run(run, QUIET)
    data = json.loads((run / "options.json").read_text())["data"]
    anew = {"data": type(tmp_path)(data), "records": tmp_path / "mine"}
    result = resume_run(run, QUIET, anew)
    assert result["record"].startswith(str(tmp_path / "mine"))
    assert not theirs.exists()
    assert json.loads((run / "options.json").read_text())["wandb"] == "off"
