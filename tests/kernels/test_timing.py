"""The timing loop: every call is made, and made inside the loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff_kernels import timing


def products(arguments):
    """Outputs of several shapes and dtypes, of which each needs its own matrix product."""
    left, right = arguments["left"], arguments["right"]
    return {"one": left @ right, "other": ((right @ left)[:3].astype(jnp.bfloat16),)}


def sets_of(count, size=48):
    keys = jax.random.split(jax.random.key(0), 2 * count)
    matrices = [jax.random.normal(key, (size, size)) for key in keys]
    return [({"left": a, "right": b},) for a, b in zip(matrices[::2], matrices[1::2], strict=True)]


@pytest.mark.parametrize("count", [1, 3])
def test_no_call_leaves_the_loop_or_is_dropped(count):
    text = timing.compile_loop(products, sets_of(count), 7).as_text()
    computations = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    (body,) = re.findall(r" while\(.*body=%(\S+?)[,\s]", text)

    def dots(name):
        called = re.findall(r"(?:calls|to_apply|body)=%([\w.-]+)", computations[name])
        return len(re.findall(r"\bdot\(", computations[name])) + sum(map(dots, called))

    assert dots(body) == 2 * count
    assert re.search(r'"known_trip_count":\{"n":"7"\}', text)


def test_the_loop_calls_the_function():
    sets = sets_of(2)
    outputs, _ = timing.compile_loop(products, sets, 3)(sets)
    for output, arguments in zip(outputs, sets, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2),
            output,
            products(*arguments),
        )


def test_iterations_are_chosen_and_counted_out(monkeypatch):
    asked = []
    compile_loop = timing.compile_loop

    def spied(function, sets, iterations):
        asked.append(iterations)
        return compile_loop(function, sets, iterations)

    monkeypatch.setattr(timing, "compile_loop", spied)
    monkeypatch.setattr(timing, "_SECONDS", 1e-3)
    times = timing.device_times(products, sets_of(2), repeats=3)
    assert len(times) == 3
    assert all(0 < seconds < 0.1 for seconds in times)
    assert asked[0] == 2
    assert len(asked) <= 2
    (seconds,) = timing.device_times(jnp.add, [(jnp.ones(3),) * 2], iterations=4, repeats=1)
    assert seconds > 0
