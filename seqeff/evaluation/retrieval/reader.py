"""What a model says after contexts, and in the midst of rows."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from seqeff.checks import UserError
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Example, Question, Row
from seqeff.inference import CacheUse, Engine, Request, Sampling, failures
from seqeff.models import TransformerConfig
from seqeff.models.flops import abstract_model, entries_of_tokens

_GREEDY = Sampling(temperature=0)
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
    """A model that answers greedily; a `UserError` where its output is not finite.

    Contexts with one question go through the engine, many at a time. A context with several is
    read once, by itself, and its questions begin with copies of its cache: so each costs its own
    tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parameters: Any,
        tokenizer: Tokenizer,
        groups: Sequence[Sequence[Example | Row]],
        slots: int,
    ) -> None:
        """
        Args:
          config: of the model, knowing its vocabulary.
          parameters: of the `Transformer`.
          groups: all examples, those together that are asked for together.
          slots: at most; no more than a group, or a context's questions, can take.
        """
        self.use = CacheUse()
        self._parameters = parameters
        texts = [x for group in groups for x in group if isinstance(x, Example)]
        together = [*map(len, groups), *(len(example.questions) for example in texts)]
        self._engine = Engine.for_requests(
            config, tokenizer, _requests(texts), slots=min(slots, max(together, default=1))
        )
        self._prepared = self._engine.prepare(parameters)
        size, graph = tokenizer.vocabulary_size, nnx.split(abstract_model(config))[0]
        self._predict = jax.jit(functools.partial(_predict, graph, size))

    def answers(self, examples: Sequence[Example]) -> list[list[str]]:
        """See `Reader`."""
        self.use = CacheUse()
        if all(len(example.questions) == 1 for example in examples):
            return [[text] for text in self._continuations(_requests(examples))]
        return [
            self._continuations(
                (_request(question.tokens, question) for question in example.questions),
                example.context.tolist(),
            )
            for example in examples
        ]

    def _continuations(self, requests: Iterable[Request], prefix: Sequence[int] = ()) -> list[str]:
        """The text that each request gives."""
        texts: dict[int, str] = collections.defaultdict(str)
        for piece in self._engine.stream(self._prepared, requests, prefix):
            texts[piece.request] += piece.text
        if told := failures(self._engine.ended):
            raise UserError(told)
        use = self._engine.use
        self.use.add(use.tokens, use.read, use.resident)
        return [texts[number] for number in sorted(texts)]

    def predictions(self, rows: Sequence[Row]) -> list[Int[np.ndarray, " questions"]]:
        """See `Reader`."""
        self.use = CacheUse()
        found: list[Int[np.ndarray, " questions"]] = []
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            # the last rows are repeated, so that nothing compiles anew
            whole = [part[min(index, len(part) - 1)] for index in range(_ROWS)]
            tokens, places = (np.stack(x) for x in list(zip(*whole, strict=True))[:2])
            best, read, most = jax.device_get(self._predict(self._parameters, tokens, places))
            found += list(best[: len(part)])
            self.use.add(tokens[: len(part)].size, read[: len(part)].sum(), most.max())
        return found


def _requests(examples: Iterable[Example]) -> Iterator[Request]:
    for example in examples:
        for question in example.questions:
            yield _request(np.concatenate([example.context, question.tokens]), question)


def _request(prompt: Int[np.ndarray, " tokens"], question: Question) -> Request:
    return Request(prompt=prompt.tolist(), tokens=question.wanted, sampling=_GREEDY)


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
