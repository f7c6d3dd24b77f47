"""A tokenizer of bytes, and models that know every answer, or none."""

import numpy as np

from seqeff.data import ByteLengths
from seqeff.evaluation.retrieval import Row
from seqeff.inference import CacheUse


class Bytes:
    """A token a byte, and the end of text."""

    begin_of_text = 256
    ends_of_text = (256,)
    vocabulary_size, fingerprint = 257, "bytes"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(int(x) for x in ids if x < 256).decode()

    def byte_lengths(self):
        lengths = np.array([1] * 256 + [0], np.int32)
        return ByteLengths(lengths, lengths, self.begin_of_text)

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else b""


class Oracle:
    """Says what the questions' answers are."""

    use = CacheUse(tokens=2, read=3.0, resident=4)

    def answers(self, examples):
        return [[" " + " and ".join(q.answers) + ". Then" for q in e.questions] for e in examples]

    def predictions(self, rows):
        return [row.targets for row in rows]


class Constant(Oracle):
    """Says the same to everything."""

    def answers(self, examples):
        return [[" the" for _ in e.questions] for e in examples]

    def predictions(self, rows):
        return [np.full_like(row.targets, 256) for row in rows]


def text_of(example):
    """The context and the first question."""
    assert not isinstance(example, Row)
    return Bytes().decode([*example.context, *example.questions[0].tokens])
