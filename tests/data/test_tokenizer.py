from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import seqeff.data.tokenizer
from seqeff.checks import ConfigError, UserError
from seqeff.data.tokenizer import Tokenizer, TokenStream, pieces_of
from seqeff.data.tokenizer_config import TokenizerFile, TrainBPE

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def stream(tokenizer, ids):
    decoder = TokenStream(tokenizer)
    return "".join([decoder.push(token) for token in ids] + [decoder.finish()])


@given(unicode_text)
def test_byte_level_tokens_add_up_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.byte_lengths().inside[ids].sum() == len(text.encode())
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.decode(ids) == text
    assert stream(tokenizer, ids) == text


def test_a_stream_holds_back_an_unfinished_character(tokenizer):
    ids = tokenizer.encode("🤖")
    assert len(ids) == 4
    decoder = TokenStream(tokenizer)
    assert [decoder.push(token) for token in ids] == ["", "", "", "🤖"]
    assert decoder.finish() == ""
    decoder.push(ids[0])
    assert decoder.finish() == "\ufffd"


def test_special_tokens_come_from_nowhere_and_weigh_nothing(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.byte_lengths().inside[tokenizer.end_of_text] == 0
    assert tokenizer.vocabulary()[tokenizer.end_of_text] == ""
    assert tokenizer.decode([tokenizer.end_of_text, *tokenizer.encode("a")]) == "a"


def beginning(tokenizer, name):
    """The same tokenizer, which puts a token before every text."""
    inner = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    inner.add_special_tokens([name])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, inner.token_to_id(name))]
    )
    return Tokenizer(inner, tokenizer.end_of_text_name)


def test_a_text_begins_as_the_tokenizer_says(tokenizer):
    assert tokenizer.begin_of_text == tokenizer.end_of_text
    assert tokenizer.document_ends == ()
    other = beginning(tokenizer, "<s>")
    assert other.begin_of_text == 300
    assert other.end_of_text == tokenizer.end_of_text
    assert other.document_ends == (tokenizer.end_of_text,)
    assert other.encode("a") == tokenizer.encode("a")
    assert other.byte_lengths().inside[300] == 0
    same = beginning(tokenizer, tokenizer.end_of_text_name)
    assert same.document_ends == ()


def test_the_vocabulary_is_the_text_of_each_id(tokenizer):
    vocabulary = tokenizer.vocabulary()
    assert len(vocabulary) == tokenizer.vocabulary_size == 300
    assert tokenizer.byte_lengths().inside.dtype == np.int32
    for index, text in enumerate(vocabulary):
        if index != tokenizer.end_of_text:
            assert tokenizer.decode([index]) == text
    assert " the" in vocabulary


