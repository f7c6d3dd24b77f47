"""What a model says after contexts, and in the midst of rows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Example, Question, Row
from seqeff.inference import (
    CacheUse,
    Engine,
    Request,
    Sampling,
    generation_context,
    most_kept_by,
)
from seqeff.inference.engine import CHUNKS
from seqeff.inference.sampling import Settings
from seqeff.inference.slots import Chunk, Slots
from seqeff.inference.text import StoppedText
from seqeff.models import TransformerConfig, cached_parameters
from seqeff.models.caches import select_rows
from seqeff.models.flops import abstract_model, entries_of_tokens

_GREEDY = Sampling(temperature=0, top_k=None)
# of whole rows at a time
_ROWS = 4


class Reader(Protocol):
    """A model as the tasks see it."""

    def answers(self, examples: Sequence[Example]) -> list[list[str]]:
        """The continuation of each question of each example."""
        ...

    def predictions(self, rows: Sequence[Row]) -> list[Int[np.ndarray, " questions"]]:
        """The likeliest next token at the rows' places; the rows are equally long."""
        ...

    @property
    def use(self) -> CacheUse:
        """Of the caches, or of the rows' entries, by the latest call."""
        ...


class ModelReader:
    """A model that answers greedily.

    Contexts with one question go through the engine, many at a time. A context with several is
    read once, by itself, and its cache is then copied for as many questions as there are slots: so
    each further question costs its own tokens, and the memory is that of the engine's slots.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parameters: Any,
        tokenizer: Tokenizer,
        *,
        slots: int,
        context: int | None,
        kept: int | None = None,
    ) -> None:
        """
        Args:
          config: of the model, knowing its vocabulary.
          parameters: of the `Transformer`.
          slots, context, kept: see `Engine`.
        """
        self.use = CacheUse()
        self._config, self._given, self._tokenizer = config, parameters, tokenizer
        self._engine, self._single = (
            Engine(config, tokenizer, slots=count, context=context, kept=kept)
            for count in (slots, 1)
        )
        size, graph = tokenizer.vocabulary_size, nnx.split(abstract_model(config))[0]
        self._predict = jax.jit(functools.partial(_predict, graph, size))

    @classmethod
    def fitting(
        cls,
        config: TransformerConfig,
        parameters: Any,
        tokenizer: Tokenizer,
        groups: Sequence[Sequence[Example | Row]],
        slots: int,
    ) -> ModelReader:
        """With room for the longest of the prompts and its answer.

        Args:
          groups: examples that are asked for together.
          slots: at most; no more than a group, or a context's questions, can take.
        """
        together = max(map(len, groups), default=1)
        texts = [x for group in groups for x in group if isinstance(x, Example)]
        whole = [
            len(example.context) + len(question.tokens) + question.wanted
            for example in texts
            for question in example.questions
        ]
        together = max([together, *(len(example.questions) for example in texts)])
        return cls(
            config,
            parameters,
            tokenizer,
            slots=min(slots, together),
            context=generation_context(config, max(whole, default=1)),
            kept=most_kept_by(config, _requests(texts)),
        )

    def answers(self, examples: Sequence[Example]) -> list[list[str]]:
        """See `Reader`."""
        if any(len(example.questions) > 1 for example in examples):
            self.use = CacheUse()
            return [list(self._shared(example)) for example in examples]
        texts = [""] * len(examples)
        for piece in self._engine.stream(self._engine.prepare(self._given), _requests(examples)):
            texts[piece.request] += piece.text
        self.use = self._engine.use
        return [[text] for text in texts]

    def predictions(self, rows: Sequence[Row]) -> list[Int[np.ndarray, " questions"]]:
        """See `Reader`."""
        self.use = CacheUse()
        found: list[Int[np.ndarray, " questions"]] = []
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            # the last rows are repeated, so that nothing compiles anew
            whole = [part[min(index, len(part) - 1)] for index in range(_ROWS)]
            tokens, places = (np.stack(x) for x in list(zip(*whole, strict=True))[:2])
            best, read, most = jax.device_get(self._predict(self._given, tokens, places))
            found += list(best[: len(part)])
            self.use.add(tokens[: len(part)].size, read[: len(part)].sum(), most.max())
        return found

    @functools.cached_property
    def _parameters(self) -> Any:
        return jax.jit(functools.partial(cached_parameters, self._config))(self._given)

    def _shared(self, example: Example) -> Iterator[str]:
        """The continuations of the questions of one context."""
        slots, size = self._single.empty(), CHUNKS[-1]
        for first in range(0, len(example.context), size):
            part = example.context[first : first + size]
            chunk = _chunk([part], size, [0], begins=first == 0)
            slots, drawn = self._single.read(self._parameters, slots=slots, rows=None, chunk=chunk)
            self.use.add(len(part), drawn.read.sum(), drawn.resident.max())
        count = self._engine.slots
        for first in range(0, len(example.questions), count):
            part = example.questions[first : first + count]
            yield from self._continued(select_rows(slots, jnp.zeros(count, jnp.int32)), part)

    def _continued(self, slots: Slots, questions: Sequence[Question]) -> Iterator[str]:
        """The continuations of questions, each in a slot that holds the context."""
        none, unused = np.zeros(0, np.int32), self._engine.slots - len(questions)
        tokens = [*(question.tokens for question in questions), *[none] * unused]
        wanted = [*(question.wanted for question in questions), *[0] * unused]
        size = -(-max(map(len, tokens)) // CHUNKS[0]) * CHUNKS[0]
        chunk = _chunk(tokens, size, wanted, begins=False)
        slots, drawn = self._engine.read(self._parameters, slots=slots, rows=None, chunk=chunk)
        self.use.add(sum(map(len, tokens)), drawn.read.sum(), drawn.resident.max())
        calls = [jax.tree.map(lambda x: x[None], drawn)]
        for _ in range(1, max(wanted), self._engine.steps):
            slots, drawn = self._engine.decode(self._parameters, slots=slots, way="greedy")
            self.use.add(drawn.is_real.sum(), drawn.read.sum(), drawn.resident.max())
            calls.append(drawn)
        token, is_real = (
            np.concatenate(jax.device_get(x))
            for x in ([call.token for call in calls], [call.is_real for call in calls])
        )
        for row in range(len(questions)):
            text = StoppedText(self._tokenizer, ())
            own = token[is_real[:, row], row].tolist()
            pushed = [text.push(x) for x in own if x != self._tokenizer.end_of_text]
            yield "".join([*pushed, text.finish()])


def _requests(examples: Iterable[Example]) -> Iterator[Request]:
    for example in examples:
        for question in example.questions:
            prompt = np.concatenate([example.context, question.tokens]).tolist()
            yield Request(prompt=prompt, tokens=question.wanted, sampling=_GREEDY)


def _chunk(
    texts: Sequence[Int[np.ndarray, " tokens"]], size: int, wanted: Sequence[int], *, begins: bool
) -> Chunk:
    """Texts as rows of `size` tokens, padded."""
    tokens = np.stack([np.pad(text, (0, size - len(text))) for text in texts])
    return Chunk(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray([len(text) for text in texts], jnp.int32),
        jnp.full(len(texts), begins),
        jnp.asarray(wanted, jnp.int32),
        Settings.of([_GREEDY] * len(texts)),
    )


def _predict(
    graph: nnx.GraphDef,
    size: int,
    parameters: Any,
    tokens: Int[Array, "rows length"],
    places: Int[Array, "rows questions"],
) -> tuple[Array, Array, Array]:
    """The likeliest next token at the places, and each row's entries read, and most resident."""
    model = nnx.merge(graph, parameters)
    hidden = jnp.take_along_axis(model(tokens), places[:, :, None], axis=1)
    logits = model.logits(hidden)[..., :size]
    read, most = entries_of_tokens(model.config, tokens, None)
    return jnp.argmax(logits, axis=-1), read.sum(1), most.max(1)
