"""The files of a tokenizer: which are kept, and older kinds that are made to them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from seqeff.checks import UserError
from seqeff.data.tokenizer import COMPANIONS, SETTINGS, SPECIAL, TOKENIZER, token_name
from seqeff.interop.settings import Settings

_VOCABULARY, _MERGES = "vocab.json", "merges.txt"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what there is of a tokenizer."""
    for name in (TOKENIZER, *COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def tokenizer_settings(directory: Path) -> Mapping[str, Any]:
    """The values of the `tokenizer_config.json` of a directory; none without one."""
    file = directory / SETTINGS
    return Settings.load(file).values if file.is_file() else {}


@contextlib.contextmanager
def tokenizer_directory(directory: Path) -> Iterator[Path]:
    """A directory with the `tokenizer.json` of a model.

    It is the model's own, or a temporary one where that has only the vocabulary and the merges of
    a byte-level tokenizer (OPT, early GPT-2).

    Raises:
      UserError: there is no tokenizer, or its vocabulary and merges cannot be read.
    """
    if (directory / TOKENIZER).is_file():
        yield directory
        return
    if not all((directory / name).is_file() for name in (_VOCABULARY, _MERGES)):
        raise UserError(
            f"{directory} holds no {TOKENIZER}, nor {_VOCABULARY} with {_MERGES}; make the former "
            "with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    with tempfile.TemporaryDirectory() as made:
        copy_tokenizer(directory, Path(made))
        _byte_level(directory).save(str(Path(made) / TOKENIZER))
        yield Path(made)


def _byte_level(directory: Path) -> tokenizers.Tokenizer:
    files = (str(directory / name) for name in (_VOCABULARY, _MERGES))
    try:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    except Exception as error:  # the library raises no narrower type
        raise UserError(
            f"cannot read {_VOCABULARY} and {_MERGES} in {directory}: {error}"
        ) from error
    settings = tokenizer_settings(directory)
    file = directory / SPECIAL
    special = {**settings, **(Settings.load(file).values if file.is_file() else {})}
    names = [
        name
        for field, value in special.items()
        if field.endswith("_token") and (name := token_name(value)) is not None
    ]
    known = [name for name in dict.fromkeys(names) if inner.token_to_id(name) is not None]
    inner.add_special_tokens(known)
    prefix = settings.get("add_prefix_space") is True
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = tokenizers.decoders.ByteLevel()
    begin = token_name(special.get("bos_token"))
    if settings.get("add_bos_token") is True and begin in known:
        inner.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, inner.token_to_id(begin))]
        )
    return inner
