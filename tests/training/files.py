"""Small files of every type, for tests of what reads them."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import pytest


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows, **options):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_tar(path, members, **options):
    """`members`: (name, bytes) each."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_samples(path, rows):
    """One sample a row, all of it in its json member."""
    return write_tar(path, [(f"{number}.json", json.dumps(row).encode()) for number, row in enumerate(rows)])
