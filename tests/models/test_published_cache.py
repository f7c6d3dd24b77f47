"""The published cache decodes as SepLLM's published streaming code does, row by row."""

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
    PUBLISHED,
    SEPARATORS,
    close,
    extending,
    hidden,
    quick_jit,
    random_model,
    random_tokens,
    small_config,
)

from seqeff.models import (
    CachedTransformer,
    DenseAttention,
    SeparatorAttention,
    cached_parameters,
    empty_cache,
)
from seqeff.models.caches import PublishedCache, kind_of, replace_rows, select_rows
from seqeff.models.flops import entries_of_cache
from seqeff.models.positions import Rotary

BATCH, LENGTH, BASE = 3, 63, 500.0
TOKENS = random_tokens(BATCH, LENGTH)


class Entry(NamedTuple):
    """A token in a list of entries: where it is in its row, and each layer's unrotated heads."""

    index: int
    separates: bool
    keys: list
    values: list


class Decoded(NamedTuple):
    """Of every token: the model's output, and how many entries there are after it."""

    outputs: np.ndarray
    entries: np.ndarray


# rows where separators are rare, more frequent, and nearly all
SPREAD = np.where(
    np.random.default_rng(1).random((BATCH, LENGTH)) < [[0.1], [0.2], [0.9]],
    random_tokens(BATCH, LENGTH, seed=2) % 2 + SEPARATORS[0],
    np.maximum(TOKENS, SEPARATORS[-1] + 1),
)


@functools.cache
def naive_decode(attention, layers=2, length=LENGTH):
    """Lists of entries, one token after another: the published code's statements."""
    config = config_of(attention=attention, layers=layers)
    given = cached_parameters(config, random_model(config)[1])
    model = CachedTransformer.of(config, given)
    lists: list[list[Entry]] = [[] for _ in range(BATCH)]
    past_starts = [attention.initial_tokens] * BATCH
    outputs, sizes = [], []

    def attend(heads):
        attended = [
            naive_attention(attention, entries, *(x[row, 0] for x in heads[:3]))
            for row, entries in enumerate(lists)
        ]
        return jnp.asarray(attended, jnp.float32)[:, None]

    for index, tokens in enumerate(SPREAD.T[:length]):
        for entries, token in zip(lists, tokens, strict=True):
            entries.append(Entry(index, token in attention.separator_ids, [], []))
        x = model.embedding[...][tokens][:, None]
        for layer in model.layers:
            x = layer(x, attend, None)
        outputs.append(model.final_norm(x)[:, 0])
        for row, entries in enumerate(lists):
            if len(entries) > attention.cache_entries:
                lists[row], past_starts[row] = naive_eviction(attention, entries, past_starts[row])
        sizes.append([len(entries) for entries in lists])
    return Decoded(np.stack(outputs, axis=1), np.stack(sizes, axis=1))


def naive_attention(attention, entries, queries, keys, values):
    """What the last of the entries attends, once it has its heads of this layer."""
    entries[-1].keys.append(np.asarray(keys))
    entries[-1].values.append(np.asarray(values))
    compact = attention.positions == "compact"
    places = [place if compact else entry.index for place, entry in enumerate(entries)]
    group = len(queries) // len(keys)
    queries = rotated(np.asarray(queries), places[-1])
    layer = len(entries[-1].keys) - 1
    keys = [rotated(entry.keys[layer], place) for entry, place in zip(entries, places, strict=True)]
    keys = np.repeat(keys, group, axis=1)
    values = np.repeat([entry.values[layer] for entry in entries], group, axis=1)
    scores = np.einsum("hd,ehd->eh", queries, keys) * queries.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(0))
    return np.einsum("eh,ehd->hd", weights / weights.sum(0), values)


def naive_eviction(attention, entries, past_start):
    """The entries that stay, and where the next past window begins."""
    initial, local = attention.initial_tokens, len(entries) - attention.window
    separators = entries[initial:past_start]
    separators += [entry for entry in entries[past_start:local] if entry.separates]
    separators = separators[-(attention.separators or 1) :]
    kept = entries[:initial] + separators + entries[local:]
    return kept, initial + len(separators)


