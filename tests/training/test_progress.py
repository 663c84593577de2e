"""How far the work is, in a log without a terminal; and files that are not written for lack of room."""

from __future__ import annotations

import errno

import pytest

from gcl_kernels.training import files, progress
from gcl_kernels.training.errors import InputError


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch, capsys):
    now = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.Progress("documents", 1000) as done:
        for _ in range(4):
            done.add(100)
    assert capsys.readouterr().err == (
        "documents: 200 of 1000, 5/s, about 160 s left\ndocuments: 400 of 1000, 5/s, about 120 s left\n"
    )


def test_a_short_work_says_nothing(capsys):
    with progress.Progress("documents", 2) as done:
        done.add(2)
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_is_one_line_and_leaves_no_half(tmp_path):
    path = tmp_path / "features.pt"
    path.write_text("before")

    def fail(new):
        new.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"features.pt: expected room for it on the disk, got .* MiB left"):
        files.write_atomically(path, fail)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]
