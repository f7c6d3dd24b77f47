"""Compiling does not grow with depth."""

import time

import jax
import pytest
from flax import nnx
from model_cases import ATTENTIONS, quick_jit, random_tokens, small_config

from seqeff.models import DenseAttention, FeedForward, HeadProjections
from seqeff.models.flops import abstract_model

TOKENS = random_tokens(2, 63)


def lower(layers, ends_differ, function_of):
    """What `function_of` makes of a model's loss, lowered."""
    config = small_config(
        layers=layers,
        projections=HeadProjections(heads=2, bias=False),
        feed_forward=FeedForward(hidden=48, activation="relu", bias=False),
        attention=ATTENTIONS["separator"],
        layer_attention={0: DenseAttention(), -1: DenseAttention()} if ends_differ else {},
    )
    graph, state = nnx.split(abstract_model(config))

    def loss(parameters):
        return (nnx.merge(graph, parameters)(TOKENS) ** 2).sum()

    return quick_jit(function_of(loss)).lower(nnx.to_pure_dict(state))


def operations(text):
    return sum(" = " in line for line in text.splitlines())


@pytest.mark.parametrize("ends_differ", [False, True])
def test_a_deep_model_trains_with_as_many_operations(ends_differ):
    shallow, deep = (
        operations(lower(layers, ends_differ, jax.value_and_grad).as_text()) for layers in (12, 48)
    )
    assert 500 < shallow == deep


def test_a_deep_model_compiles_as_fast():
    costs = []
    for layers in (12, 48):
        # of this process, which others disturb little
        begin = time.process_time()
        compiled = lower(layers, True, lambda loss: loss).compile()
        costs.append((operations(compiled.as_text()), time.process_time() - begin))
    (shallow, shallow_seconds), (deep, deep_seconds) = costs
    assert deep <= 1.05 * shallow
    assert deep_seconds <= 1.5 * shallow_seconds
