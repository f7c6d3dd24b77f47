"""Decoding with caches equals the whole rows, row by row, whatever the chunks."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    ATTENTIONS,
    SEPARATORS,
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
    DenseAttention,
    LearnedPositions,
    SeparatorAttention,
    cached_parameters,
    empty_cache,
    most_kept,
)
from seqeff.models.caches import (
    BlockCache,
    PublishedCache,
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
    return small_config(attention=ATTENTIONS[name])


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


def close(actual, expected):
    """The caches' own bound of 1e-5, of the largest entry."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=1e-5)


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
        output, cache = step(tokens[:, first:end], cache)
        outputs.append(output)
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


@pytest.mark.parametrize("name", ["bounded", "streaming", "compact", "window"])
def test_a_bounded_cache_has_one_size_for_any_capacity(name):
    def sizes(capacity):
        cache = jax.eval_shape(lambda: empty_cache(config_of(name), 2, capacity))
        return [leaf.size for leaf in jax.tree.leaves(cache)]

    assert sizes(10) == sizes(100_000)
    assert not kind_of(ATTENTIONS[name]).grows
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


PUBLISHED = SeparatorAttention(
    window=6,
    initial_tokens=2,
    separators=3,
    separator_ids=SEPARATORS,
    positions="compact",
    cache_entries=16,
)


class Used(NamedTuple):
    read: Any
    resident: Any


def published(attention, tokens, **changes):
    """Outputs, entries read by and resident after each token, and the model's parameters."""
    config = small_config(attention=attention, **changes)
    _, parameters = random_model(config)
    made = CachedTransformer.of(config, cached_parameters(config, parameters))

    @quick_jit
    def scan(tokens):
        def step(cache, token):
            (layers,) = cache.layers
            used = layers.entries(token[:, None], jnp.ones(len(token), jnp.int32))
            output, cache = made.extend(token[:, None], cache)
            return cache, (output[:, 0], Used(used[0][:, 0], used[1]))

        return jax.lax.scan(step, empty_cache(config, *tokens.shape), tokens.T)[1]

    outputs, entries = scan(tokens)
    return np.swapaxes(outputs, 0, 1), entries, parameters


def test_the_published_cache_without_limit_is_dense():
    for positions in ("absolute", "compact"):
        attention = dataclasses.replace(PUBLISHED, cache_entries=LENGTH, positions=positions)
        assert isinstance(kind_of(attention), PublishedCache)
        outputs, entries, parameters = published(attention, TOKENS)
        graph, _ = random_model(small_config(attention=DenseAttention()))
        close(outputs, np.asarray(hidden(graph, parameters, TOKENS)))
        np.testing.assert_array_equal(entries.read[:, 0], np.arange(1, LENGTH + 1))


def test_the_published_cache_without_separators_is_streamingllm():
    """With initial + window = entries, a token attends one more than stays: a window of n + 1."""
    for positions in ("absolute", "compact"):
        attention = dataclasses.replace(
            PUBLISHED, separators=None, separator_ids=(), cache_entries=8, positions=positions
        )
        outputs, _, parameters = published(attention, TOKENS, layers=1)
        streaming = SeparatorAttention(
            window=7, initial_tokens=2, separator_ids=(), positions=positions
        )
        graph, _ = random_model(small_config(attention=streaming, layers=1))
        close(outputs, np.asarray(hidden(graph, parameters, TOKENS)))


@pytest.mark.parametrize(
    ("sizes", "mean"),
    [
        ((4, 64, 256, 800), 562),
        ((4, 32, 224, 324), 292),
        ((4, 64, 224, 324), 308),
        ((4, 64, 512, 800), 690),
        ((4, 64, 720, 1024), 906),
    ],
)
def test_the_entries_of_the_published_cache_average_what_the_paper_says(sizes, mean):
    """Equation 4, in the steady state: resident after eviction; a step reads one more."""
    initial, separators, local, limit = sizes
    kind = PublishedCache(local, initial, separators, limit, _EveryFifth())

    @jax.jit
    def count():
        state, _ = kind.empty(_Sizes)

        def step(state, _):
            token = jnp.zeros((1, 1), jnp.int32)
            begun, state = kind.begin(state, token, jnp.ones(1, jnp.int32))
            return state, (kind.read(begun, 1)[:, 0], kind.resident(state))

        return jax.lax.scan(step, state, length=20_000)[1]

    read, resident = (np.asarray(x)[:, 0] for x in count())
    steady = resident[4_000:]
    # whole periods of the saw-tooth
    lowest = np.flatnonzero(steady == steady.min())
    steady = steady[lowest[0] : lowest[-1]]
    assert steady.mean() == mean
    assert resident.max() == limit
    assert read.max() == limit + 1
    np.testing.assert_array_equal(read[1:], resident[:-1] + 1)


class _EveryFifth:
    def are_separators(self, tokens, index):
        return index % 5 == 0


class _Sizes:
    batch, capacity, kv_heads, head_dim, dtype = 1, 1, 1, 1, jnp.float32


