"""The chunked cross-entropy against log_softmax of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import quick_jit

from seqeff.models import cross_entropy, cross_entropy_sums, token_losses

BATCH, ROWS, WIDTH, SIZE = 3, 63, 8, 41


def case(rows=ROWS):
    random = np.random.default_rng(0)
    hidden = random.normal(size=(BATCH, rows, WIDTH)).astype(np.float32)
    head = random.normal(size=(SIZE, WIDTH)).astype(np.float32)
    targets = random.integers(0, SIZE, (BATCH, rows))
    weights = random.choice([0.0, 1.0, 0.25], (BATCH, rows)).astype(np.float32)
    return hidden, head, targets, weights


def naive(hidden, head, targets, weights, z_loss):
    logits = jnp.einsum("brw,vw->brv", hidden, head, precision="highest")
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    squares = jnp.square(jax.nn.logsumexp(logits, -1))
    total = jnp.sum(weights * (losses + z_loss * squares))
    return total, (jnp.sum(weights * losses), jnp.sum(weights * squares), losses)


# in a chunk: everything; 7 rows of 9 chunks; 10 rows, which leaves 3; less than a row
@pytest.mark.parametrize(
    ("rows_in_chunk", "z_loss"), [(1000, 0.0), (7, 1e-2), (10, 1e-2), (0, 1e-2)]
)
def test_values_and_gradients(monkeypatch, rows_in_chunk, z_loss):
    monkeypatch.setattr(cross_entropy, "_LOGITS_PER_CHUNK", rows_in_chunk * BATCH * SIZE)
    hidden, head, targets, weights = case()

    def both(function):
        value = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
        return value(hidden, head, targets, weights, z_loss)

    ((total, parts), gradients), ((naive_total, aside), naive_gradients), losses, again = quick_jit(
        lambda: (
            both(cross_entropy_sums),
            both(naive),
            token_losses(hidden, head, targets),
            cross_entropy_sums(hidden, head, targets, weights, z_loss),
        )
    )()
    np.testing.assert_allclose(total, naive_total, rtol=1e-5)
    np.testing.assert_allclose(parts, aside[:2], rtol=1e-5)
    np.testing.assert_allclose(losses, aside[2], rtol=1e-5, atol=1e-5)
    for left, right in zip(gradients, naive_gradients, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    # without gradients the sums come from another function
    np.testing.assert_allclose(again[0], naive_total, rtol=1e-5)
    np.testing.assert_allclose(again[1], aside[:2], rtol=1e-5)


def test_gradients_scale_with_what_follows():
    hidden, head, targets, weights = case(5)

    def scaled(scale):
        def loss(hidden, head):
            return scale * cross_entropy_sums(hidden, head, targets, weights)[0]

        return jax.grad(loss, argnums=(0, 1))(hidden, head)

    once, thrice = quick_jit(lambda: (scaled(1.0), scaled(3.0)))()
    for left, right in zip(once, thrice, strict=True):
        np.testing.assert_allclose(3 * left, right, rtol=1e-6)


def test_gradients_have_the_dtypes_of_what_they_belong_to():
    hidden, head, targets, weights = case()
    hidden = hidden.astype(jnp.bfloat16)

    def loss(function):
        return lambda hidden, head: function(hidden, head, targets, weights, 0.0)[0]

    (value, gradients), (expected, _) = quick_jit(
        lambda: tuple(
            jax.value_and_grad(loss(function), argnums=(0, 1))(hidden, head)
            for function in (cross_entropy_sums, naive)
        )
    )()
    assert value.dtype == jnp.float32
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, expected, rtol=5e-3)


def arrays(jaxpr):
    """Shapes of all arrays that a jaxpr makes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_logits_of_all_rows_never_exist(monkeypatch, gradient):
    limit = 4 * BATCH * SIZE
    monkeypatch.setattr(cross_entropy, "_LOGITS_PER_CHUNK", limit)
    operands = case()

    def largest(function):
        if gradient:
            function = jax.grad(lambda *given, inner=function: inner(*given)[0], argnums=(0, 1))
        made = arrays(jax.make_jaxpr(function)(*operands).jaxpr)
        return max(array.size for array in made if SIZE in array.shape)

    assert largest(lambda *given: naive(*given, 0.0)) == BATCH * ROWS * SIZE
    assert largest(cross_entropy_sums) <= limit
    if not gradient:
        assert largest(lambda *given: token_losses(*given[:3])) <= limit
