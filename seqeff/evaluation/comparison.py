"""`seqeff eval --streaming`: a model, StreamingLLM and SepLLM over the same texts, in one table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqeff.data import Tokenizer
from seqeff.evaluation.books import Book, StreamResult
from seqeff.evaluation.rows import read_in_rows
from seqeff.evaluation.streaming import Stream, stream
from seqeff.models import MeasuredAttention, NamedStream, Rotary, TransformerConfig

_BASELINE = "StreamingLLM"
HEADER = (
    f"{'method':22}{'perplexity':>11}{'bits/byte':>10}{'tokens':>11}{'seconds':>9}{'tokens/s':>10}"
    f"{'entries read':>14}{'at most':>9}{'memory, MiB':>13}"
)


def methods(config: TransformerConfig) -> dict[str, TransformerConfig]:
    """StreamingLLM of as many entries, then the model's own stream, by their names."""
    own = [a.stream_name for a in config.attentions() if isinstance(a, NamedStream)]
    if not own:
        return {"own attention": config}
    streaming = {
        layer: attention.as_streaming_llm() if isinstance(attention, NamedStream) else attention
        for layer, attention in enumerate(config.attentions())
    }
    name = next((name for name in own if name != _BASELINE), _BASELINE)
    return {_BASELINE: dataclasses.replace(config, layer_attention=streaming), name: config}


def compare(
    config: TransformerConfig,
    streams: Mapping[str, Stream],
    parameters: Any,
    tokenizer: Tokenizer,
    books: Sequence[Book],
    *,
    length: int | None,
    parts: int,
    carry: bool,
    state: Path | None,
) -> Iterator[tuple[str, Book, StreamResult]]:
    """Yields, method by method, each text's result.

    Args:
      config: of the model.
      streams: by their names.
      length: that the model was trained on, for the rows of the one without a stream; None:
        without those.
      parts: equal ones of each text, as the streams tell apart.
      carry: besides, streams go on from text to text.
      state: a folder that the streams are kept in.

    Raises:
      UserError: a stream that was kept cannot be read, or is another one.
    """
    if length is not None:
        sizes = tokenizer.byte_lengths()
        for book, result in read_in_rows(config, parameters, sizes, books, length, parts):
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
    layers = config.attentions()
    known = [x.farthest(longest) for x in layers if isinstance(x, MeasuredAttention)]
    farthest = max(known, default=0)
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
    near = {type(x).__name__ for x in layers if getattr(x, "positions", None) == "absolute"}
    remedy = "".join(f"; --gin.{name}.positions=compact keeps them near" for name in sorted(near))
    return f"warning: positions go up to {longest:,}, {trained}{remedy}"


def by_part(totals: Mapping[str, StreamResult]) -> Iterator[str]:
    """A table of the perplexities of equal parts of the texts, a column a method."""
    yield f"{'part of each text':22}" + "".join(f"{name:>{len(name) + 3}}" for name in totals)
    columns = [[part.perplexity for part in result.parts] for result in totals.values()]
    for index, row in enumerate(zip(*columns, strict=True)):
        first, last = (f"{100 * edge / len(columns[0]):.4g}" for edge in (index, index + 1))
        found = zip(totals, row, strict=True)
        text = "".join(f"{one:{len(name) + 3}.2f}" for name, one in found)
        yield f"{f'{first}-{last}%':22}" + text


def line(method: str, result: StreamResult) -> str:
    """A row under `HEADER`."""
    found, speed = result.perplexity, result.perplexity.tokens / max(result.seconds, 1e-9)
    return (
        f"{method:22}{found.perplexity:11.2f}{found.bits_per_byte:10.4f}{found.tokens:11,}"
        f"{result.seconds:9.1f}{speed:10,.0f}{found.entries_read:14.1f}{found.resident:9,}"
        f"{result.device_bytes / 2**20:13,.1f}"
    )