def test_rows_of_the_published_cache_evict_each_on_its_own():
    """The public SepCache keeps as many separators in every row as the row with the fewest has."""
    tokens = TOKENS.copy()
    tokens[1] = 1  # a row without separators
    outputs, entries, _ = published(PUBLISHED, tokens)
    others, other_entries, _ = published(PUBLISHED, TOKENS)
    np.testing.assert_array_equal(outputs[::2], others[::2])
    np.testing.assert_array_equal(entries.resident[:, ::2], other_entries.resident[:, ::2])
    assert np.any(entries.resident[:, 0] != entries.resident[:, 1])


def test_the_published_cache_turns_keys_once():
    """The public SepCache writes turned keys back, and turns them again each step."""
    config = small_config(attention=PUBLISHED, layers=1)
    step, cache = extending(config, random_model(config)[1]), empty_cache(config, BATCH, LENGTH)
    keys = []
    for token in range(14):
        _, cache = step(TOKENS[:, token : token + 1], cache)
        keys.append(np.asarray(cache.layers[0].arrays[0].keys))
    for before, after in itertools.pairwise(keys):
        filled = np.any(before != 0, axis=(0, 2, 3))
        np.testing.assert_array_equal(after[:, filled], before[:, filled])


def test_the_published_cache_holds_what_a_list_does():
    """Token by token, each row on its own, by the paper's words."""
    config = small_config(attention=PUBLISHED, layers=1)
    step, cache = extending(config, random_model(config)[1]), empty_cache(config, BATCH, LENGTH)
    values, rows = {}, [[] for _ in range(BATCH)]
    ends = [PUBLISHED.initial_tokens] * BATCH  # where each row's past window begins
    for token in range(LENGTH):
        filled = np.asarray(cache.layers[0].state.filled)
        _, cache = step(TOKENS[:, token : token + 1], cache)
        entries = cache.layers[0]
        for row, kept in enumerate(rows):
            kept.append(token)
            # the values of a token of the only layer are the same wherever they are moved
            if filled[row] + 1 <= PUBLISHED.cache_entries:
                written = np.asarray(entries.arrays[0].values[row, filled[row]])
                values[row, token] = written
            if len(kept) > PUBLISHED.cache_entries:
                local = len(kept) - PUBLISHED.window
                past = kept[ends[row] : local]
                separators = kept[PUBLISHED.initial_tokens : ends[row]]
                separators += [t for t in past if TOKENS[row, t] in SEPARATORS]
                separators = separators[-PUBLISHED.separators :]
                kept[:] = kept[: PUBLISHED.initial_tokens] + separators + kept[local:]
                ends[row] = PUBLISHED.initial_tokens + len(separators)
            assert int(entries.state.filled[row]) == len(kept)
            for slot, held in enumerate(kept):
                if (row, held) in values:
                    found = entries.arrays[0].values[row, slot]
                    np.testing.assert_array_equal(found, values[row, held])
    assert sum(len(kept) for kept in rows) < len(values)


def test_the_published_cache_takes_chunks():
    config = small_config(attention=PUBLISHED)
    _, parameters = random_model(config)
    outputs, _, _ = published(PUBLISHED, TOKENS)
    step, cache = extending(config, parameters), empty_cache(config, BATCH, LENGTH)
    counts = np.asarray([[30, 12, 30], [33, 0, 20]], np.int32)
    at = np.zeros(BATCH, int)
    for count in counts:
        part = np.stack([np.roll(TOKENS[row], -first)[:33] for row, first in enumerate(at)])
        found, cache = step(part, cache, count)
        for row in np.flatnonzero(count):
            close(found[row, : count[row]], outputs[row, at[row] : at[row] + count[row]])
        at += count
    np.testing.assert_array_equal(cache.length, at)


@pytest.mark.parametrize("name", ["bounded", "compact"])
def test_prefill_takes_memory_for_a_chunk_alone(name):
    """The public SepCache holds the whole prompt."""
    config = config_of(name)
    parameters = jax.eval_shape(lambda given: cached_parameters(config, given), model(name)[1])

    def extend(parameters, tokens, cache):
        return CachedTransformer.of(config, parameters).extend(tokens, cache)

    def bytes_of(capacity):
        cache = jax.eval_shape(lambda: empty_cache(config, 1, capacity))
        tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
        compiled = quick_jit(extend).lower(parameters, tokens, cache).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes

    assert bytes_of(1 << 20) == bytes_of(32)


def test_a_layers_cache_is_updated_in_place():
    """No loop over layers hands caches on, which would copy them."""
    config = config_of("dense")
    parameters = jax.eval_shape(lambda given: cached_parameters(config, given), model("dense")[1])
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 1 << 16))

    def extend(parameters, tokens, cache):
        return CachedTransformer.of(config, parameters).extend(tokens, cache)

    compiled = (
        jax.jit(extend, donate_argnums=2)
        .lower(parameters, jax.ShapeDtypeStruct((1, 1), jnp.int32), cache)
        .compile()
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


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
