"""Checkpoints: whole or not at all, and believed only when every byte is the one saved."""

import dataclasses
import json
import resource
import threading
from contextlib import contextmanager

import pytest
import torch

from nanorun.errors import UserError
from nanorun.training import checkpoint

RUN = "run"
FILES = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")


class Weights(torch.nn.Module):
    """A matrix in fp32 and a vector in bf16."""

    def __init__(self, fill=0.5):
        super().__init__()
        self.a = torch.nn.Parameter(torch.full((64, 32), fill))
        self.b = torch.nn.Parameter(torch.arange(7, dtype=torch.bfloat16))


def saved(folder, step, keep=10, fill=0.5):
    return checkpoint.write(folder, snapshot(step, fill), run=RUN, keep=keep)


def snapshot(step, fill=0.5):
    optimizer = {"names": ["muon"], "optimizers": [{"state": {0: {"exp_avg": torch.full((3,), fill)}}}]}
    return checkpoint.Snapshot.of(
        step,
        model=Weights(fill).state_dict(),
        optimizer=optimizer,
        state={"step": step, "clock": {"train": 1.5}},
    )


def load(path):
    return checkpoint.load(path, run=RUN)


def load_newest(folder):
    return checkpoint.load_newest(folder, run=RUN)


def sign(path, change=lambda files: None):
    """Write the manifest that fits the files as they are now, after `change` had its way with its list."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": checkpoint.sha256_of(file)}
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    change(files)
    step = int(path.name.rpartition("-")[2])
    (path / "manifest.json").write_text(checkpoint.manifest_text(RUN, step, files))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_saved_comes_back(tmp_path):
    path = saved(tmp_path / "deep" / "checkpoints", 12)
    assert names(path) == sorted(FILES)
    found, passed_over = load_newest(path.parent)
    assert passed_over == []
    assert found.path == path
    assert found.state == {"step": 12, "clock": {"train": 1.5}}
    assert found.optimizer["optimizers"][0]["state"][0]["exp_avg"].tolist() == [0.5] * 3
    model = Weights(fill=9.0)
    model.load_state_dict(found.model)
    assert checkpoint.weights_sha256(model) == checkpoint.weights_sha256(Weights())
    assert model.b.dtype == torch.bfloat16


def test_the_hash_of_the_weights_sees_one_bit_and_the_dtype():
    one, other, half = Weights(), Weights(), Weights().bfloat16()
    with torch.no_grad():
        other.a[3, 4] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    hashes = {checkpoint.weights_sha256(model) for model in (one, other, half)}
    assert len(hashes) == 3


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def removed(path):
    path.unlink()


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("damage", [flipped, cut, emptied, removed])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, name, damage):
    path = saved(tmp_path, 3)
    damage(path / name)
    with pytest.raises(UserError, match=f"step-00000003: {name} is missing or not what was saved"):
        load(path)


@pytest.mark.parametrize("damage", [cut, emptied, removed])
def test_a_damaged_manifest_is_refused_by_its_name(tmp_path, damage):
    path = saved(tmp_path, 3)
    damage(path / "manifest.json")
    with pytest.raises(UserError, match=r"step-00000003: its manifest\.json is missing or broken"):
        load(path)


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "null", '{"format_version": 2}', '{"format_version": 2, "files": 7}', "[" * 100_000],
)
def test_a_manifest_of_another_shape_is_broken(tmp_path, content):
    path = saved(tmp_path, 3)
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is missing or broken"):
        load(path)


def test_a_manifest_that_forgets_a_file_does_not_vouch_for_it(tmp_path):
    path = saved(tmp_path, 3)
    sign(path, lambda files: files.pop("optimizer.pt"))
    with pytest.raises(UserError, match=r"manifest\.json lists model\.safetensors, state\.json; wanted"):
        load(path)


def test_another_format_is_named_with_the_one_that_is_read(tmp_path):
    path = saved(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(UserError, match="format 3, and this nanorun reads 2"):
        load(path)


def test_the_newest_that_verifies_is_taken_and_those_passed_over_are_named(tmp_path):
    for step in (5, 10, 15, 20):
        saved(tmp_path, step)
    flipped(tmp_path / "step-00000020" / "model.safetensors")
    removed(tmp_path / "step-00000015" / "manifest.json")
    found, passed_over = load_newest(tmp_path)
    assert found.state["step"] == 10
    assert len(passed_over) == 2
    assert "step-00000020: model.safetensors" in passed_over[0]
    assert "step-00000015: its manifest.json" in passed_over[1]


def test_where_none_verifies_each_is_named(tmp_path):
    for step in (5, 10):
        cut(saved(tmp_path, step) / "state.json")
    with pytest.raises(UserError, match=r"no checkpoint verifies: .*step-00000010.*; .*step-00000005"):
        load_newest(tmp_path)


def test_where_there_is_none_the_message_says_when_one_is_saved(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint here; .*checkpoint\.every_steps"):
        load_newest(tmp_path / "checkpoints")


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 95, 100, 1000):
        saved(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]


def test_those_that_were_passed_over_cost_none_that_verifies(tmp_path):
    for step in (20, 30, 40):
        saved(tmp_path, step)
    saver = checkpoint.Saver(tmp_path, run=RUN, keep=2)
    saver.passed_over = {"step-00000030", "step-00000040"}
    for step, left in ((25, (20, 25, 30, 40)), (30, (25, 30, 40)), (35, (30, 35, 40)), (40, (35, 40))):
        saver.begin(snapshot(step))
        saver.wait()
        assert names(tmp_path) == [f"step-{one:08d}" for one in left]


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path, 5, fill=0.5)
    saved(tmp_path, 5, fill=2.0)
    assert load_newest(tmp_path)[0].model["a"].unique().tolist() == [2.0]


def test_what_a_killed_save_left_is_never_read_and_goes_with_the_next(tmp_path):
    saved(tmp_path, 5)
    killed = tmp_path / ".step-00000010.partial"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path)[0].state["step"] == 5
    saved(tmp_path, 10)
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


@contextmanager
def disk_of(n_bytes):
    """Let no file grow beyond some bytes, which writers meet as they meet a full disk.

    A context and no fixture: pytest reports before a fixture ends, and its own output may be a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("optimizer_numbers", [0, 100_000])
