"""Decoding with caches equals the whole rows, row by row, whatever the chunks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    ATTENTIONS,
    PUBLISHED,
    SEPARATORS,
    close,
    extending,
    hidden,
    naive_mask,
    quick_jit,
    random_model,
    random_tokens,
    small_config,
)

from seqeff.checks import ConfigError
from seqeff.models import (
    CachedTransformer,
    LearnedPositions,
    SeparatorAttention,
    cached_parameters,
    emptied_rows,
    empty_cache,
    most_kept,
)
from seqeff.models.caches import (
    BlockCache,
    TokenCache,
    WholeCache,
    kind_of,
    replace_rows,
    select_rows,
)
from seqeff.models.positions import BilevelPositions

BATCH, LENGTH = 3, 63
TOKENS = random_tokens(BATCH, LENGTH)
KINDS = {
    "dense": TokenCache,
    "window": BlockCache,
    "separator": BlockCache,
    "streaming": BlockCache,
    "bounded": BlockCache,
    "bounded alone": BlockCache,
    "fixed": BlockCache,
    "of the row": BlockCache,
    "compact": BlockCache,
    "interval": WholeCache,
}


def config_of(name):
    return small_config(attention=(ATTENTIONS | {"published": PUBLISHED})[name])


@functools.cache
def model(name):
    return random_model(config_of(name))


@functools.cache
def whole(name):
    return np.asarray(hidden(*model(name), TOKENS))


@functools.cache
def extend(name):
    return extending(config_of(name), model(name)[1])


def empty(name, batch=BATCH):
    return empty_cache(config_of(name), batch, LENGTH)


def run(name, chunks, tokens=TOKENS, cache=None):
    """Outputs of the tokens taken in chunks of such lengths, and the cache."""
    cache = empty(name, len(tokens)) if cache is None else cache
    outputs, first = [], 0
    for rows in chunks:
        part = tokens[:, first : first + rows]
        output, cache = extend(name)(part, cache, jnp.full(len(tokens), rows, jnp.int32))
        outputs.append(np.asarray(output))
        first += rows
    return np.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize("name", KINDS)
def test_each_attention_has_its_cache(name):
    assert isinstance(kind_of(ATTENTIONS[name]), KINDS[name])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "chunks", [(63,), (31, 31, 1), (1,) * 63, (2, 1, 1, 40, 1, 18)], ids=["1", "31", "one", "mixed"]
)
def test_decoding_equals_the_whole_row(name, chunks):
    outputs, cache = run(name, chunks)
    close(outputs, whole(name))
    np.testing.assert_array_equal(cache.length, LENGTH)


@pytest.mark.parametrize("name", KINDS)
def test_rows_take_as_many_tokens_as_they_have(name):
    """Rows are at places of their own, and what follows their count changes nothing."""
    counts = [(5, 0, 3), (8, 8, 1), (0, 1, 8), (1, 1, 1), (7, 8, 0), (8, 8, 8)]
    cache, places = empty(name), np.zeros(BATCH, int)
    for count in counts:
        rows = 1 if count == (1, 1, 1) else 8
        part = np.full((BATCH, rows), SEPARATORS[0], np.int32)
        for row, number in enumerate(count):
            part[row, :number] = TOKENS[row, places[row] : places[row] + number]
        output, cache = extend(name)(part, cache, jnp.asarray(count, jnp.int32))
        for row in np.flatnonzero(count):
            first, number = places[row], count[row]
            close(output[row, :number], whole(name)[row, first : first + number])
        places += count
        np.testing.assert_array_equal(cache.length, places)


@settings(max_examples=15, deadline=None)
@given(
    window=st.integers(1, 9),
    initial=st.integers(0, 4),
    separators=st.none() | st.integers(1, 6),
    compact=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_sizes(window, initial, separators, compact, seed):
    attention = SeparatorAttention(
        window=window,
        initial_tokens=initial,
        separators=separators,
        separator_ids=SEPARATORS * 3,
        positions="compact" if compact else "absolute",
    )
    config = small_config(layers=1, attention=attention)
    graph, parameters = random_model(config)
    tokens = random_tokens(2, 24, seed)
    tokens[0, 5:20:2] = SEPARATORS[1]
    expected = hidden(graph, parameters, tokens)
    cache, step, outputs = empty_cache(config, 2, 24), extending(config, parameters), []
    for first, end in itertools.pairwise((0, 11, *range(12, 16), 24)):
        # few lengths to compile for
        rows = 1 if end - first == 1 else 11
        part = np.pad(tokens, ((0, 0), (0, 11)))[:, first : first + rows]
        output, cache = step(part, cache, jnp.full(2, end - first, jnp.int32))
        outputs.append(output[:, : end - first])
    close(np.concatenate(outputs, axis=1), np.asarray(expected))


@pytest.mark.parametrize("name", ["dense", "separator", "bounded", "compact", "interval"])
def test_rows_can_be_moved_and_replaced(name):
    _, cache = run(name, (40,))
    order = jnp.asarray([2, 0, 0])
    moved = select_rows(cache, order)
    close(run(name, (1, 7), TOKENS[order][:, 40:48], moved)[0], whole(name)[order, 40:48])
    # a new request in the place of an old row
    _, other = run(name, (9,), TOKENS[2:])
    replaced = replace_rows(cache, jnp.asarray([1]), other)
    part = np.stack([TOKENS[0, 40:48], TOKENS[2, 9:17], TOKENS[2, 40:48]])
    outputs, _ = run(name, (1, 7), part, replaced)
    for row, (source, first) in enumerate(((0, 40), (2, 9), (2, 40))):
        close(outputs[row], whole(name)[source, first : first + 8])


@pytest.mark.parametrize("name", ["bounded", "compact", "interval", "dense"])
def test_a_row_does_not_depend_on_its_mates_bit_for_bit(name):
    outputs, _ = run(name, (20, 1, 1, 9))
    mates = TOKENS.copy()
    mates[1:] = random_tokens(BATCH, LENGTH, seed=9)[1:]
    np.testing.assert_array_equal(run(name, (20, 1, 1, 9), mates)[0][0], outputs[0])


@pytest.mark.parametrize("name", ["bounded", "streaming", "compact", "window", "published"])
def test_a_bounded_cache_has_one_size_for_any_capacity(name):
    def sizes(capacity):
        cache = jax.eval_shape(lambda: empty_cache(config_of(name), 2, capacity))
        return [leaf.size for leaf in jax.tree.leaves(cache)]

    assert sizes(10) == sizes(100_000)
    assert not kind_of(config_of(name).attention).grows
    assert kind_of(ATTENTIONS["separator"]).grows
    assert kind_of(ATTENTIONS["dense"]).grows


@pytest.mark.parametrize("chunks", [(31, 31, 1), (1,) * 63], ids=["chunks", "tokens"])
@pytest.mark.parametrize("name", ["separator", "fixed"])
def test_a_growing_cache_has_room_for_what_it_keeps(name, chunks):
    config = config_of(name)
    most = most_kept(config, jnp.asarray(TOKENS), 0)
    assert most_kept(config, jnp.asarray(TOKENS[:, :40]), 23) >= most
    cache = empty_cache(config, BATCH, LENGTH, most)
    (slots,) = {arrays.kept.keys.shape[1] for run in cache.layers for arrays in run.arrays}
    assert most <= slots < most + 8 < LENGTH
    outputs, _ = run(name, chunks, cache=cache)
    close(outputs, whole(name))


@pytest.mark.parametrize("chunk", [10, 1])
@pytest.mark.parametrize(
    ("name", "capacity", "kept"),
    [("dense", 16, None), ("interval", 16, None), ("separator", 63, 1), ("bounded", 1, None)],
)
def test_a_row_that_overflows_is_nan_from_then_on(name, capacity, kept, chunk):
    cache = empty_cache(config_of(name), BATCH, capacity, kept)
    # every third one is a separator
    tokens = np.where(np.arange(LENGTH) % 3 == 0, SEPARATORS[0], TOKENS)
    overflowed = []
    for first in range(0, 60, chunk):
        # the second row stays short
        count = np.array([chunk, chunk if first < 10 else 0, chunk], np.int32)
        output, cache = extend(name)(tokens[:, first : first + chunk], cache, count)
        (run,) = cache.layers
        filled = run.state.kept if name == "separator" else cache.length
        room = {"separator": 8, "bounded": LENGTH}.get(name, 16)
        overflowed.append(np.asarray(filled) > room)
        nan = np.isnan(output)
        np.testing.assert_array_equal(nan.any((1, 2)), overflowed[-1])
        np.testing.assert_array_equal(nan.all((1, 2)), overflowed[-1])
    assert not overflowed[0].any()
    assert overflowed[-1].tolist() == [name != "bounded", False, name != "bounded"]


def test_a_row_past_the_positions_is_nan_from_then_on():
    config = small_config(attention=ATTENTIONS["bounded"], positions=LearnedPositions(length=12))
    take = extending(config, random_model(config)[1])
    cache = empty_cache(config, BATCH, 1)
    output, cache = take(TOKENS[:, :12], cache)
    assert np.isfinite(output).all()
    output, _ = take(TOKENS[:, 12:13], cache, np.array([1, 0, 1], np.int32))
    assert np.isnan(output).all((1, 2)).tolist() == [True, False, True]


@pytest.mark.parametrize("name", [*KINDS, "published"])
def test_an_emptied_row_is_as_new(name):
    """Whatever tokens were there before: those of a row before it, in other chunks."""
    fresh = empty(name)
    _, cache = extend(name)(TOKENS[::-1, :28], fresh)
    cache = emptied_rows(cache, jnp.array([True, False, True]))
    new = np.array([20, 0, 13], np.int32)
    found, cache = extend(name)(TOKENS[:, :20], cache, new)
    expected, _ = extend(name)(TOKENS[:, :20], fresh, new)
    close(found[0], expected[0])
    close(found[2, :13], expected[2, :13])
    assert cache.length.tolist() == [20, 28, 13]


@pytest.mark.parametrize("name", KINDS)
def test_the_entries_are_those_of_the_mask(name):
    mask = naive_mask(ATTENTIONS[name], TOKENS, np.zeros_like(TOKENS))
    _, cache = run(name, (28,))
    for rows in (1, 8):
        (layers,) = cache.layers
        tokens = TOKENS[:, 28 : 28 + rows]
        step, state = layers.kind.begin(layers.state, tokens, jnp.full(BATCH, rows))
        expected = mask[:, 28 : 28 + rows].sum(-1)
        np.testing.assert_array_equal(layers.kind.read(step, rows), expected)
        if name != "interval":  # which keeps what it no longer reads
            np.testing.assert_array_equal(layers.kind.resident(state), expected[:, -1])


def test_a_scan_over_tokens():
    config, (_, parameters) = config_of("bounded"), model("bounded")
    made = CachedTransformer.of(config, cached_parameters(config, parameters))

    @quick_jit
    def scan(tokens, cache):
        def step(cache, token):
            output, cache = made.extend(token[:, None], cache)
            return cache, output[:, 0]

        return jax.lax.scan(step, cache, tokens.T)[1]

    close(np.swapaxes(scan(TOKENS, empty("bounded")), 0, 1), whole("bounded"))


@pytest.mark.parametrize("name", ["dense", "separator"])
def test_positions_in_segments_go_on(name):
    positions = BilevelPositions(segment_length=5, separator_ids=SEPARATORS)
    config = small_config(attention=ATTENTIONS[name], positions=positions)
    graph, parameters = random_model(config)
    expected = np.asarray(hidden(graph, parameters, TOKENS))
    cache, step, outputs = empty_cache(config, BATCH, LENGTH), extending(config, parameters), []
    for first, end in itertools.pairwise((0, 20, 21, 22, 40, 63)):
        output, cache = step(TOKENS[:, first:end], cache)
        outputs.append(output)
    close(np.concatenate(outputs, axis=1), expected)


@functools.cache
def extending_in_place(config, rows, structure, leaves):
    """The program that takes so many tokens into a cache of such leaves, which is used up."""
    cache = structure.unflatten(leaves)
    given = jax.eval_shape(lambda: cached_parameters(config, random_model(config)[1]))

    def extend(parameters, tokens, cache):
        return CachedTransformer.of(config, parameters).extend(tokens, cache)

    tokens = jax.ShapeDtypeStruct((1, rows), jnp.int32)
    return quick_jit(extend, donate_argnums=2).lower(given, tokens, cache).compile()


def program_for(config, rows, capacity):
    """That program for an empty cache."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: empty_cache(config, 1, capacity)))
    return extending_in_place(config, rows, structure, tuple(leaves))


