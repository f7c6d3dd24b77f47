"""`seqeff eval --streaming`: a model, StreamingLLM and SepLLM over the same texts, in one table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqeff.checks import UserError
from seqeff.data import Tokenizer
from seqeff.data.files import decode_utf8, read_bytes
from seqeff.evaluation.streaming import Book, Stream, StreamResult, read_in_rows, stream
from seqeff.models import (
    Attention,
    DenseAttention,
    Rotary,
    SeparatorAttention,
    TransformerConfig,
)

HEADER = (
    f"{'method':22}{'perplexity':>11}{'bits/byte':>10}{'tokens':>11}{'seconds':>9}{'tokens/s':>10}"
    f"{'entries read':>14}{'at most':>9}{'memory, MiB':>13}"
)


def read_books(tokenizer: Tokenizer, files: Sequence[Path]) -> list[Book]:
    """Texts as tokens.

    Raises:
      UserError: a file cannot be read, or is empty.
    """
    books = []
    for file in files:
        # as `TextFiles` reads them: line ends are the text's own
        text = decode_utf8(read_bytes(file), str(file))
        if not text:
            raise UserError(f"{file} is empty; leave it out")
        ids = [tokenizer.begin_of_text, *tokenizer.encode(text)]
        books.append(Book(file.name, np.asarray(ids, np.int32)))
    return books


def methods(config: TransformerConfig) -> dict[str, TransformerConfig]:
    """The model's own stream by its name, and with separators StreamingLLM of as many entries."""
    own = [a for a in config.attentions() if isinstance(a, SeparatorAttention)]
    if not any(attention.might_keep for attention in own):
        return {"StreamingLLM" if own else "own attention": config}
    streaming = {
        layer: without_separators(attention)
        if isinstance(attention, SeparatorAttention)
        else attention
        for layer, attention in enumerate(config.attentions())
    }
    # what is kept without separators is kept by interval
    name = "SepLLM" if any(attention.separator_ids for attention in own) else "FixLLM"
    return {
        "StreamingLLM": dataclasses.replace(config, layer_attention=streaming),
        name: config,
    }


def without_separators(attention: SeparatorAttention) -> SeparatorAttention:
    """StreamingLLM of as many entries: the window takes the separators' place."""
    window = attention.window + (attention.separators or 0)
    if attention.cache_entries is not None:
        window = attention.cache_entries - attention.initial_tokens
    return dataclasses.replace(
        attention,
        window=window,
        separators=None,
        separator_ids=(),
        characters="",
        preset=None,
        interval=None,
    )


def compare(
    config: TransformerConfig,
    streams: Mapping[str, Stream],
    parameters: Any,
    tokenizer: Tokenizer,
    books: Sequence[Book],
    *,
    length: int | None,
    carry: bool,
    state: Path | None,
) -> Iterator[tuple[str, Book, StreamResult]]:
    """Yields, method by method, each text's result.

    Args:
      config: of the model.
      streams: by their names.
      length: that the model was trained on, for the rows of the one without a stream; None:
        without those.
      carry: besides, streams go on from text to text.
      state: a folder that the streams are kept in.

    Raises:
      UserError: a stream that was kept cannot be read, or is another one.
    """
    if length is not None:
        sizes = tokenizer.byte_lengths()
        for book, result in read_in_rows(config, parameters, sizes, books, length):
            yield f"dense, rows of {length}", book, result
    for carried in (False, True) if carry else (False,):
        for name, reader in streams.items():
            method = f"{name}, carried" if carried else name
            file = re.sub(r"\W+", "-", method) + ".safetensors"
            kept = None if state is None else state / file
            for book, result in stream(reader, parameters, books, carry=carried, state=kept):
                yield method, book, result


def warning(config: TransformerConfig, longest: int, length: int) -> str:
    """What to fear of a text of `longest` tokens after training on `length`; "" if nothing."""
    farthest = max(_farthest(attention, longest) for attention in config.attentions())
    if farthest <= length or not isinstance(config.positions, Rotary):
        return ""
    if not config.positions.by_place:
        return (
            f"warning: texts go up to {longest:,} tokens, in training up to {length:,}, past whose "
            "number of segments perplexity rises"
        )
    trained = f"in training up to {length:,}, past which perplexity rises to hundreds"
    if farthest < longest:
        return f"warning: distances go up to {farthest:,}, {trained}; keep fewer entries"
    near = any(isinstance(attention, SeparatorAttention) for attention in config.attentions())
    remedy = "; --gin.SeparatorAttention.positions=compact keeps them near" if near else ""
    return f"warning: positions go up to {longest:,}, {trained}{remedy}"


def _farthest(attention: Attention, longest: int) -> int:
    """The largest distance to what is attended, as far as it is known."""
    if isinstance(attention, DenseAttention) and attention.window is None:
        return longest
    if not isinstance(attention, SeparatorAttention):
        return 0
    if not attention.initial_tokens and not attention.might_keep:
        return 0
    if attention.positions == "absolute":
        return longest
    entries = attention.cache_entries or (
        attention.initial_tokens + (attention.separators or 0) + attention.window
    )
    return min(entries, longest)


def line(method: str, result: StreamResult) -> str:
    """A row under `HEADER`."""
    found, speed = result.perplexity, result.perplexity.tokens / max(result.seconds, 1e-9)
    return (
        f"{method:22}{found.perplexity:11.2f}{found.bits_per_byte:10.4f}{found.tokens:11,}"
        f"{result.seconds:9.1f}{speed:10,.0f}{found.entries_read:14.1f}{found.resident:9,}"
        f"{result.device_bytes / 2**20:13,.1f}"
    )
