"""The glyph set: deterministic, with the grades that Unicode's structure gives, and readable by the CSV reader."""

from __future__ import annotations

import json
import unicodedata

import pytest
from PIL import ImageChops, ImageOps

from gcl_kernels.training.data import read_documents, read_pairs
from gcl_kernels.training.glyphs import (
    IMAGE_SIZE,
    Glyph,
    base_letter,
    build,
    content_words,
    glyph_characters,
    grade,
    render,
)
from gcl_kernels.training.splits import SPLITS


@pytest.fixture(scope="module")
def glyphs():
    return build(queries=150, documents=1500)


def glyph(character):
    name, category = unicodedata.name(character), unicodedata.category(character)
    script = name.split()[0].lower() if category[0] == "L" else "common"
    return Glyph(character, name, frozenset(content_words(name)), base_letter(character), script, category, True, False)


@pytest.mark.parametrize(
    ("character", "expected"),
    [("α", 100), ("ά", 95), ("ἄ", 90), ("Α", 60), ("Ἄ", 60), ("β", 30), ("Β", 10), ("a", 10), ("A", 0), ("←", 0)],
)
def test_grades_by_hand(character, expected):
    assert grade("greek small alpha", glyph("α"), "α", glyph(character)) == expected


@pytest.mark.parametrize(("character", "expected"), [("←", 100), ("↚", 95), ("→", 30), ("↕", 10), ("Ω", 0)])
def test_symbols_are_one_script(character, expected):
    assert grade("leftwards arrow", glyph("←"), None, glyph(character)) == expected


def test_base_letters():
    assert [base_letter(c) for c in "ἄᾴΆ⑴ⓐ↚´"] == ["α", "α", "α", "1", "a", "←", "´"]


def test_every_character_has_a_name_and_a_visible_glyph_of_its_own_size():
    characters = glyph_characters()
    assert len(characters) > 4000
    assert characters == sorted(set(characters))
    for character in characters[::7]:
        assert unicodedata.name(character)
        image = ImageOps.invert(render(character).convert("L"))
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert image.getbbox() is not None, f"U+{ord(character):04X} is blank"


def test_glyphs_are_centred_and_whole():
    for character in "Aαi﷽W":
        left, top, right, bottom = ImageOps.invert(render(character, 64).convert("L")).getbbox()
        assert abs(left - (64 - right)) <= 2, character
        assert abs(top - (64 - bottom)) <= 2, character
        assert min(left, top) >= 0


def test_the_same_seed_gives_the_same_set_and_another_seed_another(glyphs):
    assert build(queries=150, documents=1500) == glyphs
    assert build(queries=150, documents=1500, seed=1) != glyphs


def test_queries_have_relevant_documents_in_every_split_and_the_grades_are_derived(glyphs):
    assert len(glyphs.queries) == 150
    assert len({frozenset(query.text.split()) for query in glyphs.queries}) == 150
    for query in glyphs.queries:
        words = set(query.text.split())
        full = {p for p, document in enumerate(glyphs.documents) if words <= document.words}
        assert {p for p, score in query.grades.items() if score >= 80} == full, query.text
        assert {glyphs.documents[p].novel for p in full} == {False, True}, query.text
        bases = [glyphs.documents[p].base for p in full]
        named = [base for base in set(bases) if 2 * bases.count(base) > len(bases)]
        near = {p for p, document in enumerate(glyphs.documents) if document.base in named} - full
        assert {p for p, score in query.grades.items() if score == 60} == near, query.text
        assert set(query.grades.values()) <= {100, 95, 90, 85, 80, 60, 30, 10}


def test_shares_are_those_of_the_protocol(glyphs):
    assert sum(document.novel for document in glyphs.documents) / 1500 == pytest.approx(0.5, abs=0.05)
    assert sum(document.named for document in glyphs.documents) / 1500 == pytest.approx(1 / 3, abs=0.05)
    assert sum(query.novel for query in glyphs.queries) / 150 == pytest.approx(0.2, abs=0.08)


def test_names_alone_do_not_solve_the_task(glyphs):
    """Two thirds of the documents that match a query have no name, so word matching cannot see them."""
    named = [glyphs.documents[p].named for query in glyphs.queries for p, score in query.grades.items() if score >= 80]
    assert sum(named) / len(named) == pytest.approx(1 / 3, abs=0.1)


def test_the_written_files_are_the_set(glyphs, tmp_path):
    files = glyphs.write(tmp_path)
    assert list(files) == list(SPLITS)
    expected = {
        (query.text, glyphs.documents[p].identity): float(score)
        for query in glyphs.queries
        for p, score in query.grades.items()
    }
    found, queries, documents = {}, {}, {}
    for split, (pairs_file, corpus_file) in files.items():
        pairs = read_pairs(
            pairs_file, {"query": "txt"}, {"title": "txt", "image": "img"}, "score", document_id_key="document"
        )
        keys = list(zip(pairs.left["query"], pairs.document_ids, strict=True))
        assert not found.keys() & set(keys)
        found |= dict(zip(keys, pairs.scores, strict=True))
        queries[split], documents[split] = set(pairs.left["query"]), set(pairs.document_ids)
        corpus = read_documents(corpus_file, {"title": "txt", "image": "img"})
        assert documents[split] <= corpus.keys()
    assert found == expected
    assert queries["in-domain"] == queries["novel document"]
    assert queries["novel query"] == queries["zero-shot"]
    assert not queries["in-domain"] & queries["novel query"]
    assert not documents["in-domain"] & documents["novel document"]
    titles = [row["title"] for row in json.loads(files["in-domain"][1].read_text()).values()]
    assert "" in titles
    assert any(title == title.lower() != "" for title in titles)


def test_pictures_of_different_letters_differ():
    assert ImageChops.difference(render("A"), render("B")).getbbox() is not None
