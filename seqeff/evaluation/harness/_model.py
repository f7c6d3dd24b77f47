"""A run's model as lm-evaluation-harness asks for it.

Needs that package, so it is no module that configs find classes in.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from seqeff.checks import UserError
from seqeff.data import ChatTemplate, Tokenizer
from seqeff.evaluation.harness.likelihood import Likelihoods, Pair, Score
from seqeff.inference import Engine, Request, Sampling, failures
from seqeff.models import TransformerConfig

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# settings of generation that change nothing at these values
_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
}
# tokens to generate where a task does not say; as in the `hf` backend
_TOKENS = 256


def check_generation(tasks: Mapping[str, Any], tokenizer: Tokenizer, context: int) -> None:
    """Refuses, before any work, tasks that ask the engine for what it does not have.

    Raises:
      UserError: names the task and the setting.
    """
    for name, task in tasks.items():
        settings = task.get_config("generation_kwargs")
        if settings and task.OUTPUT_TYPE == "generate_until":
            try:
                _request([tokenizer.begin_of_text], settings, tokenizer, context=context, seed=0)
            except UserError as error:
                raise UserError(f"--harness {name}: {error}") from error


def _request(
    prompt: Sequence[int],
    settings: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    context: int,
    seed: int,
) -> Request:
    """What a request for generation asks the engine for.

    Raises:
      UserError: it asks for what the engine does not have, or leaves no room for a prompt.
    """
    try:
        given = normalize_gen_kwargs(dict(settings), _TOKENS)
    except (TypeError, ValueError) as error:
        raise UserError(f"a task asks to generate with {dict(settings)}: {error}") from error
    stops = handle_stop_sequences(given.pop("until"), eos=tokenizer.end_of_text_name)
    tokens = given.pop("max_gen_toks")
    # a temperature is left above 0 only where a task says `do_sample`, or says neither
    given.pop("do_sample")
    sampling: dict[str, Any] = {"temperature": 0.0, "seed": seed}
    sampling |= {name: given.pop(name) for name in _SAMPLING if name in given}
    # as transformers writes that all may be drawn
    sampling["top_k"] = sampling.get("top_k") or None
    for name, value in given.items():
        if value is not None and (name not in _NEUTRAL or _NEUTRAL[name] != value):
            raise UserError(f"a task asks to generate with {name} = {value}, which is not here")
    if tokens >= context:
        raise UserError(
            f"a task generates up to {tokens} tokens, which leaves no room for a prompt in the "
            f"context of {context}; --context gives more"
        )
    return Request(prompt=prompt, tokens=tokens, sampling=Sampling(**sampling), stops=stops)


class HarnessModel(TemplateLM):
    """Answers the harness's requests as its own `hf` backend does for an exported model.

    Texts get the token before them that the tokenizer's own file adds, and nothing else; what is
    too long for the context loses its beginning. Unlike there, special tokens are read from no
    text but a chat template's, and ids that the tokenizer does not have are never drawn.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parameters: Any,
        tokenizer: Tokenizer,
        *,
        context: int,
        slots: int,
        seed: int = 0,
        chat: ChatTemplate | None = None,
    ) -> None:
        """
        Args:
          config: of the model, knowing its vocabulary.
          parameters: of the `Transformer`.
          context: tokens that a text has at most, and a prompt with its continuation.
          slots: rows that are scored, and requests that are continued, at a time.
          seed: of the first request that is drawn; each further one has the next.
          chat: makes the prompts of messages; special tokens are read from texts then.
        """
        super().__init__()
        self._config, self._parameters, self._tokens = config, parameters, tokenizer
        self._context, self._slots, self._seed, self._chat = context, slots, seed, chat
        self._likelihoods = Likelihoods(config, parameters, rows=slots, length=context)

    @property
    def eot_token_id(self) -> int:
        return self._tokens.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return self._tokens.named_begin

    @property
    def max_length(self) -> int:
        return self._context

    @property
    def max_gen_toks(self) -> int:
        return _TOKENS

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.fingerprint

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self._chat is None:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        try:
            return self._chat.render(chat_history, answers=add_generation_prompt)
        except UserError:
            # as in the `hf` backend: some templates take no system's message
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return self._chat.render(rest, answers=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        begin = self._tokens.begin_of_text
        if self._chat is None:
            ids, begun = self._tokens.encode(string), False
        else:
            ids = self._tokens.encode_marked(string)
            # by the template itself
            begun = ids[:1] == [begin] and add_special_tokens is None
        if self._tokens.begins_texts and add_special_tokens is not False and not begun:
            return [begin, *ids]
        return ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """The bar of `_loglikelihood_tokens` is enough."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return list(self._scores([Pair(*pair) for _, *pair in requests]))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[Pair] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._context, context_len=1
            )
            before = len(windows)
            windows += [Pair(*make_disjoint_window(window)) for window in found]
            counts.append(len(windows) - before)
        scores = iter(self._scores(windows))
        return [sum(next(scores).log_probability for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        if not requests:
            return []
        whole = [self._numbered(number, *x.args) for number, x in enumerate(requests)]
        self._tell_cut(len(x.prompt) + x.tokens > self._context for x in whole)
        made = [
            dataclasses.replace(x, prompt=x.prompt[-(self._context - x.tokens) :]) for x in whole
        ]
        # the longest first, so that the last to end are short
        order = sorted(range(len(made)), key=lambda n: (-len(made[n].prompt), n))
        ordered = [made[number] for number in order]
        engine = Engine.for_requests(
            self._config, self._tokens, made, slots=self._slots, context=self._context
        )
        tokens: list[list[int]] = [[] for _ in made]
        with _bar("generated", len(made)) as bar:
            for piece in engine.stream(engine.prepare(self._parameters), ordered):
                tokens[order[piece.request]] += piece.tokens
                bar.update(piece.reason is not None)
        if told := failures(engine.ended):
            print(f"seqeff: {told}", file=sys.stderr)
        return [
            postprocess_generated_text(self._tokens.decode(ids), list(request.stops), None)
            for ids, request in zip(tokens, made, strict=True)
        ]

    def _scores(self, pairs: Sequence[Pair]) -> list[Score]:
        longest = max((len(pair.continuation) for pair in pairs), default=0)
        if longest > self._context:
            raise UserError(
                f"a continuation has {longest} tokens, more than the context of {self._context}; "
                "--context gives more"
            )
        self._tell_cut(sum(map(len, pair)) > self._context + 1 for pair in pairs)
        with _bar("scored", len(pairs)) as bar:
            scores = self._likelihoods.scores(pairs, bar.update)
        if broken := sum(not math.isfinite(score.log_probability) for score in scores):
            print(
                f"seqeff: {broken:,} of {len(scores):,} scores are not finite: see to the run's "
                "losses, and try an earlier --checkpoint",
                file=sys.stderr,
            )
        return scores

    def _numbered(self, number: int, prompt: str, settings: Mapping[str, Any]) -> Request:
        ids = self.tok_encode(prompt) or [self.prefix_token_id]
        seed = (self._seed + number) % 2**32
        return _request(ids, settings, self._tokens, context=self._context, seed=seed)

    def _tell_cut(self, cut: Iterable[bool]) -> None:
        if count := sum(cut):
            print(
                f"seqeff: {count:,} texts are longer than the context of {self._context} and lose "
                "their beginnings; --context gives more",
                file=sys.stderr,
            )


def _bar(what: str, total: int) -> Any:
    return tqdm(total=total, desc=what, disable=None, dynamic_ncols=True)
