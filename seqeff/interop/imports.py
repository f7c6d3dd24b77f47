"""A Hugging Face directory as a run directory."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from seqeff.checks import ConfigError, UserError
from seqeff.data import Data, NoText, Tokenizer, TokenizerFile, fingerprint_without_documents
from seqeff.data.files import read_object
from seqeff.data.tokenizer import GENERATION, ends_listed
from seqeff.interop.families import FAMILIES
from seqeff.interop.family import Family
from seqeff.interop.settings import Settings
from seqeff.interop.tensors import Placement, nested, parameter_shapes, placements
from seqeff.interop.tokenizer_files import copy_tokenizer, tokenizer_directory
from seqeff.interop.variants import SETTING, read_fields
from seqeff.interop.weights import WeightFiles, open_weights, some
from seqeff.models import TransformerConfig
from seqeff.runs import Origin, RunDirectory, write_atomically
from seqeff.training import Train
from seqeff.training.checkpoints import Checkpoints, CheckpointStore

# vocabularies are padded by less
_MOST_PADDED = 0.9


class HuggingFaceModel:
    """A model of `transformers`, checked and not yet read; made by `open_model`.

    Attributes:
      config: the model.
      length: positions that it was made for.
      tokenizer: of it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        length: int,
        tokenizer: Tokenizer,
        ends: tuple[int, ...],
        tokenizer_directory: Path,
        weights: WeightFiles,
        placed: Mapping[str, Placement],
    ) -> None:
        """
        Args:
          ends: ids with which the model ends a text.
          tokenizer_directory: that the tokenizer was read from.
          placed: every tensor of the model, by its name among the weights.
        """
        self.config, self.length, self.tokenizer = config, length, tokenizer
        self._ends, self._tokenizer_directory = ends, tokenizer_directory
        self._weights, self._placed = weights, placed

    def train_config(self, run: RunDirectory) -> Train:
        """The config of the run that it becomes: without documents, and without steps to take."""
        return Train(
            model=self.config,
            data=Data(
                source=NoText(),
                tokenizer=TokenizerFile(path=str(run.tokenizer)),
                sequence_length=self.length,
                batch_size=1,
            ),
            steps=1,
        )

    def write(self, run: RunDirectory, origin: Origin) -> None:
        """Writes the run directory, whose lock the caller holds.

        Raises:
          UserError: the disk is full or read-only.
        """
        with run.writing():
            run.tokenizer.mkdir(exist_ok=True)
            copy_tokenizer(self._tokenizer_directory, run.tokenizer)
            if not {*self._ends} <= {*self.tokenizer.ends_of_text}:
                file = run.tokenizer / GENERATION
                settings = read_object(file) if file.is_file() else {}
                text = json.dumps({**settings, "eos_token_id": self._ends}, indent=2)
                write_atomically(file, text + "\n")
            fingerprint = fingerprint_without_documents(self.tokenizer)
            write_atomically(run.data, json.dumps(fingerprint, indent=2) + "\n")
        with CheckpointStore(run.checkpoints, Checkpoints()) as store:
            # of an import that was interrupted, maybe of another model
            store.discard_after(-1)
            store.save(0, {"parameters": nested(self._read())}, {"tokens": 0})
        run.begin(origin)

    def _read(self) -> dict[str, np.ndarray]:
        shapes = parameter_shapes(self.config)
        parameters = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
        for name, placement in self._placed.items():
            placement.write(parameters, self._weights.read(name))
        return parameters


@contextlib.contextmanager
def open_model(directory: Path) -> Iterator[HuggingFaceModel]:
    """A model, once all that can be wrong with it has been looked for. Touches no device.

    Raises:
      UserError: the directory cannot be read, its architecture is not known, a setting cannot be
        expressed, tensors are missing, superfluous or of another shape, or the tokenizer is not
        that of the model.
    """
    try:
        names = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise UserError(
            f"cannot read {directory}: {error.strerror}; give the directory of a model"
        ) from error
    if "config.json" not in names:
        raise UserError(f"{directory} holds no config.json; give the directory of a model")
    settings = Settings.load(directory / "config.json")
    family = _family(settings)
    config = _model(settings, family)
    length = settings.get(family.length, 2048)
    with tokenizer_directory(directory) as tokenizer_from:
        tokenizer = Tokenizer.load(tokenizer_from)
        if tokenizer.vocabulary_size > config.vocabulary_size:
            raise UserError(
                f"the tokenizer in {directory} has {tokenizer.vocabulary_size} tokens, the "
                f"vocab_size of config.json is {config.vocabulary_size}; give the tokenizer of "
                "this model"
            )
        config = config.for_vocabulary(tokenizer.vocabulary())
        ends = _ends(directory, tokenizer)
        if tokenizer.vocabulary_size < _MOST_PADDED * config.vocabulary_size:
            print(
                f"seqeff: the tokenizer has {tokenizer.vocabulary_size:,} of the model's "
                f"{config.vocabulary_size:,} tokens: see that it is the model's own",
                file=sys.stderr,
            )
        with open_weights(directory) as weights:
            placed = _placed(directory, family, config, weights)
            yield HuggingFaceModel(config, length, tokenizer, ends, tokenizer_from, weights, placed)


