"""Continuous batching: requests take a fixed number of slots in turn."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np

from seqeff.checks import require
from seqeff.data import Vocabulary
from seqeff.inference import slots as device
from seqeff.inference.requests import Occupant, Piece, Reason, Request, check_ids, check_room
from seqeff.inference.sampling import WAYS, Sampling, Settings, Way
from seqeff.models import TransformerConfig, cached_parameters, most_kept
from seqeff.models.caches import kind_of

# tokens of a prompt that are taken at a time: each count compiles once
CHUNKS = (64, 512)
# calls of the device that are under way while the host reads what earlier ones gave
_AHEAD = 2
# prompts that are read at a time: as many rows are computed for fewer
PROMPT_ROWS = 8
# what tokens and kept entries of a cache are at least, and tokens a multiple of: each compiles
_ROUNDED = 256
# a single row's product with a matrix is computed there by elements, in memory, and then added up
_LEAST_ROWS = {"gpu": 2}


@dataclasses.dataclass
class CacheUse:
    """Of the caches, by the prompts' tokens and those drawn that were taken in.

    Attributes:
      tokens: that many.
      read: entries that they attended in a layer, themselves included, in the mean over the layers.
      resident: most entries of a row that a layer held.
    """

    tokens: int = 0
    read: float = 0.0
    resident: int = 0

    def add(self, tokens: Any, read: Any, resident: Any) -> None:
        """Counts further tokens; numbers, or arrays of one."""
        self.tokens, self.read = self.tokens + int(tokens), self.read + float(read)
        self.resident = max(self.resident, int(resident))


class Engine:
    """Continues prompts, as many at a time as it has slots.

    A request takes a slot as soon as one is free. Prompts go into the caches in chunks, between
    the steps of the rows that decode, so where caches are of constant size a prompt of any length
    takes the memory of a chunk. Nothing compiles anew for other lengths, nor for other settings but
    once for each `Sampling.way`. The device never waits for the host, which reads the tokens of a
    call while later ones run; tokens that a request turns out not to need are dropped. What a
    request gives does not depend on the others, to the last bit: the shapes of all that it is
    computed in follow from the engine and its own prompt alone.

    Attributes:
      use: of the caches, by the latest stream.
      ended: its requests that have, by the reason; see `failures`.
      rows: of the caches; those past the slots stay empty.
      vocabulary_size: of the model, whose ids are below it.
      prepare: from the parameters of the `Transformer` to those of a stream.
      empty, read, decode: the programs of `slots.py`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        tokenizer: Vocabulary,
        *,
        slots: int = 1,
        context: int | None = None,
        kept: int | None = None,
        steps: int = 8,
        chunks: Sequence[int] = CHUNKS,
        prompt_rows: int = PROMPT_ROWS,
    ) -> None:
        """
        Args:
          config: of the model, knowing its vocabulary.
          slots: requests at a time.
          context: tokens that prompt and continuation may have together; None: any number, for
            models whose caches do not grow.
          kept: see `empty_cache`.
          steps: of decoding that one call of the device makes.
          chunks: tokens of a prompt that are taken at a time, ascending: the first of them that
            holds what is left.
          prompt_rows: prompts that are read at a time, at most; as many rows are computed for
            fewer.
        """
        require(slots >= 1, f"Engine.slots = {slots} must be at least 1")
        require(steps >= 1, f"Engine.steps = {steps} must be at least 1")
        require(prompt_rows >= 1, f"Engine.prompt_rows = {prompt_rows} must be at least 1")
        require(
            context is not None or generation_context(config, 1) is None,
            "Engine.context = None is for models whose caches do not grow: give the tokens that a "
            "prompt and its continuation may have together",
        )
        self.context, self.slots, self.steps, self.use = context, slots, steps, CacheUse()
        self.vocabulary_size = config.vocabulary_size
        self.ended: collections.Counter[Reason] = collections.Counter()
        self.rows = max(slots, _LEAST_ROWS.get(jax.default_backend(), 1))
        self.tokenizer, self.chunks, self.prompt_rows = tokenizer, chunks, prompt_rows
        ends, size = tokenizer.ends_of_text, tokenizer.vocabulary_size
        self.prepare = jax.jit(functools.partial(cached_parameters, config))
        self.empty = jax.jit(
            functools.partial(device.empty_slots, config, size, context=context or 1, kept=kept),
            static_argnames="count",
        )
        self.read = jax.jit(
            functools.partial(device.read_prompts, config, ends),
            static_argnames="way",
            donate_argnames="slots",
        )
        self.decode = jax.jit(
            functools.partial(device.decode, config, ends, steps),
            static_argnames="way",
            donate_argnames="slots",
        )

    @classmethod
    def for_requests(
        cls,
        config: TransformerConfig,
        tokenizer: Vocabulary,
        requests: Iterable[Request],
        *,
        slots: int,
        context: int | None = None,
    ) -> Self:
        """An engine with as much room as some requests take, and no more slots than there are.

        Args:
          requests: all that it is for, each with what a `prefix` puts before its prompt.
          slots: requests at a time, at most.
          context: tokens that prompt and continuation may have together, at most; None: as many as
            they ask for.
        """
        count, longest, kept = 0, 1, 1
        # once through, as each may be as long as a context
        for request in requests:
            count, kept = count + 1, max(kept, _kept(config, request))
            longest = max(longest, len(request.prompt) + request.tokens)
        limits = (-(-longest // _ROUNDED) * _ROUNDED, context, config.positions.limit)
        room = min(limit for limit in limits if limit is not None)
        return cls(
            config,
            tokenizer,
            slots=max(min(slots, count), 1),
            context=generation_context(config, room),
            kept=_of_few(kept),
        )

    def stream(
        self, parameters: Any, requests: Iterable[Request], prefix: Sequence[int] = ()
    ) -> Iterator[Piece]:
        """Yields what requests give, as it comes; each request is taken when a slot is free.

        Args:
          parameters: those that `prepare` gives.
          prefix: tokens that stand before every prompt. They are read once, and each request begins
            with a copy of their cache.

        Raises:
          UserError: see `check_ids` and `check_room`.
        """
        self.use, context, start = CacheUse(), self.context, None
        self.ended.clear()
        if len(prefix):
            # what would be drawn after it is no part of the prompts
            request = Request(prompt=prefix, tokens=1)
            read = _Run(self, parameters, [request], 1, 1, context, draws=False)
            while read.advance():
                pass
            collections.deque(read.finished_calls(0), maxlen=0)
            start, context = read.slots, context and context - len(prefix)
        run = _Run(self, parameters, requests, self.slots, self.rows, context, start)
        while run.advance():
            yield from run.finished_calls(_AHEAD)
        yield from run.finished_calls(0)


def generation_context(config: TransformerConfig, length: int) -> int | None:
    """Tokens that prompt and continuation may have: `length`, or None where memory is constant."""
    grows = any(kind_of(attention).grows for attention in config.attentions())
    return length if grows or config.positions.limit is not None else None


def most_kept_by(config: TransformerConfig, requests: Iterable[Request]) -> int:
    """Entries that growing caches of chosen tokens need for any of the requests: `Engine.kept`.

    One of few numbers, as for each the programs compile.
    """
    return _of_few(max((_kept(config, request) for request in requests), default=1))


def _kept(config: TransformerConfig, request: Request) -> int:
    # a few lengths, for each of which it compiles
    padding = -len(request.prompt) % CHUNKS[-1]
    prompt = np.pad(np.asarray(request.prompt, np.int32), (0, padding), "edge")
    return most_kept(config, jnp.asarray(prompt[None]), request.tokens)


def _of_few(kept: int) -> int:
    return max(_ROUNDED, 1 << (kept - 1).bit_length())


class _Call(NamedTuple):
    """A call of the device that the host has not read: who occupied the slots of its rows."""

    drawn: device.Drawn
    occupants: tuple[Occupant | None, ...]
    taken: int | None  # tokens of prompts; None: it decodes


class _Run:
    """The calls that a stream of requests takes.

    Attributes:
      slots: after the latest of them.
    """

    def __init__(
        self,
        engine: Engine,
        parameters: Any,
        requests: Iterable[Request],
        count: int,
        rows: int,
        context: int | None,
        start: device.Slots | None = None,
        draws: bool = True,
    ) -> None:
        """
        Args:
          parameters: of the `CachedTransformer`.
          count: of slots.
          rows: of the caches.
          context: tokens that a prompt and its continuation may have; None: any number.
          start: see `slots.read_prompts`.
          draws: whether prompts are continued.
        """
        self._engine, self._parameters = engine, parameters
        self._requests, self._context, self._start = enumerate(requests), context, start
        self._draws = draws
        self._count, self.slots = count, engine.empty(count=rows)
        self._occupants: list[Occupant | None] = [None] * rows
        self._calls: collections.deque[_Call] = collections.deque()
        self._has_read = False  # by the latest call

    def advance(self) -> bool:
        """Starts the next call; whether there was one to start."""
        self._admit()
        reads = sum(x is not None and x.reads for x in self._occupants)
        decodes = sum(x is not None and x.decodes for x in self._occupants)
        # in turn, so that neither waits long for the other, once most have something to decode
        self._has_read = reads > 0 and not (self._has_read and decodes >= reads)
        if self._has_read:
            self._read()
        elif decodes:
            self._decode()
        return self._has_read or decodes > 0

    def finished_calls(self, ahead: int) -> Iterator[Piece]:
        """Pieces of the calls so far but for the latest `ahead`, which are not waited for."""
        while len(self._calls) > ahead:
            call = self._calls.popleft()
            found = jax.device_get(call.drawn)
            # a call that reads prompts has one step
            steps = device.Drawn(*(x.reshape(-1, len(call.occupants)) for x in found))
            self._engine.use.add(
                steps.is_real.sum() if call.taken is None else call.taken,
                steps.read.sum(),
                steps.resident.max(),
            )
            for row, occupant in enumerate(call.occupants):
                if occupant is None:
                    continue
                real = steps.is_real[:, row]
                drawn = (x[:, row][real].tolist() for x in (steps.token, steps.log_probability))
                piece = occupant.take(zip(*drawn, strict=True))
                if piece is not None:
                    if piece.reason is not None:
                        self._engine.ended[piece.reason] += 1
                    yield piece

    def _admit(self) -> None:
        """Gives the free slots to the next requests."""
        for slot, occupant in enumerate(self._occupants[: self._count]):
            if occupant is not None and (occupant.reads or occupant.decodes):
                continue
            self._occupants[slot] = None
            for number, request in itertools.islice(self._requests, 1):
                check_ids(request, self._engine.vocabulary_size)
                check_room(request, self._context)
                room = request.tokens
                if self._context is not None:
                    room = min(room, self._context - len(request.prompt))
                self._occupants[slot] = Occupant(number, request, room, self._engine.tokenizer)

    def _read(self) -> None:
        """Takes a chunk of the prompt that waits longest, and of others with a chunk of that size.

        As many rows as ever, of which some may have nothing to read.
        """
        occupants = self._occupants
        waiting = [(x.number, slot, x) for slot, x in enumerate(occupants) if x and x.reads]
        sizes = {slot: self._next_chunk(x) for _, slot, x in sorted(waiting)}
        size = next(iter(sizes.values()))
        count = min(self._engine.prompt_rows, self._count)
        chosen = [slot for slot in sizes if sizes[slot] == size][:count]
        rest = [slot for slot in range(len(occupants)) if slot not in chosen]
        rows = sorted([*chosen, *rest][:count])
        reading = [occupants[slot] if slot in chosen else None for slot in rows]

        tokens: Any = np.zeros((len(reading), size), np.int32)
        counts, wanted = (cast(Any, np.zeros(len(reading), np.int32)) for _ in range(2))
        begins: Any = np.zeros(len(reading), bool)
        for row, occupant in enumerate(reading):
            if occupant is None:
                continue
            part = occupant.request.prompt[occupant.read : occupant.read + size]
            tokens[row, : len(part)], counts[row] = part, len(part)
            begins[row] = occupant.read == 0
            occupant.read += len(part)
            if not occupant.reads:
                wanted[row], occupant.scheduled = occupant.wanted if self._draws else 0, 1
        settings = Settings.of([Sampling() if x is None else x.request.sampling for x in reading])
        chunk = device.Chunk(tokens, counts, begins, wanted, settings)
        self.slots, drawn = self._engine.read(
            self._parameters,
            slots=self.slots,
            rows=np.asarray(rows) if count < len(occupants) else None,
            chunk=chunk,
            way=_way(reading),
            start=self._start,
        )
        self._calls.append(_Call(drawn, tuple(reading), int(counts.sum())))

    def _next_chunk(self, occupant: Occupant) -> int:
        """Of what size it is: the smallest that holds the rest of the prompt, or the largest."""
        rest, chunks = len(occupant.request.prompt) - occupant.read, self._engine.chunks
        return next((chunk for chunk in chunks if rest <= chunk), chunks[-1])

    def _decode(self) -> None:
        decoding = tuple(None if x is None or x.reads else x for x in self._occupants)
        for occupant in decoding:
            if occupant is not None:
                occupant.scheduled += self._engine.steps
        self.slots, drawn = self._engine.decode(
            self._parameters, slots=self.slots, way=_way(decoding)
        )
        self._calls.append(_Call(drawn, decoding, None))


def _way(occupants: Iterable[Occupant | None]) -> Way:
    """The simplest that suits the requests of all of them."""
    ways: set[Way] = {x.request.sampling.way for x in occupants if x is not None}
    return max(ways, key=WAYS.index)
