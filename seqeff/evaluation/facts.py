"""What results of evaluation depend on, for their JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqeff.checks import flatten
from seqeff.data import Tokenizer


def model_facts(model: Any, tokenizer: Tokenizer) -> Mapping[str, Any]:
    """A model's config by dotted path, and the tokenizer's hash."""
    return {
        "model": {path: _plain(value) for path, value in flatten(model).items()},
        "tokenizer": tokenizer.fingerprint,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)
