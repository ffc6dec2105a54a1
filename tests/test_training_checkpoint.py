"""Checkpoints: whole or not at all, and believed only when every byte is the one saved."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch

from nanorun.errors import UserError
from nanorun.training import checkpoint

FILES = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")


class Weights(torch.nn.Module):
    """A matrix in fp32 and a vector in bf16."""

    def __init__(self, fill=0.5):
        super().__init__()
        self.a = torch.nn.Parameter(torch.full((64, 32), fill))
        self.b = torch.nn.Parameter(torch.arange(7, dtype=torch.bfloat16))


def saved(folder, step, keep=10, fill=0.5):
    optimizer = {"names": ["muon"], "optimizers": [{"state": {0: {"exp_avg": torch.full((3,), fill)}}}]}
    return checkpoint.save(
        folder,
        step,
        model=Weights(fill).state_dict(),
        optimizer=optimizer,
        state={"step": step, "clock": {"train": 1.5}},
        keep=keep,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_saved_comes_back(tmp_path):
    path = saved(tmp_path / "deep" / "checkpoints", 12)
    assert names(path) == sorted(FILES)
    found, passed_over = checkpoint.load_newest(path.parent)
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
        checkpoint.load(path)


@pytest.mark.parametrize("damage", [cut, emptied, removed])
def test_a_damaged_manifest_is_refused_by_its_name(tmp_path, damage):
    path = saved(tmp_path, 3)
    damage(path / "manifest.json")
    with pytest.raises(UserError, match=r"step-00000003: its manifest\.json is missing or broken"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"format_version": 1}', '{"format_version": 1, "sha256": 7}']
)
def test_a_manifest_of_another_shape_is_broken(tmp_path, content):
    path = saved(tmp_path, 3)
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is missing or broken"):
        checkpoint.load(path)


def test_a_manifest_that_forgets_a_file_does_not_vouch_for_it(tmp_path):
    path = saved(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]["optimizer.pt"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"optimizer\.pt is missing or not what was saved"):
        checkpoint.load(path)


def test_another_format_is_named_with_the_one_that_is_read(tmp_path):
    path = saved(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(UserError, match="format 2, and this nanorun reads 1"):
        checkpoint.load(path)


def test_the_newest_that_verifies_is_taken_and_those_passed_over_are_named(tmp_path):
    for step in (5, 10, 15, 20):
        saved(tmp_path, step)
    flipped(tmp_path / "step-00000020" / "model.safetensors")
    removed(tmp_path / "step-00000015" / "manifest.json")
    found, passed_over = checkpoint.load_newest(tmp_path)
    assert found.state["step"] == 10
    assert len(passed_over) == 2
    assert "step-00000020: model.safetensors" in passed_over[0]
    assert "step-00000015: its manifest.json" in passed_over[1]


def test_where_none_verifies_each_is_named(tmp_path):
    for step in (5, 10):
        cut(saved(tmp_path, step) / "state.json")
    with pytest.raises(UserError, match=r"no checkpoint verifies: .*step-00000010.*; .*step-00000005"):
        checkpoint.load_newest(tmp_path)


def test_where_there_is_none_the_message_says_when_one_is_saved(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint here; .*checkpoint\.every_steps"):
        checkpoint.load_newest(tmp_path / "checkpoints")


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 95, 100, 1000):
        saved(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path, 5, fill=0.5)
    saved(tmp_path, 5, fill=2.0)
    assert checkpoint.load_newest(tmp_path)[0].model["a"].unique().tolist() == [2.0]


def test_what_a_killed_save_left_is_never_read_and_goes_with_the_next(tmp_path):
    saved(tmp_path, 5)
    killed = tmp_path / ".step-00000010.partial"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path)[0].state["step"] == 5
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
    with pytest.raises(UserError, match=refused), disk_of(100_000 if optimizer_numbers else 4096):
        checkpoint.save(
            tmp_path,
            10,
            model=Weights().state_dict(),
            optimizer={"exp_avg": torch.zeros(optimizer_numbers)},
            state={},
            keep=1,
        )
    assert names(tmp_path) == ["step-00000005"]
    assert bytes_of(tmp_path / "step-00000005") == before


def test_an_optimizer_file_that_would_run_code_is_not_unpickled(tmp_path):
    path = saved(tmp_path, 5)
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (ran.write_text, ("yes",))

    torch.save({"x": Payload()}, path / "optimizer.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["optimizer.pt"] = checkpoint.sha256_of(path / "optimizer.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)
    assert not ran.exists()
