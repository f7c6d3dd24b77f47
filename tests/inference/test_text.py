"""Text as it comes, and where it stops."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqeff.data import Tokenizer
from seqeff.inference.text import StoppedText


@pytest.fixture(scope="module")
def tokenizer(finished):
    return Tokenizer.load(finished / "tokenizer")


def pushed(tokenizer, text, stops):
    """The pieces of a text, token by token, and whether it stopped."""
    stopped = StoppedText(tokenizer, stops)
    pieces = [stopped.push(token) for token in tokenizer.encode(text)]
    return [*pieces, stopped.finish()], stopped.stopped


def test_text_comes_in_whole_characters(tokenizer):
    text = "a \u2603 and \u6f22\u5b57 in it"
    pieces, stopped = pushed(tokenizer, text, [])
    assert "".join(pieces) == text and not stopped
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)


def test_nothing_of_a_stop_string_is_told_early(tokenizer):
    pieces, stopped = pushed(tokenizer, "the cat sat on", ["at on"])
    assert "".join(pieces) == "the cat s" and stopped
    pieces, stopped = pushed(tokenizer, "the cat sat o", ["at on"])
    assert "".join(pieces) == "the cat sat o" and not stopped


def test_a_character_that_never_becomes_whole(tokenizer):
    stopped = StoppedText(tokenizer, [])
    first, *_ = tokenizer.encode("\u6f22")
    assert stopped.push(first) == ""
    assert stopped.finish() == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc ", max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
)
def test_it_ends_before_the_stop_string_that_is_whole_first(tokenizer, text, stops):
    pieces, stopped = pushed(tokenizer, text, stops)
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    _, place = min(found, default=(0, len(text)))
    assert "".join(pieces) == text[:place]
    assert stopped == bool(found)