def metaspace_tokenizer() -> tokenizers.Tokenizer:
    """As Llama's: metaspace, byte fallback, and a special token that is not the end of text."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "b", "é", "▁a"]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


@given(unicode_text)
def test_byte_fallback_and_metaspace_add_up_to_the_text(text):
    tokenizer = Tokenizer(metaspace_tokenizer(), "</s>")
    # the mark of these tokenizers stands for a space before the text
    marked = text and " " + text
    ids = tokenizer.encode(text)
    expected = marked.replace("▁", " ")
    assert stream(tokenizer, ids) == expected
    assert tokenizer.byte_lengths().inside[ids].sum() == len(expected.encode())
    lengths = tokenizer.byte_lengths()
    assert lengths.inside[[0, 1, 2]].tolist() == [0, 0, 0]
    sizes = [*lengths.first[ids[:1]], *lengths.inside[ids[1:]]]
    assert sum(sizes) == len(expected[1:].encode())
    assert lengths.begin == 2


def test_the_metaspace_decoder_is_read_too():
    inner = metaspace_tokenizer()
    inner.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(inner, "</s>")
    assert "".join(tokenizer.vocabulary()[i] for i in tokenizer.encode("a a")) == " a a"


def test_decoders_that_have_no_bytes_a_token_are_refused(tmp_path):
    inner = metaspace_tokenizer()
    inner.decoder = tokenizers.decoders.WordPiece()
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="decoder 'WordPiece' is not supported"):
        Tokenizer.load(tmp_path)


def test_what_stands_beside_a_file_goes_with_it(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for folder in (first, second, third):
        folder.mkdir()
    metaspace_tokenizer().save(str(first / "tokenizer.json"))
    beside = {
        "tokenizer_config.json": '{"eos_token": {"content": "</s>"}, "bos_token": "<s>", "x": 1}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"eos_token_id": 0}',
    }
    for name, content in beside.items():
        (first / name).write_text(content)
    Tokenizer.load(first).save(second)
    assert {name: (second / name).read_text() for name in beside} == beside
    kept = Tokenizer.load(second)
    assert (kept.end_of_text, kept.ends_of_text, kept.named_begin) == (2, (2, 0), 1)
    # another end of text stands in the settings too
    Tokenizer.load(first, end_of_text="<unk>").save(third)
    assert Tokenizer.load(third).ends_of_text == (0,)
    settings = json.loads((third / "tokenizer_config.json").read_text())
    assert settings == {"eos_token": "<unk>", "bos_token": "<s>", "x": 1}


def test_truncation_padding_and_templates_of_a_file_are_ignored(tmp_path, text):
    inner = metaspace_tokenizer()
    before = Tokenizer(inner, "</s>").encode(text)
    inner.enable_truncation(3)
    inner.enable_padding(length=1000)
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(text) == before


def test_training_twice_gives_the_same_tokenizer(tmp_path, text):
    config = TrainBPE(vocabulary_size=320)
    texts = [text, text[::-1], text.upper()] * 3
    built = [
        config.build(lambda: iter(texts), {"corpus": 1}, tmp_path / name) for name in ("one", "two")
    ]
    assert built[0].fingerprint == built[1].fingerprint
    assert built[0].vocabulary() == built[1].vocabulary()
    other = TrainBPE(vocabulary_size=319).build(
        lambda: iter(texts), {"corpus": 1}, tmp_path / "one"
    )
    assert other.vocabulary_size == 319
    assert other.fingerprint != built[0].fingerprint


def test_a_trained_tokenizer_is_kept_for_its_corpus(tmp_path, text):
    reads = []

    def texts():
        reads.append(1)
        return iter([text])

    config = TrainBPE(vocabulary_size=300)
    one = config.build(texts, {"corpus": 1}, tmp_path)
    again = config.build(texts, {"corpus": 1}, tmp_path)
    assert one.fingerprint == again.fingerprint
    assert len(reads) == 1
    config.build(texts, {"corpus": 2}, tmp_path)
    assert len(reads) == 2


def test_training_reads_only_the_beginning(text):
    short = TrainBPE(vocabulary_size=300, training_characters=len(text))
    assert short._train([text, "zqzqzq" * 100]).fingerprint == short._train([text]).fingerprint


def test_saving_and_loading_keeps_the_tokenizer_and_its_end_of_text(tmp_path, text):
    tokenizer = TrainBPE(vocabulary_size=300, end_of_text="[STOP]")._train([text])
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.end_of_text == tokenizer.end_of_text
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (
        TokenizerFile(path=str(tmp_path / "tokenizer.json"))
        .build(lambda: (), {}, tmp_path)
        .end_of_text_name
        == "[STOP]"
    )


@pytest.mark.parametrize(
    ("settings", "end_of_text", "expected"),
    [
        (None, None, "</s>"),
        (None, "<s>", "<s>"),
        ({"eos_token": "<s>"}, None, "<s>"),
        ({"eos_token": {"content": "<s>"}}, None, "<s>"),
        ({"eos_token": None}, None, "</s>"),
    ],
)
def test_the_end_of_text_is_found(tmp_path, settings, end_of_text, expected):
    metaspace_tokenizer().save(str(tmp_path / "tokenizer.json"))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path, end_of_text).end_of_text_name == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no JSON object; repair it, or take it away"),
        ('"a"', "holds no JSON object"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"eos_token": 3}', "eos_token = 3 is no text"),
        ('{"eos_token": {"content": []}}', r"eos_token = \[\] is no text"),
    ],
)
def test_settings_beside_it_that_cannot_be(tmp_path, content, message):
    metaspace_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/tokenizer_config\.json:? {message}"):
        Tokenizer.load(tmp_path)


def test_bad_tokenizers_are_one_clear_line(tmp_path):
    inner = metaspace_tokenizer()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "broken.json").write_text("{}")
    nameless = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    nameless.save(str(tmp_path / "nameless.json"))
    for path, end_of_text, message in [
        ("tokeniser.json", None, r"no such file; did you mean 'tokenizer\.json'"),
        ("broken.json", None, r"broken\.json is not a tokenizer\.json"),
        ("nameless.json", None, r"none of the usual end-of-text tokens .* TokenizerFile\.end_of"),
        ("tokenizer.json", "<eos>", r"end_of_text = '<eos>' is no token .*'</s>'"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            Tokenizer.load(tmp_path / path, end_of_text)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"TrainBPE\.vocabulary_size = 256"):
        TrainBPE(vocabulary_size=256)


@given(st.text("ab \n.é", max_size=300), st.integers(1, 40))
def test_pieces_concatenate_to_the_text(text, longest):
    pieces = list(pieces_of(text, longest))
    assert "".join(pieces) == text
    assert all(len(piece) <= longest for piece in pieces)


def test_long_texts_are_encoded_in_pieces_without_a_trace(tokenizer, text, monkeypatch):
    texts = [text * 20, "", text]
    whole = tokenizer.encode_batch(texts)
    encoded = []
    encode = tokenizer._inner.encode_batch_fast
    monkeypatch.setattr(seqeff.data.tokenizer, "LONGEST_PIECE", 200)
    monkeypatch.setattr(seqeff.data.tokenizer, "_BATCH_CHARACTERS", 500)

    class Recorder:
        def encode_batch_fast(self, group, **arguments):
            encoded.append(group)
            return encode(group, **arguments)

    monkeypatch.setattr(tokenizer, "_inner", Recorder())
    assert tokenizer.encode_batch(texts) == whole
    assert len(encoded) > 5
    assert max(len(piece) for group in encoded for piece in group) <= 200
