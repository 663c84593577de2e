"""The training command by the rules of other platforms, as far as one platform can play another."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gcl_kernels import chips, plan
from gcl_kernels.plan import report
from gcl_kernels.training import checkpoint, files, memory
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.openclip import TINY_MODEL, create_model
from gcl_kernels.training.options import parse_args
from gcl_kernels.training.run import train

ROOT = Path(__file__).parents[2]


def write(path, query="query {n}"):
    rows = [f"{query.format(n=n)},title {n},{n}" for n in range(8)]
    path.write_text("\n".join(["query,title,score", *rows]), encoding="utf-8")
    return [f"--train-data={path}", f"--val-data={path}", "--left-keys=query", "--right-keys=title", "--weight-key=score",
            "--batch-size=4", "--steps=2", f"--logs={path.parent}", "--name=run"]  # fmt: skip


def lacking(monkeypatch, *modules):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def windows(monkeypatch):
    """What Windows lacks or refuses: fcntl, resource, /proc, signals, hard links (FAT), syncing folders, replacing open files."""
    # Other libraries have their own ways, and are there already.
    create_model()
    lacking(monkeypatch, "fcntl", "resource", "pwd", "grp")
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "fork")

    def no_link(*_):
        raise OSError(errno.EINVAL, "hard links are not supported")

    monkeypatch.setattr(os, "link", no_link)
    open_file, replace = os.open, os.replace
    busy: dict[str, int] = {}

    def open_no_folder(path, flags, *more, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, flags, *more, **options)

    def replace_after_a_while(old, new):
        # A reader has the file open for as long as two attempts take.
        busy[str(new)] = busy.get(str(new), 0) + 1
        if os.path.exists(new) and busy[str(new)] % 3:
            raise PermissionError(errno.EACCES, "Access is denied", str(new))
        return replace(old, new)

    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(os, "replace", replace_after_a_while)
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0, 0.0))

    def no_proc(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(memory, "status_bytes", no_proc)
    monkeypatch.setattr(memory, "reset_peak_resident_memory", no_proc)


@pytest.mark.usefixtures("windows")
def test_a_run_and_its_resumption_by_the_rules_of_windows(tmp_path, capsys):
    argv = [*write(tmp_path / "pairs.csv"), "--save-steps=1", "--keep-last=1", "--val-steps=1", "--best-metric=NDCG@10"]
    run = train(parse_args(argv))
    assert run.peak_bytes is None
    assert "peak memory unknown" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["peak_bytes"] is None
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == {"best.pt", "epoch_latest.pt", "epoch_1.pt", f"{TINY_MODEL}.json"}
    again = train(parse_args([*argv, "--steps=3", "--resume=latest"]))
    assert again.losses[:2] == run.losses
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".tmp") or "probe" in path.name]


def test_files_are_synced_through_a_descriptor_that_may_write(tmp_path, monkeypatch):
    """Windows flushes no other."""
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda number: modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE))
    files.write_json_atomically(tmp_path / "a.json", {})
    assert modes[0] in (os.O_RDWR, os.O_WRONLY)


def test_a_file_that_stays_open_elsewhere_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(old, new):
        raise PermissionError(errno.EACCES, "Access is denied", str(new))

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files, "PAUSES", (0.0,))
    with pytest.raises(InputError, match=r"cannot be written: .*Access is denied"):
        checkpoint.save(tmp_path / "step_1.pt", {"gcl_kernels": {}})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "step_1.pt", {"gcl_kernels": {"step": 1}})

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 40403456 vs 40403348")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError) as caught:
        checkpoint.save(tmp_path / "step_2.pt", {"gcl_kernels": {"step": 2}})
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setattr(files, "room", lambda folder: 1000)
    with pytest.raises(InputError, match=r"step_2.pt: expected room for it on the disk, got 0.0 MiB left"):
        checkpoint.save(tmp_path / "step_2.pt", {"gcl_kernels": {"step": 2}})
    assert {path.name for path in tmp_path.iterdir()} == {"step_1.pt", "epoch_latest.pt"}
    assert checkpoint.load(tmp_path / "epoch_latest.pt")["gcl_kernels"]["step"] == 1


def test_clocks_of_two_seconds_keep_the_later_checkpoint(tmp_path):
    for step in (9, 10, 8):
        checkpoint.save(tmp_path / f"step_{step}.pt", {"gcl_kernels": {}})
        os.utime(tmp_path / f"step_{step}.pt", (1_000_000, 1_000_000))
    assert [path.name for path in checkpoint.newest_first(tmp_path)] == ["step_10.pt", "step_9.pt", "step_8.pt"]


def test_a_second_name_of_the_same_file_leaves_no_temporary_one(tmp_path):
    checkpoint.save(tmp_path / "step_1.pt", {"gcl_kernels": {}})
    checkpoint.also(tmp_path / "step_1.pt", checkpoint.LATEST)
    assert {path.name for path in tmp_path.iterdir()} == {"step_1.pt", "epoch_latest.pt"}


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_the_peak_where_there_is_no_proc(monkeypatch, platform):
    resource = pytest.importorskip("resource")

    def no_proc(*_):
        raise FileNotFoundError

    monkeypatch.setattr(memory, "status_bytes", no_proc)
    monkeypatch.setattr(sys, "platform", platform)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory.peak_memory(torch.device("cpu")) >= usage * (1 if platform == "darwin" else 1024)


def test_a_plan_where_the_system_does_not_tell_its_memory(monkeypatch, capsys):
    monkeypatch.delattr(os, "sysconf")
    assert chips.physical_memory() == float("inf")
    monkeypatch.setattr(
        report, "this_cpu", lambda: chips.Chip(**chips.CHIPS["h100"].__dict__ | {"memory": float("inf")})
    )
    argv = ["--batch", "1024", "--dim", "128", "--device", "cpu"]
    with pytest.raises(SystemExit, match="--memory: expected a number of GiB"):
        plan.main(argv)
    plan.main([*argv, "--memory", "4"])
    assert "Memory for the loss" in capsys.readouterr().out


def test_a_locale_of_bytes_alone(tmp_path):
    """As in a container without a locale, or with a Windows code page: files are UTF-8 nevertheless, and printing never fails."""
    folder = tmp_path / "größe"
    folder.mkdir()
    argv = write(folder / "paare.csv", query="größe 靴 {n}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
                    "OMP_NUM_THREADS": "1"}  # fmt: skip
    argv += ["--skip-bad-rows", f"--doc-meta={folder / 'corpus.json'}", "--doc-id-key=title"]
    corpus = {f"title {n}": {"title": f"schön {n}"} for n in range(7)}
    (folder / "corpus.json").write_text(json.dumps(corpus, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "-m", "gcl_kernels.training", *argv]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    (per_query,) = results["per_query"].values()
    assert any("größe 靴" in query for query in per_query)
    assert "paare.csv: 8 pairs" in (folder / "run" / "out.log").read_text(encoding="utf-8")
