"""Samples of webdataset tar files: none is lost without a word, whatever the file has gone through."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image

from gcl_kernels.training.data import PairFile, load_image, read_pairs
from gcl_kernels.training.data.pairs import Columns
from gcl_kernels.training.errors import DataError
from tests.training.files import write_tar

LEFT, RIGHT = {"query": "txt"}, {"title": "txt", "png": "img"}


@pytest.fixture
def image():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def describe(number=0, **more):
    return json.dumps({"query": "q", "title": f"T{number}", "score": 1, **more}).encode()


def read(path, right=RIGHT, **options):
    return read_pairs(path, LEFT, right, "score", dataset_type="webdataset", **options)


def message(path, right=RIGHT, **options):
    with pytest.raises(DataError) as caught:
        read(path, right, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_endings_are_those_in_lower_case(tmp_path, image):
    path = write_tar(
        tmp_path / "a.tar",
        [("a.JSON", describe()), ("a.PNG", image), ("x.y/b.json", describe(1)), ("x.y/b.Png", image)],
    )
    for name in ("png", "PNG"):
        pairs = read(path, {"title": "txt", name: "img"})
        assert [load_image(part).getpixel((0, 0)) for part in pairs.right[name]] == [(255, 0, 0)] * 2


def test_a_column_that_no_sample_has_is_an_error(tmp_path, image):
    path = write_tar(tmp_path / "a.tar", [("a.json", describe()), ("a.jpg", image)])
    assert message(path) == (
        f"{path}: expected a member or a JSON key 'png' in at least one sample, got ['query', 'score', 'title', 'json', 'jpg']"
    )
    assert "'png' in at least one sample" in message(path, skip_bad_rows=True)
    # What some samples have, and what all have without a value, is a missing value of the others.
    other = write_tar(tmp_path / "b.tar", [("a.json", describe(png=None)), ("b.json", describe(1))])
    assert read(other).right["png"] == ["", ""]
    assert read(f"{path}::{other}").right["title"] == ["T0", "T0", "T1"]


def test_a_file_cut_short_anywhere_says_so_and_keeps_its_whole_samples(tmp_path, image):
    members = [
        member for number in range(4) for member in ((f"{number}.json", describe(number)), (f"{number}.png", image))
    ]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    end = 8 * 1024  # of the members, of a header and a block of data each
    assert read(tmp_path / "whole.tar").right["title"] == ["T0", "T1", "T2", "T3"]
    path = tmp_path / "cut.tar"
    lengths = {*range(0, end + 1024, 61), *range(0, end, 512), end + 1, end + 1023, end + 1024, len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        if length >= end + 1024:
            assert len(read(path)) == 4, length
            continue
        assert message(path).startswith(f"{path}: expected a whole uncompressed tar file, got "), length
        # A sample is whole when the next one, or the closing zeros, are known to follow it.
        least = (length - (1 if length > end else 512)) // 2048
        if least < 1:
            with pytest.raises(DataError, match="expected a whole uncompressed tar file"):
                read(path, skip_bad_rows=True)
            continue
        pairs = read(path, skip_bad_rows=True)
        assert pairs.right["title"] == [f"T{number}" for number in range(least)], length
        assert all(pairs.right["png"]), length
        assert pairs.bad_count == 1, length


def damaged(tmp_path, change):
    members = [(f"{number}.json", describe(number)) for number in range(4)]
    content = bytearray(write_tar(tmp_path / "a.tar", members).read_bytes())
    change(content)
    (tmp_path / "a.tar").write_bytes(content)
    return tmp_path / "a.tar"


def size_field(field):
    """A change of the size of the third member, with the checksum that goes with it."""

    def change(content):
        start = 2 * 1024
        content[start + 124 : start + 136] = field
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])

    return change


def flip(content):
    content[2 * 1024] ^= 1  # the name, of which the checksum knows


@pytest.mark.parametrize(
    "change",
    [flip, size_field(b"77777777777\0"), size_field(b"\xff" * 10 + b"\xf0\0"), size_field(b"\x80" + b"\x7f" * 11),
     lambda content: content.extend(content[:9000])],
)  # fmt: skip
def test_a_damaged_or_joined_file_is_a_fault_and_keeps_what_comes_before(tmp_path, change):
    path = damaged(tmp_path, change)
    assert message(path, {"title": "txt"}).startswith(f"{path}: expected a whole uncompressed tar file, got ")
    pairs = read(path, {"title": "txt"}, skip_bad_rows=True)
    assert pairs.right["title"][:1] == ["T0"]
    assert pairs.bad_count == 1


def test_members_apart_twice_or_not_plain_are_faults_of_their_sample(tmp_path, image):
    path, plain = tmp_path / "a.tar", [
        ("a.json", describe()), ("a.png", image), ("b.json", describe(1)), ("b.json", describe(2)), ("c.json", describe(3)),
        ("c.png", None), ("../d.json", describe(4)), ("../d.png", image), ("a.png", image),
        ("__meta__/e.json", b"{"), ("README", b"x"), (".hidden.json", b"{"),
    ]  # fmt: skip
    with tarfile.open(path, "w") as archive:
        for name, content in plain:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "../../etc/passwd"
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    pairs = read(path, skip_bad_rows=True)
    assert pairs.right["title"] == ["T0", "T4"]
    assert pairs.bad_rows == [
        f"{path}, sample 'b': expected each member once, got 'json' again",
        f"{path}, sample 'c': expected plain files, got 'png', a link or another special file",
        f"{path}, sample 'a': expected the members of a sample side by side, got this one again",
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            b"{",
            "expected JSON in its json member, got another text, line 1: expected JSON, got 'Expecting property name",
        ),
        (b"[1]", "expected a JSON object in its json member, got list"),
        (b"\xff{}", "expected JSON in its json member, got another text: expected UTF-8 text, got the byte 0xff"),
        (b"[" * 100_000, "expected JSON in its json member, got another text: expected JSON that can be read, got"),
        (b'{"score": 1, "score": 2}', "expected each key once, got 'score' again"),
        (b"", "expected JSON in its json member, got another text, line 1: expected JSON, got 'Expecting value'"),
    ],
    ids=["broken", "list", "bytes", "deep", "repeated", "empty"],
)
def test_a_json_member_of_another_form_is_a_bad_row(tmp_path, content, fault):
    path = write_tar(tmp_path / "a.tar", [("a.json", describe()), ("b\n.json", content)])
    assert message(path, {"title": "txt"}).startswith(f"{path}, sample 'b\\n': {fault}")
    assert read(path, {"title": "txt"}, skip_bad_rows=True).right["title"] == ["T0"]


def test_a_file_without_samples_has_no_row(tmp_path):
    path = write_tar(tmp_path / "a.tar", [])
    assert message(path) == f"{path}: expected at least one row, got none"
    (tmp_path / "empty.tar").write_bytes(b"")
    assert "empty.tar: expected a whole uncompressed tar file, got 'empty file'" in message(tmp_path / "empty.tar")


def test_an_image_is_read_from_the_file_where_it_is(tmp_path, image):
    path = write_tar(tmp_path / "a.tar", [("a.json", describe()), ("a.png", image)], format=tarfile.PAX_FORMAT)
    pairs = PairFile(path, Columns(LEFT, RIGHT, "score"))
    assert pairs.take([0]).right["png"] == [f"{path}@1536+{len(image)}"]
