"""Corpora to tokens to batches."""

from seqeff.data.batch import Batch
from seqeff.data.batches import Batches, EvaluationBatches
from seqeff.data.build import Stores, build_store
from seqeff.data.builtin import BuiltinText
from seqeff.data.chat import ChatTemplate
from seqeff.data.data import (
    Data,
    PreparedData,
    fingerprint_without_documents,
    prepare,
    prepare_validation,
)
from seqeff.data.document import Document, Source
from seqeff.data.loader import Loader, place
from seqeff.data.sources import (
    HuggingFaceDataset,
    JsonlFiles,
    Mixture,
    NoText,
    ParquetFiles,
    TextFiles,
)
from seqeff.data.store import Manifest, TokenStore
from seqeff.data.token_bytes import ByteLengths
from seqeff.data.tokenizer import Tokenizer, TokenStream, Vocabulary
from seqeff.data.tokenizer_config import TokenizerConfig, TokenizerFile, TrainBPE

__all__ = [
    "Batch",
    "Batches",
    "BuiltinText",
    "ByteLengths",
    "ChatTemplate",
    "Data",
    "Document",
    "EvaluationBatches",
    "HuggingFaceDataset",
    "JsonlFiles",
    "Loader",
    "Manifest",
    "Mixture",
    "NoText",
    "ParquetFiles",
    "PreparedData",
    "Source",
    "Stores",
    "TextFiles",
    "TokenStore",
    "TokenStream",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerFile",
    "TrainBPE",
    "Vocabulary",
    "build_store",
    "fingerprint_without_documents",
    "place",
    "prepare",
    "prepare_validation",
]
