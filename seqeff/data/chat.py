"""Chat templates, which make a prompt of messages as a model was trained to read them."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from seqeff.checks import UserError
from seqeff.data.files import decode_utf8, read_bytes, read_object
from seqeff.data.tokenizer import CHAT, SETTINGS, SPECIAL, token_name

# stands at the end of a message that is to go on, until what the template puts there is cut off
_END = "CONTINUE_FINAL_MESSAGE_TAG "
# earlier ones are known not to keep a template in its sandbox
_JINJA = (3, 1, 6)


class ChatTemplate(NamedTuple):
    """A template and the tokens that it names, as `transformers` keeps them beside a tokenizer.

    Templates are anyone's, and run in Jinja's sandbox, where they reach nothing but the messages.

    Attributes:
      text: of the template, in Jinja's language.
      tokens: the spelling of `bos_token`, `eos_token` and such.
    """

    text: str
    tokens: Mapping[str, str]

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate:
        """That of a tokenizer's directory: its `chat_template.jinja`, or one of its settings.

        Raises:
          UserError: there is none, or several of which none is called default, or no valid one;
            Jinja is absent.
        """
        beside = directory / SETTINGS
        settings: dict[str, Any] = {}
        for kept in (directory / SPECIAL, beside):
            settings |= read_object(kept) if kept.is_file() else {}
        file = directory / CHAT
        if file.is_file():
            text: Any = decode_utf8(read_bytes(file), str(file))
        else:
            file, text = beside, settings.get("chat_template")
        if isinstance(text, list) and all(isinstance(one, dict) for one in text):
            text = {one.get("name"): one.get("template") for one in text}.get("default")
        if text is None:
            raise UserError(
                f"{directory} has no chat template, neither {CHAT} nor chat_template in "
                f"{SETTINGS}; leave --apply-chat-template out for a model without one"
            )
        if not isinstance(text, str):
            raise UserError(f"{file}: the chat template is no text")
        found = {name: token_name(x) for name, x in settings.items() if name.endswith("_token")}
        made = cls(text, {name: x for name, x in found.items() if x is not None})
        try:
            _compiled(text)
        except Exception as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file}: the chat template is not valid: {error}") from error
        return made

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, str]], *, answers: bool = True) -> str:
        """The text of a chat; special tokens in it are spelt.

        Args:
          messages: with `role` and `content`.
          answers: whether an answer begins after the last message; else that one goes on.

        Raises:
          UserError: the template does not take these messages.
        """
        messages = [dict(message) for message in messages]
        last = messages[-1]["content"]
        if not answers:
            messages[-1]["content"] = last + _END
        try:
            text = _compiled(self.text).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=answers,
                **self.tokens,
            )
        # a template raises what it likes
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise UserError(
                f"the chat template does not take messages of {roles}: {error}"
            ) from error
        if answers:
            return text
        if last.strip() not in text or _END.strip() not in text:
            raise UserError("the chat template leaves out the message that is to go on")
        place = text.rindex(_END.strip())
        kept = text[place : place + len(_END)] == _END
        return text[:place] if kept else text[:place].rstrip()


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    """The template with what `transformers` offers to one."""
    try:
        import jinja2  # pyright: ignore[reportMissingImports]
        import jinja2.ext  # pyright: ignore[reportMissingImports]
        import jinja2.sandbox  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError("--apply-chat-template needs a package: pip install jinja2") from error
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)))[:3] < _JINJA:
        wanted = ".".join(map(str, _JINJA))
        raise UserError(
            f"--apply-chat-template needs jinja2 {wanted} or newer: pip install -U jinja2"
        )

    class Generation(jinja2.ext.Extension):
        """What answers are enclosed in, for training on them; it changes no text."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        # Jinja's own is for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)
