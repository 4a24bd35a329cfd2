#!/usr/bin/env python3
"""Prints Persuasion from the lazy-load database of the R package janeaustenr. README.md says how to call it.

The database is a row of compressed R objects, each after a 4-byte length. An object is an R serialization in its
big-endian form, here of one character vector with a line of the printed text in each string.
"""

import struct
import sys
import zlib

STRING_VECTOR = 16  # R's type of a character vector
PREFIX_BYTES = 14  # "X\n", format version, writing and oldest reading version of R


def objects(database):
    """Yields every object's bytes."""
    while database:
        stream = zlib.decompressobj()
        yield stream.decompress(database[4:])
        database = stream.unused_data


def lines(obj):
    """The strings of a character vector."""
    (encoding_bytes,) = struct.unpack_from(">I", obj, PREFIX_BYTES)
    at = PREFIX_BYTES + 4 + encoding_bytes
    kind, count = struct.unpack_from(">II", obj, at)
    if kind & 0xFF != STRING_VECTOR:
        sys.exit(f"expected a character vector (type {STRING_VECTOR}), found type {kind & 0xFF}: is this Rdata.rdb?")
    at += 8
    for _ in range(count):
        _, length = struct.unpack_from(">Ii", obj, at)
        yield obj[at + 8 : at + 8 + length].decode("utf-8")
        at += 8 + length


def paragraphs(lines):
    """Joins lines up to a blank one. After a dash the printed line was broken without a space."""
    paragraph = ""
    for line in lines:
        words = " ".join(line.split())
        if words:
            paragraph += words if not paragraph or paragraph.endswith("-") else " " + words
        elif paragraph:
            yield paragraph
            paragraph = ""
    if paragraph:
        yield paragraph


def main(path):
    with open(path, "rb") as file:
        novels = [list(lines(obj)) for obj in objects(file.read())]
    for novel in novels:
        if novel[0] == "Persuasion":
            print("\n\n".join(paragraphs(novel)))
            return
    sys.exit(f"Persuasion is not among {[novel[0] for novel in novels]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make.py Rdata.rdb > persuasion.txt")
    main(sys.argv[1])
