"""Files are whole or absent: failures, interruptions, planted links, leftovers of processes that were killed."""

import os
import subprocess
import sys

import pytest

import files
from configurator import UserError
from files import complete_file, remove_leftovers, saved_file

pytestmark = pytest.mark.faults


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")
    return path


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left on device")])
def test_a_write_that_fails_leaves_the_old_file(old, error):
    with pytest.raises(UserError, match="No space left on device.*free some space"):
        with saved_file(old) as file:
            file.write(b"half")
            raise error
    assert old.read_text() == "old" and os.listdir(old.parent) == ["last.pt"]


def test_a_write_that_is_interrupted_leaves_the_old_file(old):
    with pytest.raises(KeyboardInterrupt):
        with complete_file(old) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert old.read_text() == "old" and os.listdir(old.parent) == ["last.pt"]


def test_a_write_is_on_the_disk_before_it_gets_its_name(old, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(("fsync", old.read_text())) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append(("replace", old.read_text())) or replace(*paths))
    with complete_file(old) as file:
        file.write(b"new")
        events.append(("write", old.read_text()))
    assert events == [("write", "old"), ("fsync", "old"), ("replace", "old")]
    assert old.read_text() == "new" and os.listdir(old.parent) == ["last.pt"]


def test_a_planted_link_is_never_written_through(old, monkeypatch):
    """A name that is taken already, by a link to what is not ours."""
    monkeypatch.setattr(files.uuid, "uuid4", type("Known", (), {"hex": "known"}))
    (old.parent / ".hydra-known.tmp").symlink_to(old)
    with pytest.raises(FileExistsError), complete_file(old.parent / "other") as file:
        file.write(b"new")
    assert old.read_text() == "old"


def test_leftovers_are_removed_once_they_are_nobody_s(tmp_path):
    """One of a process that was killed, one that another process writes, one that this process writes."""
    code = ("import sys, pathlib, files; file = files.open_temporary(pathlib.Path(sys.argv[1])); "
            "print(file.name, flush=True); sys.stdin.read()")  # fmt: skip
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = os.path.dirname(files.__file__)
    killed, living = (subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                      for _ in range(2))  # fmt: skip
    names = [process.stdout.readline().strip() for process in (killed, living)]
    killed.kill()
    killed.wait()
    with complete_file(tmp_path / "mine") as file:
        remove_leftovers(tmp_path)
        assert sorted(map(str, tmp_path.glob(".hydra-*.tmp"))) == sorted([names[1], str(file.name)])
    assert (tmp_path / "mine").exists()
    living.communicate("")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["mine"]


def test_a_leftover_that_is_removed_before_its_writer_has_the_lock_is_made_anew(tmp_path, monkeypatch):
    real, names = files.locks, []

    def locks(file, wait=True):
        names.append(file.name)
        if len(names) == 1:
            os.unlink(file.name)  # as another process may
        return real(file, wait)

    monkeypatch.setattr(files, "locks", locks)
    with complete_file(tmp_path / "last.pt") as file:
        file.write(b"new")
    assert len(names) == 2 and (tmp_path / "last.pt").read_bytes() == b"new"
