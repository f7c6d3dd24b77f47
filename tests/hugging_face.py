"""Directories of Hugging Face models, and runs that were made of them."""

import json
from pathlib import Path

import jax
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

from seqeff import config
from seqeff.data import Data, NoText, Tokenizer, TokenizerFile, fingerprint_without_documents
from seqeff.models.flops import abstract_model
from seqeff.runs import Origin, RunDirectory
from seqeff.training import Train
from seqeff.training.checkpoints import Checkpoints, CheckpointStore

VOCABULARY, LENGTH = 283, 48
END_OF_TEXT = "<|endoftext|>"


def write_tokenizer(folder, vocabulary=VOCABULARY - 20):
    """A byte-level tokenizer of so many tokens, as `transformers` saves them."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat sat on the mat, and the dog ran to the house."], trainer)
    assert inner.get_vocab_size() == vocabulary
    inner.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(file, values):
    file.write_text(json.dumps(values))


def change_settings(folder, **changes):
    """Changes values of a directory's `config.json`; `...` takes one away."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    write_json(folder / "config.json", {k: v for k, v in settings.items() if v is not ...})


def change_weights(folder, change):
    """Hands the tensors by name to a function that changes the dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_run(path, model):
    """A run directory of a model with random parameters."""
    run = RunDirectory(path)
    run.tokenizer.mkdir(parents=True)
    write_tokenizer(run.tokenizer)
    tokenizer = Tokenizer.load(run.tokenizer)
    run.data.write_text(json.dumps(fingerprint_without_documents(tokenizer)))
    data = Data(
        source=NoText(),
        tokenizer=TokenizerFile(path=str(run.tokenizer)),
        sequence_length=LENGTH,
        batch_size=1,
    )
    text = config.write(Train(model=model, data=data, steps=1))
    run.config.write_text(text)
    random = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.split(abstract_model(model))[1])
    parameters = jax.tree.map(
        lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), shapes
    )
    with CheckpointStore(run.checkpoints, Checkpoints()) as store:
        store.save(3, {"parameters": parameters}, {})
    run.begin(Origin(text, config.load(run.config).operative))
    return run


def model_of(path):
    """The model of a run directory, and its parameters."""
    run = RunDirectory(Path(path)).require()
    model = config.load(run.operative_config).root.model
    shapes = nnx.to_pure_dict(nnx.split(abstract_model(model))[1])
    with CheckpointStore(run.checkpoints) as store:
        state, _ = store.restore(None, {"parameters": shapes}, partial=True)
    return model, state["parameters"]


def logits_of(path, tokens):
    """Float32 logits of a run directory's model."""
    model, parameters = model_of(path)
    graph = nnx.split(abstract_model(model))[0]

    @jax.jit
    def logits(parameters, tokens):
        model = nnx.merge(graph, parameters)
        return model.logits(model(tokens))

    return np.asarray(logits(parameters, tokens))
