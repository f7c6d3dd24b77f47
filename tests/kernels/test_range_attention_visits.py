"""The tiles of rows that a tile of entries visits, against a count over all pairs of tiles."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from seqeff_kernels.range_attention import TokenSource, triton
from seqeff_kernels.range_attention.sources import ListedSource
from seqeff_kernels.range_attention.visits import row_tile_visits

LENGTH, TILE_ENTRIES = 75, 16


def token_bounds(document_start, window):
    like = jnp.zeros((1, LENGTH, 1, 1))
    start = jnp.broadcast_to(jnp.asarray(document_start), (1, LENGTH))
    return [b[0] for b in TokenSource(like, like, start, window).bounds(LENGTH)]


def all_bounds():
    """Start and end of [cases, KV heads, rows], which never decrease; entries as many as rows."""
    random = np.random.default_rng(0)
    cases = []
    for most in (LENGTH + 1, LENGTH // 2):
        start, end = np.sort(random.integers(0, most, (2, 40, LENGTH)), -1)
        # any, without empty rows, and in runs that stay
        cases += [(start, end), (start, np.maximum(start, end)), (start // 20 * 20, end // 30 * 30)]
        cases += [(end * 0, end), (start, start * 0 + LENGTH), (start, start)]
    token = np.arange(LENGTH)
    documents = token // 23 * 23
    for window in (None, 1, 9, 40):
        # no documents, left padding, packed documents, one that ends before the row does
        for document_start in (0, 41, documents, np.where(token < 50, 0, 50)):
            cases.append(token_bounds(document_start, window))
    start, end = (np.concatenate(bounds) for bounds in zip(*cases, strict=True))
    assert (np.diff(start) >= 0).all() and (np.diff(end) >= 0).all()
    return start.reshape(-1, 2, LENGTH), end.reshape(-1, 2, LENGTH)


def padded(bound, tile_rows):
    return np.pad(bound, ((0, 0), (0, 0), (0, -LENGTH % tile_rows)), mode="edge")


@pytest.mark.parametrize("tile_rows", [1, 8, 32, 128])
def test_visits_equal_a_count_over_all_pairs_of_tiles(tile_rows):
    start, end = (padded(bound, tile_rows) for bound in all_bounds())
    # of the last tiles, one is cut off and one has no entries
    low = np.arange(0, LENGTH + TILE_ENTRIES, TILE_ENTRIES)
    high = np.minimum(low + TILE_ENTRIES, LENGTH)
    found = row_tile_visits(*map(jnp.asarray, (start, end, low, high)), tile_rows)
    start, end = (b.reshape(*b.shape[:2], 1, -1, tile_rows) for b in (start, end))
    low, high = low[:, None], high[:, None]
    counted = (
        end.max(-1) <= low,
        end.min(-1) < high,
        start.max(-1) <= low,
        start.min(-1) < high,
    )
    np.testing.assert_array_equal(found, np.stack([mask.sum(-1) for mask in counted], -1))


@pytest.mark.parametrize("tile_rows", [1, 8, 32, 128])
def test_no_row_is_passed_over_and_full_tiles_need_no_mask(tile_rows):
    start, end = all_bounds()
    like = jnp.zeros((1, LENGTH, 1, 8))
    source = ListedSource(None, like, like, jnp.asarray(start), jnp.asarray(end))
    visits = np.asarray(triton._row_visits(source, LENGTH, tile_rows, TILE_ENTRIES))
    whole = 0
    for tile in range(visits.shape[2]):
        entry = np.arange(tile * TILE_ENTRIES, min((tile + 1) * TILE_ENTRIES, LENGTH))[:, None]
        for line in np.ndindex(*visits.shape[:2]):
            first, full_first, full_last, last = visits[(*line, tile)]
            attended = (start[line] <= entry) & (entry < end[line])
            touching = np.flatnonzero(attended.any(0))
            assert ((first <= touching) & (touching < last)).all()
            if full_first < full_last:
                # none that the last row cuts off
                assert full_last <= LENGTH and attended[:, full_first:full_last].all()
                whole += 1
    assert whole or tile_rows > LENGTH
