"""Requests from a file of JSON lines, and their results in another."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqeff.checks import UserError
from seqeff.data import ChatTemplate, Tokenizer
from seqeff.data.files import decode_utf8, nearest, read_bytes
from seqeff.inference.requests import Piece, Request
from seqeff.inference.sampling import Sampling

_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
_FIELDS = ("prompt", "messages", "id", "tokens", "stop", *_SAMPLING)


class Named(NamedTuple):
    """A request and what its result is called: the line's `id`, or the line's number, from 1."""

    name: Any
    request: Request


def to_request(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Mapping[str, str]],
    defaults: Request,
    chat: ChatTemplate | None = None,
) -> Request:
    """The request of a prompt's text, which begins a document, or of a chat's messages.

    Args:
      prompt: a text, or messages with `role` and `content`.
      chat: makes a text what a user says, and the continuation the answer.

    Raises:
      UserError: the prompt is no valid text, or nothing that the template takes; there is none.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        "".join(text for message in messages for text in message.values()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid text: {error}") from error
    if chat is not None:
        ids = tokenizer.encode_marked(chat.render(messages))
        if not ids:
            raise UserError("the chat template makes no text of this")
    elif isinstance(prompt, str):
        ids = [tokenizer.begin_of_text, *tokenizer.encode(prompt)]
    else:
        raise UserError("messages need a chat template: give --apply-chat-template")
    return dataclasses.replace(defaults, prompt=ids)


def read_requests(
    path: str, tokenizer: Tokenizer, defaults: Request, chat: ChatTemplate | None = None
) -> list[Named]:
    """The requests of a file, a JSON object a line; `-` is the standard input.

    A line has `prompt`, or `messages` (objects of `role` and `content`), and perhaps `id`,
    `tokens`, `stop` (a text, or a list of them) and the fields of `Sampling`, each in place of the
    default. Empty lines are passed over.

    Args:
      chat: see `to_request`.

    Raises:
      UserError: a line is no such object, or has the id of an earlier one; names it. The file
        cannot be read, or has no line.
    """
    file = "the standard input" if path == "-" else path
    content = sys.stdin.buffer.read() if path == "-" else read_bytes(Path(path))
    found: list[Named] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(decode_utf8(content, file).split("\n"), 1):
        if line.strip():
            try:
                found.append(_named(line, number, tokenizer, defaults, chat))
            except UserError as error:
                raise UserError(f"{file}, line {number}: {error}") from error
            earlier = lines.setdefault(json.dumps(found[-1].name), number)
            if earlier != number:
                raise UserError(
                    f"{file}, lines {earlier} and {number}: both have the id {found[-1].name!r}, "
                    "which is a line's number where it gives none"
                )
    if not found:
        raise UserError(f"{file} has no prompts: give a line such as " + '{"prompt": "The "}')
    return found


def _named(
    line: str, number: int, tokenizer: Tokenizer, defaults: Request, chat: ChatTemplate | None
) -> Named:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"this is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError('this is no JSON object: give one such as {"prompt": "The "}')
    for name in fields:
        if name not in _FIELDS:
            raise UserError(f"there is no field {name!r}{nearest(name, _FIELDS)}")
    prompt, stops = _prompt(fields), fields.get("stop", defaults.stops)
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"stop is {stops!r}: give a text, or a list of texts")
    tokens = fields.get("tokens", defaults.tokens)
    if not isinstance(tokens, int) or isinstance(tokens, bool):
        raise UserError(f"tokens is {tokens!r}: give a whole number")
    given = {name: fields[name] for name in _SAMPLING if name in fields}
    sampling = dataclasses.replace(defaults.sampling, **given)
    request = dataclasses.replace(defaults, tokens=tokens, sampling=sampling, stops=tuple(stops))
    name = fields.get("id", number)
    try:
        json.dumps(name, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise UserError(f"id is {name!r}: give what JSON can hold") from error
    return Named(name, to_request(tokenizer, prompt, request, chat))


def _prompt(fields: Mapping[str, Any]) -> str | Sequence[Mapping[str, str]]:
    if "messages" not in fields:
        if "prompt" not in fields:
            raise UserError("this has neither prompt nor messages: give one of them")
        prompt = fields["prompt"]
        if not isinstance(prompt, str):
            raise UserError(f"prompt is {prompt!r}: give a text")
        return prompt
    if "prompt" in fields:
        raise UserError("this has both prompt and messages: give one of them")
    messages = fields["messages"]
    if not (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in messages
        )
    ):
        raise UserError(
            f"messages is {messages!r}: give a list of objects, each with the texts role and "
            "content"
        )
    return messages


def results(
    names: Sequence[Any],
    pieces: Iterable[Piece],
    *,
    log_probabilities: bool = False,
    told: Callable[[Piece], None] = lambda _: None,
) -> Iterator[Mapping[str, Any]]:
    """A JSON object for each request, in their order, as soon as it and those before it end.

    It has `id`, `text`, `tokens` (how many), `reason` (see `Piece`) and, where asked for,
    `token_ids` and `log_probabilities`.

    Args:
      told: called with every piece, as it comes.
    """
    begun: dict[int, list[Piece]] = {}
    ended: dict[int, list[Piece]] = {}
    following = 0
    for piece in pieces:
        told(piece)
        begun.setdefault(piece.request, []).append(piece)
        if piece.reason is not None:
            ended[piece.request] = begun.pop(piece.request)
        while following in ended:
            yield _result(names[following], ended.pop(following), log_probabilities)
            following += 1


def _result(name: Any, pieces: Sequence[Piece], log_probabilities: bool) -> Mapping[str, Any]:
    tokens = [token for piece in pieces for token in piece.tokens]
    result = {
        "id": name,
        "text": "".join(piece.text for piece in pieces),
        "tokens": len(tokens),
        "reason": pieces[-1].reason,
    }
    if log_probabilities:
        chances = [round(x, 5) for piece in pieces for x in piece.log_probabilities]
        result |= {"token_ids": tokens, "log_probabilities": chances}
    return result