def config_of(**changes):
    """With angles of its own, which the published code fixes."""
    return small_config(**{"positions": Rotary(base=BASE)} | changes)


def rotated(heads, place):
    """Heads at a place, as complex numbers of dimensions j and j + half."""
    half = heads.shape[-1] // 2
    turn = np.exp(1j * place * BASE ** (-np.arange(half) / half))
    turned = (heads[:, :half] + 1j * heads[:, half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


SIZES = {
    "some room": {},
    "no room": {"cache_entries": 11},
    "no initial tokens": {"initial_tokens": 0, "window": 1, "cache_entries": 7},
    "no separators": {"separators": None, "separator_ids": (), "cache_entries": 10},
}


@functools.cache
def decoder(attention, layers):
    """A compiled function of (tokens, cache, count): entries; outputs and the cache."""
    config = config_of(attention=attention, layers=layers)
    given = cached_parameters(config, random_model(config)[1])

    def decode(parameters, tokens, cache, count):
        entries = entries_of_cache(config, cache, tokens, count)
        return entries, CachedTransformer.of(config, parameters).extend(tokens, cache, count)

    return functools.partial(quick_jit(decode), given)


def take(attention, cache, rows, at, count, most, layers=2, length=LENGTH):
    """Takes `count` tokens of some rows, from their tokens `at` on: all is as naively decoded."""
    expected, entries = naive_decode(attention, layers, length)
    part = np.stack(
        [np.roll(SPREAD[row], -first)[:most] for row, first in zip(rows, at, strict=True)]
    )
    (read, most_held), (output, cache) = decoder(attention, layers)(
        part, cache, np.asarray(count, np.int32)
    )
    (run,) = cache.layers
    held = run.kind.resident(run.state)
    for line, (row, first, number) in enumerate(zip(rows, at, count, strict=True)):
        sizes = np.concatenate([[0], entries[row]])[first : first + number + 1]
        assert held[line] == sizes[-1]
        if number:
            close(output[line, :number], expected[row, first : first + number])
            np.testing.assert_array_equal(read[line, :number], sizes[:-1] + 1)
            assert most_held[line] == sizes[1:].max()
    return cache


def decode_all(attention, most, seed=0, layers=2, length=LENGTH):
    """Takes all rows in, up to `most` tokens at a time; at times none of a row."""
    cache = empty_cache(config_of(attention=attention, layers=layers), BATCH, length)
    random, at = np.random.default_rng(seed), np.zeros(BATCH, int)
    while np.any(at < length):
        drawn = np.minimum(random.integers(0, most + 2, BATCH), most)
        count = np.minimum(drawn, length - at)
        cache = take(attention, cache, range(BATCH), at, count, most, layers, length)
        at += count
    np.testing.assert_array_equal(cache.length, length)
    assert cache.layers[0].arrays[0].keys.shape[1] % 8 == 0


@pytest.mark.parametrize("most", [1, 20], ids=["tokens", "chunks"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("positions", ["compact", "absolute"])
def test_decoding_equals_the_published_code(positions, sizes, most):
    """Rows evict at moments of their own, and are passed over now and then."""
    decode_all(dataclasses.replace(PUBLISHED, positions=positions, **sizes), most)


@settings(max_examples=8, deadline=None)
@given(
    window=st.integers(1, 6),
    initial=st.integers(0, 3),
    separators=st.none() | st.integers(1, 4),
    spare=st.integers(0, 6),
    positions=st.sampled_from(["absolute", "compact"]),
    seed=st.integers(0, 1000),
)
def test_any_sizes(window, initial, separators, spare, positions, seed):
    attention = SeparatorAttention(
        window=window,
        initial_tokens=initial,
        separators=separators,
        separator_ids=() if separators is None else SEPARATORS,
        positions=positions,
        cache_entries=initial + (separators or 0) + window + spare,
    )
    decode_all(attention, 11, seed, layers=1, length=30)


def test_rows_can_be_moved_and_replaced():
    """Between evictions of the others."""
    empty = empty_cache(config_of(attention=PUBLISHED), BATCH, LENGTH)
    cache = take(PUBLISHED, empty, range(BATCH), (0, 0, 0), (20, 11, 17), 20)
    moved = select_rows(cache, jnp.asarray([2, 0, 0]))
    moved = take(PUBLISHED, moved, (2, 0, 0), (17, 20, 20), (20, 20, 9), 20)
    take(PUBLISHED, moved, (2, 0, 0), (37, 40, 29), (1, 1, 1), 1)
    # a new request in the place of an old row
    others = take(PUBLISHED, empty, range(BATCH), (0, 0, 0), (0, 0, 9), 20)
    cache = replace_rows(cache, jnp.asarray([1]), select_rows(others, jnp.asarray([2])))
    cache = take(PUBLISHED, cache, (0, 2, 2), (20, 9, 17), (20, 20, 20), 20)
    take(PUBLISHED, cache, (0, 2, 2), (40, 29, 37), (1, 1, 1), 1)


def test_the_compared_rows_evict_often():
    """So the comparison above is one of what evictions leave."""
    _, sizes = naive_decode(PUBLISHED)
    evicts = np.diff(sizes, axis=1) <= 0
    assert evicts.sum(1).min() >= 5
    assert len({tuple(row) for row in evicts}) == BATCH
    # separators join theirs, and more than there is room for
    assert len(set(sizes[0, 1:][evicts[0]])) > 1
    most = PUBLISHED.initial_tokens + PUBLISHED.separators + PUBLISHED.window
    assert np.all(sizes[2, 1:][evicts[2]] == most)


class Used(NamedTuple):
    read: Any
    resident: Any


def published(attention, tokens, **changes):
    """Outputs, entries read by and resident after each token, and the model's parameters."""
    config = config_of(attention=attention, **changes)
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


def test_without_limit_it_is_dense():
    for positions in ("absolute", "compact"):
        attention = dataclasses.replace(PUBLISHED, cache_entries=LENGTH, positions=positions)
        assert isinstance(kind_of(attention), PublishedCache)
        outputs, entries, parameters = published(attention, TOKENS)
        graph, _ = random_model(config_of(attention=DenseAttention()))
        close(outputs, np.asarray(hidden(graph, parameters, TOKENS)))
        np.testing.assert_array_equal(entries.read[:, 0], np.arange(1, LENGTH + 1))


def test_without_separators_it_is_streamingllm():
    """With initial + window = entries, a token attends one more than stays: a window of n + 1."""
    for positions in ("absolute", "compact"):
        attention = dataclasses.replace(
            PUBLISHED, separators=None, separator_ids=(), cache_entries=8, positions=positions
        )
        outputs, _, parameters = published(attention, TOKENS, layers=1)
        streaming = SeparatorAttention(
            window=7, initial_tokens=2, separator_ids=(), positions=positions
        )
        graph, _ = random_model(config_of(attention=streaming, layers=1))
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
def test_its_entries_average_what_the_paper_says(sizes, mean):
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


def test_rows_evict_each_on_their_own():
    """The public SepCache keeps as many separators in every row as the row with the fewest has."""
    tokens = TOKENS.copy()
    tokens[1] = 1  # a row without separators
    outputs, entries, _ = published(PUBLISHED, tokens)
    others, other_entries, _ = published(PUBLISHED, TOKENS)
    np.testing.assert_array_equal(outputs[::2], others[::2])
    np.testing.assert_array_equal(entries.resident[:, ::2], other_entries.resident[:, ::2])
    assert np.any(entries.resident[:, 0] != entries.resident[:, 1])


def test_keys_are_turned_once():
    """The public SepCache writes turned keys back, and turns them again each step."""
    config = config_of(attention=PUBLISHED, layers=1)
    step, cache = extending(config, random_model(config)[1]), empty_cache(config, BATCH, LENGTH)
    keys = []
    for token in range(14):
        _, cache = step(TOKENS[:, token : token + 1], cache)
        keys.append(np.asarray(cache.layers[0].arrays[0].keys))
    for before, after in itertools.pairwise(keys):
        filled = np.any(before != 0, axis=(0, 2, 3))
        np.testing.assert_array_equal(after[:, filled], before[:, filled])
