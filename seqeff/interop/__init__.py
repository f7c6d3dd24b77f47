"""Models of other frameworks in and out: directories of Hugging Face `transformers`."""

from seqeff.interop.exports import export_model
from seqeff.interop.imports import HuggingFaceModel, open_model

__all__ = ["HuggingFaceModel", "export_model", "open_model"]
