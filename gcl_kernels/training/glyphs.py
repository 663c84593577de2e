"""A multi-modal retrieval set that every machine can build offline: the glyphs of DejaVu Sans and their Unicode names.

A document is a character: the image of its glyph and, for a random third of the documents, its Unicode name. The others
have no name (a missing field), so a model that reads names and ignores images cannot find them: with all names given,
matching words would be enough. A query is two or three words of names, such as "greek small alpha".

Relevance is **derived** from Unicode's own structure; no person judged it. The *target* of a query is the character
with the shortest name that has all its words, and a document's grade is that of the first line that holds:

    100, 95, 90, 85, 80   its name has all the words of the query; 5 less for each further word, four at most
    60                    the base letter, after NFKD decomposition and case folding, is that of more than half of the
                          documents with all the words (so the query names a letter, as "small cedilla" does not)
    30                    the same script and general category as the target
    10                    the same script, or the same general category

Words that nearly every name has ("letter", "with", ...) do not count; a script is the first word of a letter's name, and
"common" for what is no letter. All documents with 60 or more are judged. Those with 30 and 10 are a large part of the
set for any query: a few of each are drawn at random, and the others stay unjudged.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gcl_kernels.training.splits import Judged, write_splits

IMAGE_SIZE = 32

LEVELS = {80: "all words", 60: "same base letter", 30: "same script and category", 10: "same script or category"}
"""The least grade of each level of derived relevance, best first."""

_COMMON_WORDS = frozenset(["letter", "sign", "symbol", "with", "and", "of", "the", "for", "form"])
# Names of these are numbers or codes, which say nothing about the glyph to someone who does not know the code.
_CODED = ("BRAILLE PATTERN", "TETRAGRAM FOR", "HEXAGRAM FOR", "DOMINO TILE", "VARIATION SELECTOR")
_MOST_MATCHES = 60
_MOST_LOW = 4


@dataclass(frozen=True)
class Glyph:
    """One document: `words` are those of its name that count; `named` says whether the name is given to the model."""

    character: str
    name: str
    words: frozenset[str]
    base: str
    script: str
    category: str
    named: bool
    novel: bool

    @property
    def identity(self) -> str:
        return f"U+{ord(self.character):04X}"


@dataclass(frozen=True)
class Query:
    """Words of names and the grades of the judged documents, `{position in GlyphSet.documents: grade}`."""

    text: str
    grades: dict[int, int]
    novel: bool


@dataclass(frozen=True)
class GlyphSet:
    """The whole set; `novel` on a document or query says that it is not in the training set."""

    documents: list[Glyph]
    queries: list[Query]

    @property
    def grades(self) -> dict[str, dict[str, int]]:
        """`{query: {document id: grade}}`."""
        return {
            query.text: {self.documents[position].identity: grade for position, grade in query.grades.items()}
            for query in self.queries
        }

    def write(self, folder: str | Path) -> dict[str, tuple[Path, Path]]:
        """Write the images, and for each of `SPLITS` the pairs as CSV and the corpus as JSON.

        Returns `{split: (CSV, JSON)}`. The columns are query, document, title, image and score.
        """
        folder = Path(folder)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        documents = {}
        for glyph in self.documents:
            image = Path("images") / f"{glyph.identity[2:]}.png"
            render(glyph.character).save(folder / image)
            documents[glyph.identity] = {
                "title": glyph.name.lower() if glyph.named else "",
                "image": image.as_posix(),
            }
        novel = {glyph.identity for glyph in self.documents if glyph.novel}
        grades = self.grades
        queries = [Judged(query.text, grades[query.text], query.novel) for query in self.queries]
        return write_splits(folder, documents, novel, queries)


def build(*, queries: int = 1000, documents: int | None = None, seed: int = 0) -> GlyphSet:
    """Build the set: up to `queries` queries over up to `documents` documents (None: all), the same for the same seed.

    A fifth of the queries and a half of the documents are novel.
    """
    rng = random.Random(seed)
    characters = glyph_characters()
    if documents is not None and documents < len(characters):
        characters = sorted(rng.sample(characters, documents))
    glyphs = []
    for character in characters:
        name = unicodedata.name(character)
        category = unicodedata.category(character)
        glyphs.append(
            Glyph(
                character=character,
                name=name,
                words=frozenset(content_words(name)),
                base=base_letter(character),
                script=name.split()[0].lower() if category.startswith("L") else "common",
                category=category,
                named=rng.random() < 1 / 3,
                novel=rng.random() < 0.5,
            )
        )

    having = _positions(glyphs, lambda glyph: glyph.words)
    same_base = _positions(glyphs, lambda glyph: (glyph.base,))
    same_script = _positions(glyphs, lambda glyph: (glyph.script,))
    same_category = _positions(glyphs, lambda glyph: (glyph.category,))
    novel_half = {position for position, glyph in enumerate(glyphs) if glyph.novel}

    found: dict[frozenset[str], Query] = {}
    for position in rng.sample(range(len(glyphs)), len(glyphs)):
        if len(found) == queries:
            break
        words = content_words(glyphs[position].name)
        if len(words) < 2:
            continue
        places = rng.sample(range(len(words)), min(len(words), rng.choice((2, 2, 3))))
        chosen = [words[place] for place in sorted(places)]
        matches = set.intersection(*(having[word] for word in chosen))
        # Each half of the documents gets a match, so that the query means something in every split.
        in_both_halves = matches & novel_half and matches - novel_half
        if len(matches) > _MOST_MATCHES or not in_both_halves or frozenset(chosen) in found:
            continue
        target = glyphs[min(matches, key=lambda position: (len(glyphs[position].words), position))]
        script, category = same_script[target.script], same_category[target.category]
        base, share = Counter(glyphs[position].base for position in matches).most_common(1)[0]
        base = base if 2 * share > len(matches) else None
        better = matches | same_base.get(base or "", set())
        judged = sorted(better)
        for level in (script & category, script | category):
            # Drawn from each half of the documents on its own, so that every split has some.
            for half in ((level - better) - novel_half, (level - better) & novel_half):
                judged += sorted(rng.sample(sorted(half), min(_MOST_LOW, len(half))))
            better |= level
        text = " ".join(chosen)
        grades = {position: grade(text, target, base, glyphs[position]) for position in judged}
        found[frozenset(chosen)] = Query(text, grades, novel=rng.random() < 0.2)
    return GlyphSet(glyphs, list(found.values()))


def _positions(glyphs: list[Glyph], keys: Callable[[Glyph], Iterable[str]]) -> dict[str, set[int]]:
    positions: dict[str, set[int]] = {}
    for position, glyph in enumerate(glyphs):
        for key in keys(glyph):
            positions.setdefault(key, set()).add(position)
    return positions


def grade(query: str, target: Glyph, base: str | None, document: Glyph) -> int:
    """The derived relevance of a document, by the table at the head of this module; 0 when no line holds.

    `base` is the base letter that the query names, None when it names none.
    """
    words = frozenset(query.split())
    if words <= document.words:
        return 100 - 5 * min(len(document.words - words), 4)
    if document.base == base:
        return 60
    same = (document.script == target.script) + (document.category == target.category)
    return {2: 30, 1: 10, 0: 0}[same]


def content_words(name: str) -> list[str]:
    """The words of a Unicode name that count, in order and in lower case, each once."""
    return [word for word in dict.fromkeys(name.lower().split()) if word not in _COMMON_WORDS]


def base_letter(character: str) -> str:
    """The first letter, number or symbol of the character's NFKD decomposition, case-folded: "α" for "Ἄ", "1" for "⑴"."""
    decomposed = unicodedata.normalize("NFKD", character)
    first = next((part for part in decomposed if unicodedata.category(part)[0] in "LNS"), character)
    return first.casefold()


