"""What may be drawn, against the logits processors of transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from seqeff.inference.sampling import Sampling, Settings, filtered

pytestmark = pytest.mark.parity

ROWS, SIZE = 64, 300
PLAIN = Sampling(temperature=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {
            "temperature": 1.3,
            "top_k": 40,
            "top_p": 0.9,
            "min_p": 0.02,
            "repetition_penalty": 0.8,
        },
    ],
)
def test_scores_are_those_of_transformers(changes):
    import torch
    from transformers.generation import logits_process as processors

    random = np.random.default_rng(0)
    logits = 3 * random.normal(size=(ROWS, SIZE)).astype(np.float32)
    tokens = random.integers(0, SIZE, (ROWS, 30))
    sampling = dataclasses.replace(PLAIN, **changes)
    made = {
        "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
        "temperature": processors.TemperatureLogitsWarper,
        "top_k": processors.TopKLogitsWarper,
        "top_p": processors.TopPLogitsWarper,
        "min_p": processors.MinPLogitsWarper,
    }
    expected = torch.tensor(logits)
    for name, processor in made.items():
        if name in changes:
            expected = processor(changes[name])(torch.tensor(tokens), expected)
    seen = np.zeros((ROWS, SIZE), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    found = filtered(jnp.asarray(logits), Settings.of([sampling] * ROWS), jnp.asarray(seen))
    expected = expected.numpy()
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    kept = np.isfinite(expected)
    np.testing.assert_allclose(np.asarray(found)[kept], expected[kept], rtol=1e-5)
