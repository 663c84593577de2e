"""The folder of a run: one that cannot be written, one that is taken, one that another process holds."""

from __future__ import annotations

import errno
import os
import signal
import sys
import types
from pathlib import Path

import pytest

from gcl_kernels.training import folder as folders
from gcl_kernels.training.__main__ import main
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.folder import RunFolder, locked, portable
from gcl_kernels.training.options import parse_args
from gcl_kernels.training.run import train
from tests.training import children


@pytest.fixture
def options(tmp_path):
    rows = [f"query {n},title {n},{n}" for n in range(8)]
    (tmp_path / "pairs.csv").write_text("\n".join(["query,title,score", *rows]))
    return [f"--train-data={tmp_path / 'pairs.csv'}", "--left-keys=query", "--right-keys=title", "--weight-key=score",
            "--batch-size=4", f"--logs={tmp_path / 'logs'}", "--name=run"]  # fmt: skip


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_read(options, tmp_path, capsys, dry_run):
    (tmp_path / "logs").write_text("a file")
    argv = [*options, *dry_run, f"--train-data={tmp_path / 'none.csv'}"]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert (
        message
        == f"--logs: expected a folder that can be written to, got '{tmp_path / 'logs' / 'run'}': Not a directory\n"
    )
    assert (tmp_path / "logs").read_text() == "a file"


def test_a_disk_that_takes_no_files_is_said_before_anything_is_read(options, tmp_path, capsys, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(folders.tempfile, "mkstemp", read_only)
    assert main(options) == 2
    assert capsys.readouterr().err.endswith(": Read-only file system\n")


def test_a_name_is_taken_once(options, tmp_path, capsys):
    first = train(parse_args([*options, "--steps=1"]))

    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").rglob("*") if path.is_file()}

    before = files()
    assert main([*options, "--steps=2"]) == 2
    assert capsys.readouterr().err == (
        f"--name run: expected a new name, got that of a run in '{tmp_path / 'logs' / 'run'}'; --resume latest goes on with it\n"
    )
    assert files() == before
    again = train(parse_args([*options, "--steps=2", "--resume=latest"]))
    assert again.losses[:1] == first.losses


def test_what_fails_before_the_first_step_takes_no_name(options, tmp_path):
    for fault in (f"--train-data={tmp_path / 'none.csv'}", "--model=ViT-X", "--min-score=99", "--resume=none.pt"):
        assert main([*options, fault]) == 2
        assert not (tmp_path / "logs").exists()
    assert main([*options, "--steps=1"]) == 0


def test_two_at_once_are_refused_and_a_killed_one_holds_nothing(options, tmp_path, capsys):
    holder = children.CONTEXT.Process(target=children.hold, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        assert holder.is_alive()
    assert main([*options, "--resume=latest"]) == 2
    assert (
        "expected a run that no process works on, got one that another process works on now" in capsys.readouterr().err
    )
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "logs" / "run" / "lock").exists()
    assert main([*options, "--steps=1", "--resume=latest"]) == 0
    assert not (tmp_path / "logs" / "run" / "lock").exists()


def test_a_lock_is_of_the_file_that_is_there(tmp_path):
    first = locked(tmp_path / "lock")
    assert first
    assert locked(tmp_path / "lock") is None
    (tmp_path / "lock").unlink()
    second = locked(tmp_path / "lock")
    assert second
    assert locked(tmp_path / "lock") is None
    first.close()
    assert locked(tmp_path / "lock") is None
    second.close()


@pytest.mark.parametrize("held", [False, True])
def test_locks_of_windows(tmp_path, monkeypatch, held):
    calls = []

    def locking(descriptor, mode, count):
        calls.append((mode, count))
        if held:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    file = locked(tmp_path / "lock")
    assert (file is None) == held
    assert calls == [(2, 1)]
    if file:
        file.close()


@pytest.mark.parametrize("how", ["no module", "no locks on this disk"])
def test_without_locks_a_run_goes_on(tmp_path, monkeypatch, how):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = None if how == "no module" else types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    run = RunFolder(str(tmp_path), "run")
    run.hold(resumed=False)
    run.close()


def test_names_that_windows_reads_otherwise(tmp_path, monkeypatch):
    assert all(map(portable, ("first", "2026_01_01-00_00_00", "lr=1e-3", "a/b", "a.b")))
    assert not any(map(portable, ("a:b", "a?", "nul", "COM1.x", "a.", "a ", "a//b", "a\n")))
    monkeypatch.setattr(folders, "WINDOWS", True)
    with pytest.raises(InputError, match=r"--name: expected a name that Windows allows for a folder, got 'a:b'"):
        RunFolder(str(tmp_path), "a:b")


def test_a_disk_without_room_for_a_checkpoint_is_said_before_the_data_is_read(options, capsys, monkeypatch):
    monkeypatch.setattr(folders, "room", lambda folder: 3 << 20)
    assert main(options) == 2
    out = capsys.readouterr()
    assert "expected room for a checkpoint of 80 MiB in" in out.err
    assert out.err.endswith("got 3 MiB\n")
    assert "pairs" not in out.out
    assert not Path(options[-2].removeprefix("--logs=")).exists()
