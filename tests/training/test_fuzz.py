"""Damaged files of every type: rows are read or counted as bad, or the file is refused, in one line each and in time."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import math
import signal

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from gcl_kernels.training.data import image_fault, load_image, read_documents, read_pairs
from gcl_kernels.training.errors import InputError
from tests.training.files import write_parquet, write_tar

LEFT, RIGHT = {"query": "txt"}, {"title": "txt", "png": "img"}
ROWS = 6
SECONDS = 20


@contextlib.contextmanager
def in_time():
    """Ends what takes longer than `SECONDS`; the files here take milliseconds."""

    def end(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(path, **options):
    """Rows read and rows counted as bad; None and the message of a file that is refused."""
    try:
        with in_time():
            pairs = read_pairs(path, LEFT, RIGHT, "score", skip_bad_rows=True, **options)
    except InputError as error:
        check_words(str(error))
        return None, str(error)
    check_words("\n".join(pairs.bad_rows))
    assert len(pairs.bad_rows) == min(pairs.bad_count, 10)
    for cells in (*pairs.left.values(), *pairs.right.values(), pairs.query_ids, pairs.document_ids):
        assert len(cells) == len(pairs.scores)
        "".join(cells).encode()
    assert all(math.isfinite(score) and score >= 0 for score in pairs.scores)
    return len(pairs), pairs.bad_count


def check_words(text):
    for line in text.split("\n"):
        assert line.isprintable(), line
        assert len(line) < 5000
        assert not line or "expected" in line or "more bad rows" in line, line


def picture():
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((8, 8)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def small_files(folder):
    """`{name: bytes}`: one good file of each type."""
    image = picture()
    (folder / "a.png").write_bytes(image)
    rows = [
        {"query": f"q{n}", "title": f'T, "é"\n{n}', "png": "a.png" if n % 2 else "", "score": n + 0.5}
        for n in range(ROWS)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    members = []
    for number, row in enumerate(rows):
        described = {key: row[key] for key in ("query", "title", "score")}
        members += [(f"{number}.json", json.dumps(described).encode()), (f"{number}.png", image)]
    files = {"a.csv": content, "a.csv.gz": gzip.compress(content), "a.csv.bz2": bz2.compress(content)}
    files["a.csv.xz"] = lzma.compress(content)
    files["a.tar"] = write_tar(folder / "whole.tar", members).read_bytes()[
        : (4 * ROWS + 2) * 512
    ]  # without the padding
    with contextlib.suppress(pytest.skip.Exception):
        files["a.parquet"] = write_parquet(folder / "whole.parquet", rows, row_group_size=2).read_bytes()
        files["dictionary.parquet"] = write_parquet(
            folder / "whole.parquet", rows, row_group_size=4, compression="none", write_page_checksum=True
        ).read_bytes()
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def files(folder):
    return small_files(folder)


@st.composite
def damage(draw, content):
    """Some bytes changed, cut out, put in twice or cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["set", "flip", "cut", "end", "twice", "insert", "zeros"]))
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        length = draw(st.integers(1, 64))
        if kind == "set" and changed:
            changed[place] = draw(st.sampled_from([0, 1, 10, 13, 34, 44, 127, 128, 255]))
        elif kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[place : place + length]
        elif kind == "end":
            del changed[place:]
        elif kind == "twice":
            changed[place:place] = changed[place : place + length]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "zeros":
            changed[place : place + length] = bytes(len(changed[place : place + length]))
    return bytes(changed)


NAMES = ["a.csv", "a.csv.gz", "a.csv.bz2", "a.csv.xz", "a.tar", "a.parquet", "dictionary.parquet"]


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(folder, files, name, data):
    if name not in files:
        pytest.skip("pyarrow is not installed")
    path = folder / f"damaged-{name}"
    path.write_bytes(data.draw(damage(files[name])))
    read(path, check_images=data.draw(st.sampled_from(["decode", "exists", "none"])))


