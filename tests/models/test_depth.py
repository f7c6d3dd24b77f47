"""Compiling does not grow with depth."""

import time

import jax
import numpy as np
import pytest
from flax import nnx
from model_cases import ATTENTIONS, random_tokens, small_config

from seqeff.models import DenseAttention, FeedForward, HeadProjections, cross_entropy_sums
from seqeff.models.flops import abstract_model

TOKENS = random_tokens(2, 63)
WEIGHTS = np.ones(TOKENS.shape, np.float32)
MODELS = {
    "all layers alike": {"attention": DenseAttention()},
    "other ends": {
        "attention": ATTENTIONS["separator"],
        "layer_attention": {0: DenseAttention(), -1: DenseAttention()},
    },
}


def operations(text):
    return sum(" = " in line for line in text.splitlines())


def compile_gradient(layers, **attention):
    """Operations of what training compiles, and the processor's seconds from Python to the end."""
    config = small_config(
        layers=layers,
        projections=HeadProjections(heads=2, bias=False),
        feed_forward=FeedForward(hidden=48, activation="relu", bias=False),
        **attention,
    )
    graph, state = nnx.split(abstract_model(config))

    def loss(parameters):
        model = nnx.merge(graph, parameters)
        return cross_entropy_sums(model(TOKENS), model.head(), TOKENS, WEIGHTS)

    # the first model must not trace for the second
    jax.clear_caches()
    # of this process, which others disturb little
    begin = time.process_time()
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = gradient.lower(nnx.to_pure_dict(state)).compile()
    seconds = time.process_time() - begin
    return operations(compiled.as_text()), seconds


@pytest.mark.parametrize("attention", MODELS.values(), ids=MODELS.keys())
def test_a_deep_model_compiles_to_as_much_and_as_fast(attention):
    seconds = {12: float("inf"), 48: float("inf")}
    for _ in range(3):
        counts = {}
        for layers in seconds:
            counts[layers], spent = compile_gradient(layers, **attention)
            seconds[layers] = min(seconds[layers], spent)
        assert 500 < counts[12] == counts[48]
        if seconds[48] <= 1.5 * seconds[12]:
            return
    pytest.fail(f"seconds to compile, by layers: {seconds}")