def _ends(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the model ends texts with, beside the end that its tokenizer names; tells of others.

    As for `transformers`, a `generation_config.json` comes before the `config.json`.
    """
    files = (directory / name for name in (GENERATION, "config.json"))
    found = (ends_listed(file) for file in files if file.is_file())
    listed = next((ends for ends in found if ends is not None), ())
    known = tokenizer.ends_among(listed)
    if others := [str(end) for end in listed if end not in known]:
        print(
            f"seqeff: the model in {directory} ends texts with {', '.join(others)}, no special "
            f"token of its tokenizer; here {tokenizer.end_of_text_name!r} does, as the tokenizer "
            "says",
            file=sys.stderr,
        )
    return known


def _family(settings: Settings) -> Family:
    named = settings.values.get("architectures")
    named = named[0] if isinstance(named, list) and named else named
    # the classes of a modelling file of ours are called after those of the family
    variant = SETTING in settings.values
    for family in FAMILIES:
        if named == family.architecture or (variant and str(named).endswith(family.architecture)):
            return family
    raise UserError(
        f"{settings.place}: the architecture {named!r} is not supported; supported are "
        + ", ".join(family.architecture for family in FAMILIES)
    )


def _model(settings: Settings, family: Family) -> TransformerConfig:
    fields = settings.part(SETTING)
    reasons = {"quantization_config": "quantized weights are not supported; give whole ones"}
    if fields is None:
        reasons["auto_map"] = "code that comes with a model is never run; give a model without"
    for name, reason in reasons.items():
        if settings.values.get(name):
            raise UserError(f"{settings.place} has {name}: {reason}")
    try:
        config = family.read(settings)
    except ConfigError as error:
        raise UserError(f"{settings.place}: {error}") from error
    return config if fields is None else read_fields(config, fields)


def _placed(
    directory: Path, family: Family, config: TransformerConfig, weights: WeightFiles
) -> dict[str, Placement]:
    """By its name among the weights, each tensor of the model.

    Raises:
      UserError: they do not match; names the tensors.
    """
    found: dict[str, Placement] = {}
    missing, differing = [], []
    for tensor in placements(family.tensors(config), parameter_shapes(config)):
        name = next(iter(_present(tensor.names, family, weights)), None)
        if name is None:
            missing.append(tensor.theirs)
            continue
        found[name] = tensor
        entry = weights.entries[name]
        if entry.shape != tensor.shape or not entry.is_float:
            wanted = f"floating-point numbers {list(tensor.shape)}"
            differing.append(f"{name} is {entry.type} {list(entry.shape)} instead of {wanted}")
    known = found.keys() | _copies_of_the_embedding(family, config, weights, found)
    surplus = [
        name
        for name in sorted(weights.entries.keys() - known)
        if not re.fullmatch(family.ignored, name)
    ]
    for what, names in (
        ("do not fit config.json", differing),
        ("lack tensors of the model", missing),
        ("hold tensors that the model has no place for", surplus),
    ):
        if names:
            raise UserError(f"the weights in {directory} {what}: {some(names)}")
    return found


def _present(names: tuple[str, ...], family: Family, weights: WeightFiles) -> list[str]:
    """Which of a tensor's names are there, with or without the family's prefix."""
    candidates = (*names, *(name.removeprefix(family.prefix) for name in names))
    return [name for name in dict.fromkeys(candidates) if name in weights.entries]


def _copies_of_the_embedding(
    family: Family,
    config: TransformerConfig,
    weights: WeightFiles,
    found: Mapping[str, Placement],
) -> set[str]:
    """Output heads that files hold although the model ties them to the embedding."""
    embedding = [name for name, tensor in found.items() if tensor.ours == ("embedding",)]
    heads = [
        name
        for tensor in family.tensors(config)
        if tensor.ours == ("output_head",) and config.tie_embeddings
        for name in _present((tensor.theirs, *tensor.aliases), family, weights)
    ]
    return {
        head
        for head in heads
        for name in embedding
        if weights.entries[head] == weights.entries[name]
        and np.array_equal(weights.read(head), weights.read(name))
    }