@lru_cache(maxsize=1)
def font_path() -> Path:
    """DejaVu Sans as matplotlib ships it."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@lru_cache(maxsize=1)
def glyph_characters() -> list[str]:
    """The named characters with a visible glyph in DejaVu Sans, combining marks and coded names left out, sorted."""
    from matplotlib.ft2font import FT2Font

    characters = [chr(code) for code in FT2Font(str(font_path())).get_charmap()]
    return sorted(
        character
        for character in characters
        if unicodedata.category(character)[0] not in "MZC"
        and not unicodedata.name(character, _CODED[0]).startswith(_CODED)
    )


def render(character: str, size: int = IMAGE_SIZE) -> Image.Image:
    """The glyph in black on white, centred, `size` x `size` pixels; made smaller when it would not fit."""
    # Basic layout: what the text-shaping library of a machine does must not change the set.
    for points in (round(size * 0.8), round(size * 0.55), round(size * 0.35), round(size * 0.2)):
        font = _font(points)
        left, top, right, bottom = font.getbbox(character)
        if max(right - left, bottom - top) <= size:
            break
    image = Image.new("RGB", (size, size), "white")
    corner = ((size - (right - left)) / 2 - left, (size - (bottom - top)) / 2 - top)
    ImageDraw.Draw(image).text(corner, character, font=font, fill="black")
    return image


@lru_cache(maxsize=16)
def _font(points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path()), points, layout_engine=ImageFont.Layout.BASIC)
