from __future__ import annotations

import hashlib
import os
import subprocess
import sys

from seqeff.data.builtin import BuiltinText

_ELSEWHERE = """
import hashlib, sys
from seqeff.data.builtin import BuiltinText
texts = "\\0".join(document.text for document in BuiltinText().documents())
print(hashlib.sha256(texts.encode()).hexdigest())
print(BuiltinText().fingerprint()["sha256"])
print({"antigravity", "this", "turtle", "lib2to3", "pydoc_data.topics"} & set(sys.modules))
"""


def test_it_is_some_megabytes_of_distinct_english():
    texts = [document.text for document in BuiltinText().documents()]
    size = sum(len(text.encode()) for text in texts)
    assert 1.5e6 < size < 4e6
    assert len(set(texts)) == len(texts) > 400
    words = " ".join(texts).lower().split()
    assert words.count("the") / len(words) > 0.03
    assert any('The "if" statement is used for conditional execution' in text for text in texts)


def test_it_is_the_same_in_every_process_and_imports_nothing():
    process = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    texts = "\0".join(document.text for document in BuiltinText().documents())
    assert process.stdout.splitlines() == [
        hashlib.sha256(texts.encode()).hexdigest(),
        BuiltinText().fingerprint()["sha256"],
        "set()",
    ]