@pytest.mark.parametrize("name", ["a.parquet", "dictionary.parquet"])
@given(st.data())
def test_no_row_of_damaged_pages_is_lost_without_a_word(folder, files, name, data):
    if name not in files:
        pytest.skip("pyarrow is not installed")
    content = bytearray(files[name])
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(4, footer - 1))] = data.draw(st.integers(0, 255))
    path = folder / f"pages-{name}"
    path.write_bytes(content)
    good, bad = read(path)
    if good is None:
        assert "expected at least one good row" in bad
    else:
        assert good + bad == ROWS


TEXT = st.one_of(
    st.text(max_size=5),
    st.text(st.sampled_from('ab ,"\n\r\t\0\x85\u2028\ufeff'), max_size=8),
    st.sampled_from(["nan", "-1", "1e400", "7", "a.png"]),
)
HALF_A_PAIR = st.text(st.characters(categories=["Cs"]), max_size=2)
VALUE = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**25), 10**25), st.floats(), TEXT, HALF_A_PAIR,
    st.lists(st.integers(), max_size=1), st.dictionaries(st.text(max_size=1), st.none(), max_size=1),
)  # fmt: skip


def tables(values):
    row = st.fixed_dictionaries(dict.fromkeys(("query", "title", "png", "score"), values))
    return st.lists(row, min_size=1, max_size=12)


def count(folder, name, content, written):
    path = folder / name
    path.write_bytes(content)
    good, bad = read(path)
    if good is None:
        assert "expected at least one good row, got none" in bad
        bad_lines = bad.splitlines()[1:]
        assert len(bad_lines) == min(written, 10 + (written > 10))
    else:
        assert good + bad == written
    return good or 0


@given(tables(VALUE))
def test_every_sample_of_any_values_is_read_or_counted(folder, rows):
    members = [(f"{number}.json", json.dumps(row).encode()) for number, row in enumerate(rows)]
    good = count(folder, "values.tar", write_tar(folder / "values.tar", members).read_bytes(), len(rows))
    path = folder / "values.json"
    path.write_text(json.dumps({str(number): row for number, row in enumerate(rows)}))
    try:
        documents = read_documents(path, RIGHT, skip_bad_rows=True)
    except InputError as error:
        check_words(str(error))
        documents = {}
    # A document is good where its fields are; a row asks for a query, a score and one of the fields as well.
    assert len(documents) >= good


@given(tables(TEXT), st.booleans())
def test_every_row_of_any_texts_is_read_or_counted(folder, rows, marked):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    content = (b"\xef\xbb\xbf" if marked else b"") + text.getvalue().encode(errors="surrogatepass")
    alike = [
        count(folder, name, pack(content), len(rows)) for name, pack in (("t.csv", bytes), ("t.csv.gz", gzip.compress))
    ]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "tif", "bmp", "avif", "jp2", "ppm"])
@given(st.data())
def test_a_damaged_picture_is_decoded_or_a_fault(folder, ending, data):
    buffer = io.BytesIO()
    try:
        Image.linear_gradient("L").resize((12, 12)).convert("RGB").save(
            buffer, Image.registered_extensions()[f".{ending}"]
        )
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow does not write {ending}: {error}")
    path = folder / f"damaged.{ending}"
    path.write_bytes(data.draw(damage(buffer.getvalue())))
    with in_time():
        fault = image_fault(path)
        if fault is None:
            assert load_image(path).mode == "RGB"
    assert fault is None or fault.isprintable()


@given(st.data())
def test_damaged_documents_are_read_or_refused(folder, data):
    content = json.dumps({str(n): {"title": f"é{n}", "png": None} for n in range(4)}).encode()
    path = folder / "damaged.json"
    path.write_bytes(data.draw(damage(content)))
    with contextlib.suppress(InputError), in_time():
        read_documents(path, RIGHT, skip_bad_rows=data.draw(st.booleans()))
