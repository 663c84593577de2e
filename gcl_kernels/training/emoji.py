"""A retrieval set of emoji images, for people who have the files of noto-emoji, emojilib and unicode-emoji-json.

    python -m gcl_kernels.training.emoji --images noto-emoji/png/32 --keywords emoji-en-US.json \\
        --names data-by-emoji.json --out emoji

A document is an emoji: its image and, for a random half, its name (the others have a missing field). A query is a keyword
that people gave to several emoji. Relevance is **derived**: the grade is `max(1, 100 - 9 * position)` by the position of
the keyword in the emoji's own list, as a shop's search log grades by the position in its result; no person judged it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from gcl_kernels.training.splits import Judged, write_splits

FEWEST, MOST = 4, 60
"""Emoji that a keyword must have to be a query: fewer rank nothing, more say nothing."""


def write(
    images: str | Path, keywords: str | Path, names: str | Path, folder: str | Path, *, seed: int = 0
) -> dict[str, tuple[Path, Path]]:
    """Write the four test sets, the same for the same seed; see `gcl_kernels.training.splits.write_splits`.

    Args:
        images: folder of noto-emoji's `emoji_u<code points>.png`; they are named in the files, not copied.
        keywords: emojilib's `emoji-en-US.json`, `{emoji: [keyword]}`, best first.
        names: unicode-emoji-json's `data-by-emoji.json`, `{emoji: {"name": ...}}`.

    A fifth of the queries and a half of the documents are novel.
    """
    images = Path(images).resolve()
    keywords_of = json.loads(Path(keywords).read_text(encoding="utf-8"))
    name_of = json.loads(Path(names).read_text(encoding="utf-8"))
    rng = random.Random(seed)
    documents: dict[str, dict[str, str]] = {}
    grades: dict[str, dict[str, int]] = {}
    novel = set()
    for emoji, words in keywords_of.items():
        codes = [f"{ord(character):04x}" for character in emoji if character != "\ufe0f"]
        image = images / f"emoji_u{'_'.join(codes)}.png"
        if emoji not in name_of or not image.exists():
            continue
        documents[emoji] = {"title": name_of[emoji]["name"] if rng.random() < 0.5 else "", "image": str(image)}
        if rng.random() < 0.5:
            novel.add(emoji)
        # The first entry is the name itself.
        for position, word in enumerate(words[1:]):
            if word.isalpha():
                grades.setdefault(word.lower(), {}).setdefault(emoji, max(1, 100 - 9 * position))
    queries = [
        Judged(word, of_word, novel=rng.random() < 0.2)
        for word, of_word in sorted(grades.items())
        if FEWEST <= len(of_word) <= MOST and of_word.keys() & novel and of_word.keys() - novel
    ]
    return write_splits(folder, documents, novel, queries)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the set and say where."""
    parser = argparse.ArgumentParser(prog="python -m gcl_kernels.training.emoji", description="Emoji retrieval set")
    parser.add_argument("--images", required=True, metavar="DIR", help="noto-emoji's png/32, or another size")
    parser.add_argument("--keywords", required=True, metavar="FILE", help="emojilib's emoji-en-US.json")
    parser.add_argument("--names", required=True, metavar="FILE", help="unicode-emoji-json's data-by-emoji.json")
    parser.add_argument("--out", default="emoji", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for split, (pairs, corpus) in write(args.images, args.keywords, args.names, args.out, seed=args.seed).items():
        print(f"{split}: {pairs}, {corpus}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
