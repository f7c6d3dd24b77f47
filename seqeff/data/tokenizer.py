"""Text to token ids and back, with the Hugging Face `tokenizers` library."""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from seqeff.checks import UserError
from seqeff.data.cache import canonical_json
from seqeff.data.files import decode_utf8, existing_file, nearest, read_bytes, read_object
from seqeff.data.token_bytes import ByteLengths, token_to_bytes

END_OF_TEXT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|im_end|>",
    "[EOS]",
)
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPECIAL, CHAT, GENERATION = (
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
COMPANIONS = (SETTINGS, SPECIAL, CHAT, GENERATION)
"""What may stand beside a `tokenizer.json`, and goes with it."""
# the library needs about 140 bytes of memory a character of a text
LONGEST_PIECE = 1 << 20
_BATCH_CHARACTERS = 1 << 21


class Vocabulary(Protocol):
    """What decoding needs to know of a `Tokenizer`."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def ends_of_text(self) -> tuple[int, ...]: ...

    def token_bytes(self, token: int) -> bytes: ...


class Tokenizer:
    """Text to token ids and back.

    Special tokens are never produced from text: a document that spells `<|endoftext|>` keeps its
    letters. No token is added at either end.

    Attributes:
      end_of_text: the id that ends a text.
      ends_of_text: those after which nothing more is drawn: that one, and what a model ends its
        answers with, by the `eos_token_id` of a `generation_config.json` beside the file.
      end_of_text_name: how the vocabulary spells it.
      begin_of_text: the id that opens every document of the token stream: the one that the
        `tokenizer.json` itself puts before a text (Llama), else `end_of_text`.
      named_begin: where the file puts nothing before a text, the id that a `tokenizer_config.json`
        beside it names `bos_token`, which a model may know all the same; else `begin_of_text`.
      begins_texts: whether the `tokenizer.json` itself puts `begin_of_text` before a text.
      fingerprint: SHA-256 of the tokenizer's canonical JSON and `end_of_text`.
    """

    end_of_text: int
    ends_of_text: tuple[int, ...]
    end_of_text_name: str
    begin_of_text: int
    named_begin: int
    begins_texts: bool
    fingerprint: str

    def __init__(self, inner: tokenizers.Tokenizer, end_of_text: str) -> None:
        inner = tokenizers.Tokenizer.from_str(inner.to_str())
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        self._inner = inner
        self.end_of_text_name = end_of_text
        self.end_of_text = _required_id(inner, end_of_text)
        self.ends_of_text = (self.end_of_text,)
        # what is added to nothing
        added = inner.encode("", add_special_tokens=True).ids
        self.begins_texts = len(added) == 1
        self.begin_of_text = added[0] if self.begins_texts else self.end_of_text
        self.named_begin = self.begin_of_text
        self._companions: dict[str, bytes] = {}
        self._settings: dict[str, Any] = json.loads(inner.to_str())
        identity = canonical_json([self._settings, self.end_of_text])
        self.fingerprint = hashlib.sha256(identity).hexdigest()

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return len(self._token_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.encode_batch([text])[0]

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are spelt, as a chat template writes it."""
        return self._marked.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, computed on all cores.

        Texts beyond a million characters are cut before a word at the end of a line. That changes
        nothing for byte-level tokenizers; one that marks the start of a text marks each piece.
        """
        counts, pieces = [], []
        for text in texts:
            cut = list(pieces_of(text, LONGEST_PIECE))
            counts.append(len(cut))
            pieces.extend(cut)
        encoded: list[list[int]] = []
        for group in _groups(pieces, _BATCH_CHARACTERS):
            batch = self._inner.encode_batch_fast(group, add_special_tokens=False)
            encoded.extend(encoding.ids for encoding in batch)
        if len(pieces) == len(texts):
            return encoded
        remaining = iter(encoded)
        return [
            list(itertools.chain.from_iterable(itertools.islice(remaining, count)))
            for count in counts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=True)

    def vocabulary(self) -> tuple[str, ...]:
        """The text of every id on its own; special tokens and unused ids are empty.

        Bytes that are not whole UTF-8 characters read as U+FFFD.
        """
        return tuple(token.decode("utf-8", errors="replace") for token in self._token_bytes)

    def byte_lengths(self) -> ByteLengths:
        """UTF-8 bytes that each id adds to a text."""
        inside = np.array([len(token) for token in self._token_bytes], np.int32)
        spaced = np.array([token.startswith(b" ") for token in self._token_bytes], np.int32)
        letter = self._inner.encode("a", add_special_tokens=False).ids
        marks = b"".join(map(self.token_bytes, letter)) == b" a"
        return ByteLengths(inside, inside - spaced if marks else inside, self.begin_of_text)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes, perhaps of a part of a character, that an id adds to a text."""
        return self._token_bytes[token]

    @property
    def document_ends(self) -> tuple[int, ...]:
        """What closes every document of the token stream; nothing where one id begins and ends."""
        return () if self.begin_of_text == self.end_of_text else (self.end_of_text,)

    def ends_among(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Those that can end a text: tokens that are added to the vocabulary, not parts of text."""
        added = self._inner.get_added_tokens_decoder()
        return tuple(index for index in ids if index in added)

    def save(self, directory: Path) -> None:
        """Writes `tokenizer.json` and its `COMPANIONS`, of which one names the end of text."""
        (directory / TOKENIZER).write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        for name, content in self._companions.items():
            (directory / name).write_bytes(content)
        file = directory / SETTINGS
        settings = dict(read_object(file)) if SETTINGS in self._companions else {}
        if _name(file, settings, "eos_token") != self.end_of_text_name:
            settings["eos_token"] = self.end_of_text_name
            file.write_text(json.dumps(settings), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, end_of_text: str | None = None) -> Tokenizer:
        """Reads a `tokenizer.json`, or a directory that holds one.

        The end of text is the token named here, else by `eos_token` of a `tokenizer_config.json`
        beside the file, else the first of the usual names that the vocabulary holds.

        Raises:
          UserError: no such file, not a tokenizer, no end of text, or a decoder whose tokens have
            no bytes of their own.
        """
        file = existing_file(path, "TokenizerFile.path")
        if file.is_dir():
            file = existing_file(file / TOKENIZER, "TokenizerFile.path")
        text = decode_utf8(read_bytes(file), str(file))
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower type
            raise UserError(f"{file} is not a tokenizer.json of `tokenizers`: {error}") from error
        beside = file.with_name(SETTINGS)
        settings = read_object(beside) if beside.is_file() else {}
        end = end_of_text or _name(beside, settings, "eos_token") or _usual_name(inner, file)
        tokenizer = cls(inner, end)
        begin = inner.token_to_id(_name(beside, settings, "bos_token") or "")
        if begin is not None and not tokenizer.begins_texts:
            tokenizer.named_begin = begin
        tokenizer.byte_lengths()
        found = (file.with_name(name) for name in COMPANIONS)
        tokenizer._companions = {x.name: read_bytes(x) for x in found if x.is_file()}
        if GENERATION in tokenizer._companions:
            listed = ends_listed(file.with_name(GENERATION)) or ()
            ends = (tokenizer.end_of_text, *tokenizer.ends_among(listed))
            tokenizer.ends_of_text = tuple(dict.fromkeys(ends))
        return tokenizer

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._inner.to_str())

    @functools.cached_property
    def _token_bytes(self) -> tuple[bytes, ...]:
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        added = self._inner.get_added_tokens_decoder()
        to_bytes = token_to_bytes(self._settings["decoder"])
        table = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            if index != self.end_of_text and not (index in added and added[index].special):
                table[index] = to_bytes(token)
        return tuple(table)


class TokenStream:
    """Text of ids that arrive one by one; holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this id completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(token)))

    def finish(self) -> str:
        """U+FFFD if the last character never became whole, else nothing."""
        return self._decoder.decode(b"", final=True)