def test_a_disk_that_fills_leaves_earlier_checkpoints_whole_and_nothing_half_written(
    tmp_path, optimizer_numbers
):
    # The model takes 8 KiB: the first case stops in the weights, the second in the optimizer's state.
    before = bytes_of(saved(tmp_path, 5))
    refused = r"step-00000010: the checkpoint could not be written .* untouched\. Free"
    large = dataclasses.replace(snapshot(10), optimizer={"exp_avg": torch.zeros(optimizer_numbers)})
    with pytest.raises(UserError, match=refused), disk_of(100_000 if optimizer_numbers else 4096):
        checkpoint.write(tmp_path, large, run=RUN, keep=1)
    assert names(tmp_path) == ["step-00000005"]
    assert bytes_of(tmp_path / "step-00000005") == before


def test_no_byte_of_a_manifest_can_change_unnoticed(tmp_path):
    manifest = saved(tmp_path, 3) / "manifest.json"
    whole = manifest.read_bytes()
    for index, byte in enumerate(whole):
        for flip in (1, 4, 1 << index % 8):
            manifest.write_bytes(whole[:index] + bytes([byte ^ flip]) + whole[index + 1 :])
            with pytest.raises(UserError, match="step-00000003"):
                load(manifest.parent)


def test_a_file_of_another_checkpoint_is_refused_by_its_name(tmp_path):
    one, other = saved(tmp_path, 3, fill=0.5), saved(tmp_path, 6, fill=0.25)
    for name in FILES[:3]:
        kept = (one / name).read_bytes()
        (one / name).write_bytes((other / name).read_bytes())
        with pytest.raises(UserError, match=f"{name} is missing or not what was saved"):
            load(one)
        (one / name).write_bytes(kept)
    assert load(one).state["step"] == 3


def test_a_checkpoint_under_another_ones_name_is_refused(tmp_path):
    saved(tmp_path, 3).rename(tmp_path / "step-00000009")
    with pytest.raises(UserError, match="it was saved after step 3, so its name is wrong"):
        load_newest(tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = saved(tmp_path, 3)
    with pytest.raises(UserError, match=r"step-00000003: it belongs to a run with another config\.toml"):
        checkpoint.load(path, run="another")


def test_what_is_saved_beside_the_steps_is_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    go_on = threading.Event()
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *w, **o: (go_on.wait(10), write(*w, **o))[1])
    model, exp_avg = Weights(0.5), torch.full((3,), 0.5)
    saver = checkpoint.Saver(tmp_path, run=RUN, keep=2)
    saver.begin(
        checkpoint.Snapshot.of(
            4, model=model.state_dict(), optimizer={"exp_avg": [exp_avg]}, state={"step": 4}
        )
    )
    with torch.no_grad():
        model.a.fill_(7.0)
        exp_avg.fill_(7.0)
    assert checkpoint.checkpoints(tmp_path) == []
    go_on.set()
    saver.wait()
    found, _ = load_newest(tmp_path)
    assert found.model["a"].unique().tolist() == found.optimizer["exp_avg"][0].unique().tolist() == [0.5]


def test_a_write_that_failed_beside_the_steps_is_told_once_at_the_next_wait(tmp_path):
    saver = checkpoint.Saver(tmp_path / "there", run=RUN, keep=2)
    (tmp_path / "there").write_text("a file where the folder should be")
    saver.begin(snapshot(4))
    with pytest.raises(UserError, match="step-00000004: the checkpoint could not be written"):
        saver.wait()
    saver.wait()
    (tmp_path / "there").unlink()
    saver.begin(snapshot(8))
    saver.wait()
    assert names(tmp_path / "there") == ["step-00000008"]


def test_what_a_killed_run_left_is_cleared_and_whole_ones_stay(tmp_path):
    saved(tmp_path, 5)
    for left in (".step-00000010.partial", ".step-00000001.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    checkpoint.Saver(tmp_path, run=RUN, keep=2).clear()
    assert names(tmp_path) == ["step-00000005"]


def test_one_to_look_at_is_neither_resumed_from_nor_dropped(tmp_path):
    checkpoint.write(tmp_path, snapshot(3), run=RUN, keep=1, name="bad-step-00000003")
    for step in (5, 10):
        saved(tmp_path, step, keep=1)
    assert names(tmp_path) == ["bad-step-00000003", "step-00000010"]
    assert checkpoint.load(tmp_path / "bad-step-00000003", run=RUN).state["step"] == 3


def test_an_optimizer_file_that_would_run_code_is_not_unpickled(tmp_path):
    path = saved(tmp_path, 5)
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (ran.write_text, ("yes",))

    torch.save({"x": Payload()}, path / "optimizer.pt")
    sign(path)
    with pytest.raises(UserError, match="cannot be read"):
        load(path)
    assert not ran.exists()
