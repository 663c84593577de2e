"""Which files a name means, and how they are opened: packed files, pipes, what is no file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import threading

import pytest

from gcl_kernels.training.data import files_of, read_documents, read_pairs, streams
from gcl_kernels.training.data.names import braces
from gcl_kernels.training.errors import DataError
from tests.training.files import write_csv, write_parquet, write_samples

LEFT, RIGHT = {"query": "txt"}, {"title": "txt"}


def row(title):
    return {"query": "q", "title": title, "score": 1}


def titles(path, **options):
    return read_pairs(path, LEFT, RIGHT, "score", **options).right["title"]


def message(path, **options):
    with pytest.raises(DataError) as caught:
        titles(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{08..10}", ["s-08", "s-09", "s-10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{a,b}-{1..2}.csv", ["a-1.csv", "a-2.csv", "b-1.csv", "b-2.csv"]),
        ("x{a,{b,c}d,}y", ["xay", "xbdy", "xcdy", "xy"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{a}.csv", ["{a}.csv"]),
        ("a{b", ["a{b"]),
        ("a}b{1..2}", ["a}b1", "a}b2"]),
        ("{}", ["{}"]),
    ],
)
def test_braces_are_those_of_bash_and_open_clip(text, names):
    assert list(braces(text)) == names


def test_a_name_that_exists_is_that_file(tmp_path):
    for name in ("shard[1].tar", "a{1,2}.tar", "b*.tar", "c::d.tar"):
        write_samples(tmp_path / name, [row(name)])
        assert titles(tmp_path / name) == [name]


@pytest.mark.parametrize(
    ("ending", "write"), [("csv", write_csv), ("tsv", write_csv), ("parquet", write_parquet), ("tar", write_samples)]
)
def test_a_folder_a_list_braces_and_a_pattern_are_read_in_order(tmp_path, ending, write):
    for number in (2, 0, 1):
        write(tmp_path / f"s-{number:03d}.{ending}", [row(f"T{number}")])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / f".hidden.{ending}").write_text("no data")
    (tmp_path / f"sub.{ending}").mkdir()
    expected = ["T0", "T1", "T2"]
    assert titles(tmp_path) == expected
    assert titles(f"{tmp_path}/s-{{000..002}}.{ending}") == expected
    assert titles(f"{tmp_path}/s-*.{ending}") == expected
    assert titles(f"{tmp_path}/s-00[02].{ending}::{tmp_path}/s-001.{ending}") == ["T0", "T2", "T1"]
    assert message(f"{tmp_path}/s-{{000..003}}.{ending}") == (
        f"{tmp_path}/s-003.{ending}: expected a readable file, got 'No such file or directory'"
    )


def test_rows_of_several_files_are_named_by_their_own(tmp_path):
    write_csv(tmp_path / "a.csv", [row("A"), row("B") | {"score": -1}])
    write_csv(tmp_path / "b.csv", [row("C"), row("D"), row("E") | {"score": "x"}])
    pairs = read_pairs(tmp_path, LEFT, RIGHT, "score", skip_bad_rows=True)
    assert pairs.right["title"] == ["A", "C", "D"]
    assert [fault.split(": ")[0] for fault in pairs.bad_rows] == [
        f"{tmp_path}/a.csv, line 3",
        f"{tmp_path}/b.csv, line 4",
    ]
    write_csv(tmp_path / "c.csv", [{"query": "q", "score": 1}])
    assert (
        message(tmp_path)
        == f"{tmp_path}/c.csv, line 1: expected one column 'title', got 0 among the columns ['query', 'score']"
    )


def test_one_relative_image_path_in_two_folders_is_two_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "pairs.csv", [{"query": "q", "image": "1.png", "score": 1}])
    pairs = read_pairs(f"{tmp_path}/*/pairs.csv", LEFT, {"image": "img"}, "score", check_images="none")
    assert pairs.right["image"] == [f"{tmp_path}/a/1.png", f"{tmp_path}/b/1.png"]
    assert len(set(pairs.document_ids)) == 2


def test_names_that_mean_no_files_of_one_type(tmp_path):
    write_csv(tmp_path / "a.csv", [row("A")])
    write_samples(tmp_path / "b.tar", [row("B")])
    assert message(tmp_path) == (
        f"{tmp_path}: expected files of one type, got CSV or TSV files and webdataset tar files: --dataset-type chooses"
    )
    assert titles(tmp_path, dataset_type="csv") == ["A"]
    assert titles(tmp_path, dataset_type="webdataset") == ["B"]
    assert message(tmp_path, dataset_type="parquet") == f"{tmp_path}: expected Parquet files in the folder, got none"
    assert message(f"{tmp_path}/*.pq") == f"{tmp_path}/*.pq: expected Parquet files, got none"
    assert message("") == "expected the name of a file, got ''"
    assert message(f"{tmp_path}/a.csv::") == "expected the name of a file, got ''"
    assert "expected at most 100,000 files, got more" in message("{0..99999999999}{0..99999999}.tar")
    for url in ("https://host/a.csv", "s3://bucket/{0..9}.tar", "pipe:cat a.tar"):
        assert message(url) == f"{url}: expected files, got a URL, which is not fetched: download it first"


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
LINES = ["query\ttitle\tscore", *(f"q\tT{number}\t1" for number in range(3000))]


@pytest.mark.parametrize("ending", PACK)
def test_packed_files_are_read_by_their_content(tmp_path, ending):
    content = PACK[ending]("\n".join([*LINES, ""]).encode())
    for name in (f"a.tsv.{ending}", "a.tsv"):
        (tmp_path / name).write_bytes(content)
        assert titles(tmp_path / name) == [f"T{number}" for number in range(3000)]
    documents = tmp_path / f"a.json.{ending}"
    documents.write_bytes(PACK[ending](json.dumps({"1": {"title": "A"}}).encode()))
    assert read_documents(documents, RIGHT) == {"1": {"title": "A"}}


@pytest.mark.parametrize("ending", PACK)
def test_a_packed_file_cut_short_keeps_its_whole_lines_and_says_so(tmp_path, ending):
    lines = "\n".join(
        ["query,title,score", *(f"q,{number * 7919 % 100_003:05d},{number % 97}" for number in range(4000)), ""]
    )
    content, path = PACK[ending](lines.encode()), tmp_path / f"a.csv.{ending}"
    whole = lines.splitlines()[1:]
    for length in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        name = {"gz": "gzip", "bz2": "bzip2", "xz": "xz"}[ending]
        words = message(path)
        assert words.startswith(f"{path}: expected a whole {name} file, got ")
        if ending == "bz2" and length == len(content) // 2:
            continue  # one block holds all of it, and no row is left
        pairs = read_pairs(path, LEFT, RIGHT, "score", skip_bad_rows=True)
        got = [f"q,{title},{score:.0f}" for title, score in zip(pairs.right["title"], pairs.scores, strict=True)]
        assert 0 < len(got) <= len(whole)
        assert got == whole[: len(got)]
        assert pairs.bad_count == 1
    (tmp_path / "a.json").write_bytes(PACK[ending](b'{"1": {"title": "A"}}' * 9)[:-5])
    with pytest.raises(DataError, match="expected a whole"):
        read_documents(tmp_path / "a.json", RIGHT)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("query,title,score\nq,T,1\n".encode("utf-16"), "UTF-16 text"),
        ("query,title,score\nq,T,1\n".encode("utf-16-le"), "UTF-16 text"),
        ("query,title,score\nq,T,1\n".encode("utf-16-be"), "UTF-16 text"),
        ("query,title,score\nq,T,1\n".encode("utf-32"), "UTF-32 text"),
        (b"PAR1 and so on", "a Parquet file"),
        (b"PK\x03\x04 and so on", "a zip archive"),
        (b"\x28\xb5\x2f\xfd and so on", "a Zstandard file: decompress it first"),
        (gzip.compress(gzip.compress(b"query", mtime=0), mtime=0), "a gzip file in another"),
        (bytes(100), "NUL bytes"),
    ],
)
def test_what_is_no_utf8_text_is_said_by_what_it_looks_like(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    assert message(tmp_path / "a.csv") == f"{tmp_path / 'a.csv'}: expected UTF-8 text, got {words}"


def test_latin_1_in_the_header(tmp_path):
    (tmp_path / "a.csv").write_bytes("query,título,title,score\nq,x,T,1\n".encode("latin-1"))
    assert message(tmp_path / "a.csv") == (
        f"{tmp_path / 'a.csv'}, line 1: expected UTF-8 text, got the byte 0xed, 'í' in Latin-1"
    )


def write_into(path, *parts):
    def write():
        with open(path, "wb", buffering=0) as pipe:
            for part in parts:
                pipe.write(part)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_is_read_from_its_first_byte(tmp_path, pack):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = pack("\n".join([*LINES, ""]).encode())
    thread = write_into(pipe, content[:1], content[1:7], content[7:])
    assert titles(pipe, separator="\t") == [f"T{number}" for number in range(3000)]
    thread.join(10)
    thread = write_into(pipe, b'{"1": {"title": "A"}}')
    assert read_documents(pipe, RIGHT) == {"1": {"title": "A"}}
    thread.join(10)


def test_a_pipe_that_nobody_writes_to_and_one_for_several_processes_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(streams, "WAIT_FOR_WRITER", 0.1)
    assert message(tmp_path / "pipe") == f"{tmp_path / 'pipe'}: expected a program that writes into the pipe, got none"
    for kind in ("parquet", "webdataset"):
        assert (
            message(tmp_path / "pipe", dataset_type=kind)
            == f"{tmp_path / 'pipe'}: expected a readable file, got 'a pipe'"
        )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "expected a file that each process can read whole, got a pipe" in message(tmp_path / "pipe")


@pytest.mark.parametrize("kind", ["csv", "parquet", "webdataset"])
def test_devices_and_sockets_are_refused(tmp_path, kind):
    for device in ("/dev/zero", "/dev/null"):
        assert message(device, dataset_type=kind) == f"{device}: expected a readable file, got 'a device'"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "expected a readable file, got 'No such device" in message(tmp_path / "socket", dataset_type=kind)
    assert message(tmp_path / "none", dataset_type=kind).endswith("got 'No such file or directory'")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "expected a readable file, got 'Too many levels" in message(tmp_path / "loop", dataset_type=kind)
    with pytest.raises(DataError, match="expected a readable file, got 'a folder'"):
        read_documents(tmp_path, RIGHT)


def test_the_files_of_a_name_and_their_type(tmp_path):
    write_csv(tmp_path / "a.TSV", [row("A")])
    assert files_of(tmp_path / "a.TSV") == ([tmp_path / "a.TSV"], "csv")
    assert files_of(tmp_path) == ([tmp_path / "a.TSV"], "csv")
    assert files_of("b.tar.gz")[1] == files_of("b.tgz")[1] == "webdataset"
    assert files_of("none", "parquet")[1] == "parquet"


def test_folders_whose_names_are_no_utf8(tmp_path):
    for name in (b"a\xff", b"b"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"pairs.csv"), "w") as file:
            file.write("query,image,score\nq,1.png,1\n")
    pairs = read_pairs(
        f"{tmp_path}/*/pairs.csv", LEFT, {"image": "img"}, "score", check_images="none", skip_bad_rows=True
    )
    assert pairs.right["image"] == [f"{tmp_path}/b/1.png"]
    assert pairs.bad_rows == [
        f"{tmp_path}/a\\udcff/pairs.csv, line 2: expected UTF-8 text, got the byte 0xff, 'ÿ' in Latin-1"
    ]


@pytest.mark.parametrize("separator", ["", ",,", '"', "\n", "\0"])
def test_a_separator_is_one_character(tmp_path, separator):
    write_csv(tmp_path / "a.csv", [row("A")])
    with pytest.raises(ValueError, match="expected one character that separates cells, no quote or line end, got '"):
        titles(tmp_path / "a.csv", separator=separator)
