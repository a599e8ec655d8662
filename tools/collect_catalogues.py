#!/usr/bin/env python3
"""Make a translation data set from the message catalogues of Debian packages (each under its own free licence).

    python tools/collect_catalogues.py --language de --output data/catalogues

downloads the packages with `apt-get download` (48 MB) into FOLDER/packages, unless they are there, and installs
nothing. It writes FOLDER/train.jsonl and FOLDER/valid.jsonl, lines of source (English) and target, and
FOLDER/text.jsonl, the training messages of both languages as lines of text, for a tokenizer. One in ten families of
messages is for validation. Those messages are shuffled, so that the first lines are a sample.

Catalogues are full of near duplicates, and a message is not unseen if a near duplicate was in training. So near
duplicates form families, and a family is either in training or in validation. Ignoring case, digits, placeholders and
punctuation, two sources are near duplicates if their words are the same, in the same order, after leaving out of each
up to one word if it has four or more, or up to two if it has eight or more. A chain of near duplicates is one family.
"""

import hashlib
import json
import re
import shutil
import struct
import subprocess
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import combinations
from pathlib import Path

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.data.collected import write_collected
from megalite.errors import ConfigError, DataError
from megalite.inputs import reading
from megalite.ranks.arguments import ArgumentParser, at_least
from megalite.ranks.run_program import run_program

PACKAGES = ["coreutils", "evolution-common", "gcc-12-locales", "gimp-data", "git", "gnome-control-center-data",
            "gnupg-l10n", "nautilus-data", "vim-runtime"]  # fmt: skip
EVERY = 10  # one in this many families is for validation
LEAST_WORDS = ((4, 1), (8, 2))  # (words of a source, how many of them may be left out)
WORD = re.compile(r"[^\W\d_]+")
PLACEHOLDER = re.compile(r"%[^a-zA-Z%\s]*(?:hh|ll|[hljztLqw])?[a-zA-Z]|\{\w*\}")
CONTEXT, PLURAL = b"\x04", b"\x00"
Pair = tuple[str, str]
Words = tuple[str, ...]
LANGUAGE = re.compile(r"[A-Za-z]{2,3}([_@][A-Za-z0-9]+)*")
CHARSET = re.compile(rb"charset=([\w.:-]+)")


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--language", required=True, metavar="CODE", help="such as de, fr, es, zh_CN"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME")
    parser.add_argument(
        "--longest", type=at_least(1), default=200, metavar="N", help="most characters of a message"
    )
    args = parser.parse_args(argv)
    if not LANGUAGE.fullmatch(args.language):
        raise ConfigError(f"--language: {args.language}: must be a code such as de or zh_CN")
    folder = Path(args.output)
    unpacked = folder / "packages"
    for package in args.packages:
        if not (unpacked / package).is_dir():
            _unpack(package, unpacked)
    pairs: dict[Pair, None] = {}
    for package in args.packages:
        for path in sorted((unpacked / package).rglob(f"{args.language}/LC_MESSAGES/*.mo")):
            with reading(path, DataError):
                found = list(messages(path.read_bytes()))
            for source, target in found:
                if source != target and max(len(source), len(target)) <= args.longest:
                    pairs[source, target] = None
    if not pairs:
        rule = "is in no catalogue of the packages"
        raise ConfigError(f"--language: {args.language}: {rule} {' '.join(args.packages)}")
    train, valid = split(pairs)
    _write(folder / "train.jsonl", [{"source": s, "target": t} for s, t in train])
    _write(folder / "valid.jsonl", [{"source": s, "target": t} for s, t in valid])
    _write(folder / "text.jsonl", [{"text": text} for pair in train for text in pair])
    return 0


def _write(path: Path, lines: list[dict[str, str]]) -> None:
    rows = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    write_collected(path, rows)
    print(f"{path}: {len(rows)} lines")


def _unpack(package: str, folder: Path) -> None:
    """Downloads a package and unpacks it into a folder with its name, which appears only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{package}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for command in (
            ["apt-get", "download", package],
            ["sh", "-c", f"dpkg-deb -x {package}_*.deb {package}.partial"],
        ):
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"--packages: {package}: needs apt-get, of Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "no reason given").splitlines()[-1]
        raise ConfigError(f"--packages: {package}: cannot be downloaded: {said}") from None
    partial.rename(folder / package)


def split(pairs: Collection[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs for training, in order, and those for validation, shuffled. The part of a family depends only on the
    words of its messages."""
    families = Families(words(source) for source, _ in pairs)
    least: dict[Words, int] = defaultdict(lambda: 2**64)
    for source, _ in pairs:
        found = words(source)
        family = families.of(found)
        least[family] = min(least[family], digest(" ".join(found)))
    train, valid = [], []
    for pair in pairs:
        held_out = least[families.of(words(pair[0]))] % EVERY == 0
        (valid if held_out else train).append(pair)
    return train, sorted(valid, key=lambda pair: digest(pair[0]))


class Families:
    """Families of near duplicates: connected components of messages (union-find)."""

    def __init__(self, messages: Iterable[Words]) -> None:
        self._above: dict[Words, Words] = {}  # a root is its own parent
        for message in set(messages):
            self._above.setdefault(message, message)
            for least, left_out in LEAST_WORDS:
                if len(message) >= least:
                    for rest in combinations(message, len(message) - left_out):
                        self._join(message, rest)

    def of(self, message: Words) -> Words:
        """The representative of a message's family."""
        above = self._above
        while above[message] != message:
            above[message] = above[above[message]]
            message = above[message]
        return message

    def _join(self, one: Words, other: Words) -> None:
        self._above.setdefault(other, other)
        self._above[self.of(other)] = self.of(one)


def words(source: str) -> Words:
    """The words of a message, without case, digits, placeholders and punctuation."""
    return tuple(WORD.findall(PLACEHOLDER.sub(" ", source).lower()))


def digest(text: str) -> int:
    """A hash of the text as a number."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def messages(content: bytes) -> Iterator[tuple[str, str]]:
    """Source and target of each translated message of a catalogue (GNU gettext's manual, "The Format of GNU MO Files");
    for plurals the singular. Contexts and marks of menu keys ("_Open") are removed. Raises ValueError if it is not a
    catalogue."""
    order = {0x950412DE: "<", 0xDE120495: ">"}.get(struct.unpack("<I", content[:4])[0])
    if order is None:
        raise ValueError("is no message catalogue")
    count, sources, targets = struct.unpack(f"{order}3I", content[8:20])

    def entry(table: int, number: int) -> bytes:
        length, start = struct.unpack_from(f"{order}2I", content, table + 8 * number)
        return content[start : start + length]

    charset = "utf-8"
    for number in range(count):
        source, target = entry(sources, number), entry(targets, number)
        if not source:  # the first one: the header
            found = CHARSET.search(target)
            charset = found[1].decode("ascii") if found else charset
        elif target:
            source = source.rpartition(CONTEXT)[2].partition(PLURAL)[0]
            target = target.partition(PLURAL)[0]
            yield plain(source.decode(charset)), plain(target.decode(charset))


def plain(text: str) -> str:
    """A message on one line, without marks of menu keys."""
    return (
        " ".join(text.replace("_", "").split()) if text.count("_") == 1 else " ".join(text.split())
    )


if __name__ == "__main__":
    run_program(main)
