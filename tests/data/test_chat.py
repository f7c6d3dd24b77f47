"""Chat templates: where they are found, what they give, and what they may not."""

import json
import sys

import pytest
from chat_templates import PLAIN, STRICT, turns
from hugging_face import END_OF_TEXT, write_tokenizer

from seqeff.checks import UserError
from seqeff.data import ChatTemplate, Tokenizer
from seqeff.data import chat as chat_module

pytest.importorskip("jinja2", reason="comes with the harness extra")


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def template(folder, text):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": text}))
    return ChatTemplate.load(folder)


def test_a_chat_becomes_a_text(folder):
    chat = template(folder, PLAIN)
    start, end = "<|im_start|>", "<|im_end|>\n"
    question = f"{start}user\nWho?{end}{start}assistant\n"
    assert chat.render(turns("Who?")) == question
    whole = chat.render(turns("Who?", "I.", "Why?", system="Be short."))
    assert whole.startswith(f"{start}system\nBe short.{end}{question[: -len('assistant') - 1]}")
    # the last message goes on
    assert chat.render(turns("Who?", "It is "), answers=False) == f"{question}It is "
    strict = template(folder, STRICT)
    assert strict.render(turns("Who? ")) == f"{END_OF_TEXT}[INST] Who? [/INST]"
    assert strict.render(turns("Who?", "It is "), answers=False).endswith("[/INST]It is")
    assert strict.sha256 != chat.sha256
    with pytest.raises(UserError, match="does not take messages of system, user: only users and"):
        strict.render(turns("Who?", system="Be short."))


def test_where_it_is_found(folder):
    with pytest.raises(UserError, match=rf"{folder} has no chat template, neither chat_temp"):
        ChatTemplate.load(folder)
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert template(folder, several).text == "b"
    with pytest.raises(UserError, match="has no chat template"):
        template(folder, several[:1])
    (folder / "chat_template.jinja").write_text("c{{ eos_token }}")
    assert ChatTemplate.load(folder).render(turns("")) == f"c{END_OF_TEXT}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for", r"tokenizer_config\.json: the chat template is not valid: unexpected"),
        ("{% generation %}", "the chat template is not valid"),
        (3, r"tokenizer_config\.json: the chat template is no text"),
        ([3], "the chat template is no text"),
    ],
)
def test_what_is_no_template(folder, text, message):
    with pytest.raises(UserError, match=message):
        template(folder, text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 }}",
    ],
)
def test_it_stays_in_its_sandbox(folder, text):
    chat = template(folder, text)
    try:
        assert chat.render(turns("a")) == ""
    except UserError as error:
        assert "the chat template does not take messages of user" in str(error)


def test_special_tokens_are_read_where_a_template_spells_them(folder):
    tokenizer = Tokenizer.load(folder)
    text = f"the{END_OF_TEXT}cat"
    ids = tokenizer.encode_marked(text)
    assert ids == [*tokenizer.encode("the"), tokenizer.end_of_text, *tokenizer.encode("cat")]
    assert tokenizer.end_of_text not in tokenizer.encode(text)


def test_jinja_is_asked_for(folder, monkeypatch):
    chat_module._compiled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("jinja2.__version__", "3.1.5")
        with pytest.raises(UserError, match=r"needs jinja2 3\.1\.6 or newer: pip install -U"):
            template(folder, PLAIN)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match="chat-template needs a package: pip install jinja2"):
        template(folder, PLAIN)
