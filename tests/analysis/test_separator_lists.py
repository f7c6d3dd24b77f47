"""`seqeff info --separators`."""

import pytest
import tokenizers
from tiny_run import refused, seqeff


@pytest.fixture
def tokenizer(tmp_path):
    words = ["<|endoftext|>", "a", ".", ",", "b", "\n", ".\n\n"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(".|\n"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    return path


def test_the_lists_alone(tokenizer):
    result = seqeff("info", "--separators", tokenizer)
    assert result.status == 0, result.errors
    assert "7 tokens" in result.output
    assert "by the tokens' last character: 4 separators" in result.output
    assert repr(".\n\n") in result.output
    assert "preset" not in result.output


def test_a_tokenizer_without_separators(tmp_path):
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    result = seqeff("info", "--separators", tmp_path / "tokenizer.json")
    assert result.status == 0, result.errors
    assert "no token of the tokenizer ends with any of them" in result.output


def test_density_in_texts(tokenizer, tmp_path):
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts[0].write_text("ab.ab\n")
    texts[1].write_text("\ufeffa,a.")
    result = seqeff("info", "--separators", tokenizer, *texts)
    assert result.status == 0, result.errors
    assert "2 texts: 10 tokens" in result.output
    assert "40.00% of the tokens" in result.output
    assert "20.00%       2  '.'" in result.output
    assert "10.00%       3  ','" in result.output


def test_line_ends_count_as_they_are(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"ab\r\n")
    result = seqeff("info", "--separators", tokenizer, text)
    assert "4 tokens" in result.output
    assert "25.00%       5  '\\n'" in result.output


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read"),
        (lambda path: path.write_bytes(b"\xff\xfe\xff"), "as UTF-8 text"),
        (lambda path: path.write_text(""), "there is no text to count"),
    ],
)
def test_bad_texts_are_one_line(make, message, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    make(text)
    assert message in refused("info", "--separators", tokenizer, text)


def test_bad_tokenizers_are_one_line(tmp_path):
    assert "tokenizer" in refused("info", "--separators", tmp_path / "absent.json")
    assert "texts are for --separators TOKENIZER" in refused("info", tmp_path / "text.txt")