def pieces_of(text: str, longest: int) -> Iterator[str]:
    """Cuts a text in pieces of at most `longest` characters whose concatenation is the text.

    A cut falls at the last line end before a word, else at the last space between words, both
    boundaries of byte-level pre-tokenization, else at the limit.
    """
    begin = 0
    while len(text) - begin > longest:
        end = begin + longest
        first = max(begin, end - _CUT_WITHIN)
        window = text[first : end + 1]
        cuts = list(_LINE_END.finditer(window)) or list(_WORD_END.finditer(window))
        end = first + cuts[-1].end() if cuts else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


_CUT_WITHIN = 4096
_LINE_END = re.compile(r"(?<=\S)\n(?=[^\W\d_])")
_WORD_END = re.compile(r"[^\W\d_](?= [^\W\d_])")


def _groups(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > characters:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _required_id(inner: tokenizers.Tokenizer, name: str) -> int:
    index = inner.token_to_id(name)
    if index is None:
        special = [token.content for token in inner.get_added_tokens_decoder().values()]
        raise UserError(
            f"end_of_text = {name!r} is no token of this tokenizer; its added tokens are "
            f"{', '.join(map(repr, special[:20])) or 'none'}{nearest(name, special)}"
        )
    return index


def ends_listed(file: Path) -> tuple[int, ...] | None:
    """The `eos_token_id` of a config, which is one id or several; None: it has none.

    Raises:
      UserError: it cannot be read, or is something else.
    """
    found = read_object(file).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    for end in ends:
        if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < 2**31:
            raise UserError(f"{file}: eos_token_id = {found!r} is neither an id nor a list of ids")
    return tuple(ends) or None


def token_name(value: Any) -> str | None:
    """A token as settings name it: by its text, or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _name(file: Path, settings: Mapping[str, Any], field: str) -> str | None:
    name = settings.get(field)
    name = name.get("content") if isinstance(name, dict) else name
    if not (name is None or isinstance(name, str)):
        raise UserError(f"{file}: {field} = {name!r} is no text; give that of the token")
    return name


def _usual_name(inner: tokenizers.Tokenizer, file: Path) -> str:
    for name in END_OF_TEXT_NAMES:
        if inner.token_to_id(name) is not None:
            return name
    raise UserError(
        f"{file} holds none of the usual end-of-text tokens ({', '.join(END_OF_TEXT_NAMES)}); "
        "name it with TokenizerFile.end_of_text"
    )
