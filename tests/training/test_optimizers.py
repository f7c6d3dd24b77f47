from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqeff.checks import ConfigError
from seqeff.training.optimizers import AdamW, Muon, Optimizer, clip_by_global_norm, global_norm
from seqeff.training.schedules import Constant, Linear

LAYERS = 3


def make_tree(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    return {
        "embedding": draw(63, 8),
        "final_norm": {"scale": draw(8)},
        "layers": {
            "norm": {"scale": draw(LAYERS, 8)},
            "attention": {"kernel": draw(LAYERS, 8, 16), "bias": draw(LAYERS, 16)},
            "experts": draw(LAYERS, 5, 16, 8),
        },
        "output_head": draw(63, 8),
    }


MATRICES = {
    "embedding": True,
    "final_norm": {"scale": False},
    "layers": {
        "norm": {"scale": False},
        "attention": {"kernel": True, "bias": False},
        "experts": True,
    },
    "output_head": True,
}


def updates(
    optimizer: Optimizer,
    gradients: list[Any],
    parameters: Any,
    rate: optax.Schedule = lambda _: 1.0,
) -> list[Any]:
    transformation = optimizer.make(rate, jax.eval_shape(lambda: parameters))
    state = transformation.init(parameters)
    found = []
    for gradient in gradients:
        update, state = jax.jit(transformation.update)(gradient, state, parameters)
        found.append(update)
    return found


def naive_adam(
    gradients: list[np.ndarray], parameter: np.ndarray, config: AdamW, decay: float
) -> list[np.ndarray]:
    mean = square = 0.0
    found = []
    for step, gradient in enumerate(np.asarray(gradients, np.float64), start=1):
        mean = config.b1 * mean + (1 - config.b1) * gradient
        square = config.b2 * square + (1 - config.b2) * gradient**2
        direction = (mean / (1 - config.b1**step)) / (
            np.sqrt(square / (1 - config.b2**step)) + config.epsilon
        )
        found.append(-config.learning_rate * (direction + decay * parameter))
    return found


def test_adamw_decays_only_matrices() -> None:
    config = AdamW(learning_rate=0.01, weight_decay=0.3, gradient_clip=None)
    parameters, gradients = make_tree(0), [make_tree(seed) for seed in (1, 2, 3)]
    found = updates(config, gradients, parameters)

    def check(matrix: bool, parameter: jax.Array, *leaves: jax.Array) -> None:
        expected = naive_adam(
            [np.asarray(leaf) for leaf in leaves[:3]],
            np.asarray(parameter),
            config,
            config.weight_decay if matrix else 0.0,
        )
        np.testing.assert_allclose(np.stack(leaves[3:]), expected, rtol=2e-4, atol=1e-7)

    jax.tree.map(check, MATRICES, parameters, *gradients, *found)


def naive_newton_schulz(matrix: np.ndarray) -> np.ndarray:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam() -> None:
    config = Muon(learning_rate=0.02, adam_learning_rate=0.01, weight_decay=0.3, gradient_clip=None)
    adam = AdamW(
        learning_rate=0.01,
        b1=config.adam_b1,
        b2=config.adam_b2,
        weight_decay=0.3,
        gradient_clip=None,
    )
    parameters, gradients = make_tree(0), [make_tree(1)]
    (found,) = updates(config, gradients, parameters)
    (with_adam,) = updates(adam, gradients, parameters)
    for name in ("embedding", "output_head", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, found[name], with_adam[name])
    np.testing.assert_array_equal(
        found["layers"]["norm"]["scale"], with_adam["layers"]["norm"]["scale"]
    )
    np.testing.assert_array_equal(
        found["layers"]["attention"]["bias"], with_adam["layers"]["attention"]["bias"]
    )

    def check(update: jax.Array, gradient: jax.Array, parameter: jax.Array) -> None:
        for index in np.ndindex(update.shape[:-2]):
            matrix = np.asarray(gradient[index], np.float64)
            scale = 0.2 * np.sqrt(max(matrix.shape))
            direction = naive_newton_schulz(matrix) * scale + 0.3 * np.asarray(parameter[index])
            np.testing.assert_allclose(update[index], -0.02 * direction, rtol=1e-3, atol=1e-5)

    for path in (("attention", "kernel"), ("experts",)):
        leaves = [found["layers"], gradients[0]["layers"], parameters["layers"]]
        for key in path:
            leaves = [leaf[key] for leaf in leaves]
        check(*leaves)


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()])
def test_learning_rate_follows_the_schedule(optimizer: Optimizer) -> None:
    gradient = make_tree(1)
    schedule = Linear(warmup=1, final_fraction=0.5).make(1.0, 4)
    constant = Constant().make(1.0, 4)
    scheduled = updates(optimizer, [gradient] * 4, make_tree(0), schedule)
    plain = updates(optimizer, [gradient] * 4, make_tree(0), constant)
    for step in range(4):
        jax.tree.map(
            lambda left, right, rate=float(schedule(step)): np.testing.assert_allclose(
                left, right * rate, rtol=1e-5, atol=1e-9
            ),
            scheduled[step],
            plain[step],
        )


@pytest.mark.parametrize(
    "optimizer",
    [AdamW(learning_rate=0.05), Muon(learning_rate=0.3, adam_learning_rate=0.05, weight_decay=0.0)],
)
def test_it_minimises(optimizer: Optimizer) -> None:
    target, parameters = make_tree(1), make_tree(0)

    def loss(parameters: Any) -> jax.Array:
        return global_norm(jax.tree.map(jnp.subtract, parameters, target)) ** 2

    transformation = optimizer.make(Linear(warmup=0).make(1.0, 100), parameters)

    @jax.jit
    def step(parameters: Any, state: Any) -> Any:
        update, state = transformation.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, update), state

    before, state = loss(parameters), transformation.init(parameters)
    for _ in range(100):
        parameters, state = step(parameters, state)
    assert loss(parameters) < 0.1 * before


def test_clipping_and_norm_in_float32() -> None:
    # squares of these overflow float16 and vanish in it
    tree = {"a": jnp.full(4, 300.0, jnp.float16), "b": jnp.full(3, 1e-4, jnp.float16)}
    assert float(global_norm(tree)) == pytest.approx(600.0)
    clip = clip_by_global_norm(60.0)
    clipped, _ = clip.update(tree, clip.init(tree))
    assert clipped["a"].dtype == jnp.float16
    np.testing.assert_allclose(clipped["a"], 30.0, rtol=1e-3)
    unchanged, _ = clip_by_global_norm(601.0).update(tree, clip.init(tree))
    np.testing.assert_array_equal(unchanged["a"], tree["a"])
    nothing, _ = clip_by_global_norm(1.0).update({"a": jnp.zeros(3)}, clip.init(tree))
    np.testing.assert_array_equal(nothing["a"], 0)


def test_gradient_clip_precedes_the_optimizer() -> None:
    config = AdamW(gradient_clip=1.0, epsilon=1.0, weight_decay=0.0)
    gradient = make_tree(1)
    scaled = jax.tree.map(lambda leaf: leaf * 1000, gradient)
    found, expected = (updates(config, [tree], make_tree(0))[0] for tree in (scaled, gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match=r"AdamW.b2 = 1.0"):
        AdamW(b2=1.0)
    with pytest.raises(ConfigError, match=r"Muon.learning_rate = 0"):
        Muon(learning_rate=0.0)
    with pytest.raises(ConfigError, match=r"AdamW.weight_decay = -0.1"):
        AdamW(weight_decay=-0.1)
    with pytest.raises(ConfigError, match=r"AdamW.gradient_clip = 0"):
        AdamW(gradient_clip=0)
