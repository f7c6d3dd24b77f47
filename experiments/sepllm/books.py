"""Writes texts as PG-19's are: line ends of one character, and paragraphs in lines of up to 72.

python experiments/sepllm/books.py FOLDER OTHER_FOLDER
"""

import sys
import textwrap
from pathlib import Path

_LONGEST, _WIDTH = 80, 72


def wrapped(text: str) -> str:
    """The text with line feeds alone for line ends, and lines of words of at most 80 characters."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        short = len(line) <= _LONGEST
        lines += [line] if short else textwrap.wrap(line, _WIDTH, break_long_words=False)
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.txt")):
        text = wrapped(file.read_bytes().decode("utf-8-sig"))
        (target / file.name).write_bytes(text.encode())


if __name__ == "__main__":
    main()