def prefill_bytes(name, chunks):
    """What it takes to read a prompt of so many chunks of 8 tokens."""
    config, tokens = config_of(name), TOKENS[:1, : 8 * chunks]
    program = program_for(config, 8, tokens.size)
    given, cache = cached_parameters(config, model(name)[1]), empty_cache(config, 1, tokens.size)
    for part in np.split(tokens, chunks, axis=1):
        # refuses a cache that has become larger
        _, cache = program(given, part, cache)
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.parametrize("name", ["bounded", "compact", "published"])
def test_prefill_takes_memory_for_a_chunk_alone(name):
    """The public SepCache holds the whole prompt."""
    assert prefill_bytes(name, 7) == prefill_bytes(name, 1)


def test_prefill_of_a_growing_cache_takes_memory_for_the_prompt():
    """So that the comparison above can fail."""
    entry = 2 * 2 * 8 * 4  # bytes of a layer's keys and values
    assert prefill_bytes("dense", 7) >= prefill_bytes("dense", 1) + 2 * 48 * entry


def test_a_layers_cache_is_updated_in_place():
    """A loop over layers that hands caches on would copy them all; a step works on one's."""
    config = small_config(layers=6, attention=ATTENTIONS["dense"])
    memory = program_for(config, 1, 1 << 16).memory_analysis()
    layer = 2 * (1 << 16) * 2 * 8 * 4
    assert memory.alias_size_in_bytes >= 6 * layer
    assert memory.temp_size_in_bytes < 1.5 * layer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"separators": 0}, "SeparatorAttention.separators = 0 must be at least 1, or null"),
        ({"interval": 0}, "SeparatorAttention.interval = 0 must be at least 1"),
        ({"positions": "rank"}, "SeparatorAttention.positions = 'rank'"),
        ({"initial_of": "batch"}, "SeparatorAttention.initial_of = 'batch'"),
        ({"cache_entries": 100}, "cache_entries = 100 needs a number for SeparatorAttention.sepa"),
        (
            {"cache_entries": 99, "separators": 33},
            r"cache_entries = 99 is below initial_tokens \+ separators \+ window = 3 \+ 33 \+ 64",
        ),
        (
            {"cache_entries": 66, "characters": ""},
            r"cache_entries = 66 is below .* = 3 \+ 0 \+ 64 = 67",
        ),
        (
            {"cache_entries": 99, "characters": "", "interval": 9},
            "cache_entries = 99 needs a number for SeparatorAttention.sep",
        ),
        (
            {"cache_entries": 99, "characters": "", "preset": "pythia"},
            "cache_entries = 99 needs a number for SeparatorAttention.sep",
        ),
        (
            {"cache_entries": 99, "characters": "", "separator_ids": (3,)},
            "cache_entries = 99 needs a number for SeparatorAttention.sep",
        ),
        ({"preset": "pythia", "separator_ids": (3,)}, "are both given; keep one"),
    ],
)
def test_bad_sizes(fields, message):
    with pytest.raises(ConfigError, match=message):
        SeparatorAttention(**fields)


@pytest.mark.parametrize(
    "positions",
    [LearnedPositions(length=64), BilevelPositions(segment_length=5, separator_ids=SEPARATORS)],
    ids=["learned", "bilevel"],
)
def test_compact_positions_need_a_place_that_is_rotated_by(positions):
    config = small_config(attention=ATTENTIONS["compact"], positions=positions)
    graph, parameters = random_model(config)
    with pytest.raises(ConfigError, match="positions = 'compact' needs positions that rotate"):
        hidden(graph, parameters, TOKENS)
    with pytest.raises(ConfigError, match="positions = 'compact' needs positions that rotate"):
        extending(config, parameters)(TOKENS, empty_cache(config, BATCH, LENGTH))
