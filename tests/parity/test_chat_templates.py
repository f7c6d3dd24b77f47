"""Chat templates: the text that transformers makes of the same messages."""

import json

import pytest
from chat_templates import TEMPLATES, turns
from hugging_face import write_tokenizer

from seqeff.data import ChatTemplate, Tokenizer

pytestmark = pytest.mark.parity
CHATS = {
    "question": turns("Who?"),
    "answered": turns(" Who? ", "It is\nme. ", "Why?"),
    "system": turns("Whó?", system="Be short."),
    "going on": turns("Who?", " It is "),
    "passed over": turns("Who?", "skip", "Why?", "As"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_tokens(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "chat_template": TEMPLATES[name]}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat, tokenizer = ChatTemplate.load(tmp_path), Tokenizer.load(tmp_path)
    for kind, messages in CHATS.items():
        if (name, kind) == ("strict", "system"):
            continue
        answers = messages[-1]["role"] == "user"
        text = theirs.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=answers,
            continue_final_message=not answers,
        )
        assert chat.render(messages, answers=answers) == text
        assert tokenizer.encode_marked(text) == theirs.encode(text, add_special_tokens=False)
