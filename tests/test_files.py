"""Files are written whole or not at all."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanorun.errors import UserError
from nanorun.files import locked, new_folder, write_whole


def test_a_file_is_written_with_its_folder(tmp_path):
    write_whole(tmp_path / "a" / "b.txt", "text", mend="mend it")
    assert (tmp_path / "a" / "b.txt").read_text() == "text"
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_a_disk_that_fills_leaves_the_file_before_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "b.txt"
    path.write_text("before")
    real = Path.write_text

    def filling(self, text, **options):
        real(self, text[:2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", filling)
    with pytest.raises(UserError, match=r"b\.txt: cannot be written \(No space left on device\); mend it"):
        write_whole(path, "after", mend="mend it")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["before"]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match=r"a/b\.txt: cannot be written"):
        write_whole(tmp_path / "a" / "b.txt", "text", mend="mend it")


@pytest.mark.parametrize("path", [".", "", "/", ".."])
def test_a_folder_in_the_place_of_a_file_is_refused_in_a_sentence(path: str, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"; mend it$"):
        write_whole(Path(path), "text", mend="mend it")
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_a_folder_that_is_taken_gives_the_next_one(tmp_path):
    made = [new_folder(tmp_path / "a" / "run", mend="mend it").name for _ in range(3)]
    assert made == ["run", "run-2", "run-3"]


def test_a_folder_that_cannot_be_made_says_what_helps(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match=r"cannot be made .*mend it"):
        new_folder(tmp_path / "a" / "run", mend="mend it")


def test_a_held_folder_is_waited_for_and_its_holder_is_named(tmp_path):
    command = (
        "import sys; from pathlib import Path; from nanorun.files import locked\n"
        "with locked(Path(sys.argv[1]), on_wait=print):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        told, naps = [], []

        def sleep(seconds):
            naps.append(seconds)
            if len(naps) == 3:
                holder.kill()
                holder.wait()

        with locked(tmp_path, on_wait=told.append, sleep=sleep):
            assert (tmp_path / ".lock").exists()
    assert told == [f"process {holder.pid} on {socket.gethostname()!a}"]
    assert len(naps) >= 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_free_again_is_held_without_waiting(tmp_path):
    for _ in range(3):
        with locked(tmp_path, on_wait=lambda holder: pytest.fail(holder)):
            pass


def test_a_lock_that_is_a_link_is_refused_and_where_it_leads_nothing_is_written(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "sent"
    folder.mkdir()
    (folder / ".lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(UserError, match=r"sent/\.lock: cannot be written"), locked(folder, on_wait=print):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_lock_that_cannot_be_made_is_a_users_error(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.raises(UserError, match=r"file/\.lock: cannot be written"), locked(folder, on_wait=print):
        pass
