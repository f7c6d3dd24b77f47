from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqeff.checks import ConfigError
from seqeff.data import batches as batches_module
from seqeff.data.batch import Batch
from seqeff.data.batches import Batches, EvaluationBatches, _shares, permutation_of

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30)
packings = st.sampled_from(["split", "whole"])


def documents_of(store):
    return [store.document(index).tolist() for index in range(len(store.lengths))]


def naive_rows(store, length, packing):
    """Rows of (token, target, weight, document_start), padding included, documents in order."""
    rows, row = [], []
    prompts = store.prompt_lengths if store.prompt_lengths is not None else [0] * 10**6
    for document, prompt in zip(documents_of(store), prompts, strict=False):
        entries = [0, *document]
        scored = [float(index >= prompt) for index in range(len(entries))]
        positions = list(zip(entries, [*document, 0], scored, strict=True))
        if packing == "whole" and len(entries) <= length and len(row) + len(entries) > length:
            rows.append(row)
            row = []
        if packing == "whole" and len(entries) > length and row:
            rows.append(row)
            row = []
        start = len(row)
        for position in positions:
            if len(row) == length:
                rows.append(row)
                row, start = [], 0
            row.append((*position, start))
    rows.append(row)
    return [row + [(0, 0, 0.0, len(row))] * (length - len(row)) for row in rows]


def assert_rows(batches: list[Batch], rows):
    for field, name in enumerate(Batch._fields):
        found = np.concatenate([getattr(batch, name) for batch in batches])
        expected = np.array([[position[field] for position in row] for row in rows])
        np.testing.assert_array_equal(found[: len(rows)], expected, err_msg=name)
        # what follows the rows is padding that is one document of its own
        assert not found[len(rows) :].any(), name


def assert_complete(batches: list[Batch], store, packing, length):
    """Every document is there exactly once, whatever the order."""
    real = np.concatenate([batch.loss_weights for batch in batches]) > 0
    tokens = np.concatenate([batch.tokens for batch in batches])[real]
    targets = np.concatenate([batch.targets for batch in batches])[real]
    expected = [pair for d in documents_of(store) for pair in zip([0, *d], [*d, 0], strict=True)]
    assert sorted(zip(tokens.tolist(), targets.tolist(), strict=True)) == sorted(expected)
    following = dict(zip(tokens.tolist(), targets.tolist(), strict=True))
    for batch in batches:
        for row in range(len(batch.tokens)):
            used = int((batch.loss_weights[row] > 0).sum())
            row_tokens, row_targets = batch.tokens[row, :used], batch.targets[row, :used]
            np.testing.assert_array_equal(row_tokens[1:], row_targets[:-1])
            naive_start = np.zeros(length, int)
            for index in range(1, used):
                opens = row_tokens[index] == 0
                naive_start[index] = index if opens else naive_start[index - 1]
            naive_start[used:] = used
            np.testing.assert_array_equal(batch.document_start[row], naive_start)
            if packing == "whole" and used and row_tokens[0] != 0:
                owner = next(d for d in documents_of(store) if row_tokens[0] in d)
                assert len(owner) + 1 > length
            if packing == "whole" and used and row_targets[-1] != 0:
                owner = next(d for d in documents_of(store) if row_targets[-1] in d)
                assert len(owner) + 1 > length
    assert len(following) <= sum(map(len, documents_of(store))) + 1


@settings(max_examples=60, deadline=None)
@given(lengths, packings, st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.data())
def test_evaluation_equals_the_naive_rows(
    make_store, lengths, packing, length, batch_size, seed, data
):
    prompts = [data.draw(st.integers(0, length)) for length in lengths]
    store = make_store(lengths, prompts, shard_tokens=data.draw(st.sampled_from([1, 30, 1000])))
    batches = EvaluationBatches(
        [store], sequence_length=length, batch_size=batch_size, packing=packing
    )
    rows = naive_rows(store, length, packing)
    assert len(batches) == -(-len(rows) // batch_size)
    assert_rows([batches(step) for step in range(len(batches))], rows)


@settings(max_examples=60, deadline=None)
@given(
    lengths,
    packings,
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**63 - 1),
    st.sampled_from([1, 30, 1000]),
)
def test_an_epoch_holds_every_document_once_for_any_number_of_hosts(
    make_store, lengths, packing, length, rows_per_host, hosts, seed, shard_tokens
):
    store = make_store(lengths, shard_tokens=shard_tokens)
    batches = Batches(
        [store],
        sequence_length=length,
        batch_size=rows_per_host * hosts,
        seed=seed,
        packing=packing,
    )
    steps = batches.steps_per_epoch
    for epoch in (0, 1):
        parts = [
            batches.rows(step, host * rows_per_host, (host + 1) * rows_per_host)
            for step in range(epoch * steps, (epoch + 1) * steps)
            for host in range(hosts)
        ]
        assert {part.tokens.shape for part in parts} == {(rows_per_host, length)}
        assert_complete(parts, store, packing, length)


def test_documents_are_told_by_one_hash(make_store):
    stores = [make_store([63, 5]), make_store([40] * 9, first=2000)]
    for store, name in zip(stores, "ab", strict=True):
        store.part = store.part._replace(content=name * 64)

    def told(*stores):
        return EvaluationBatches(stores, sequence_length=16, batch_size=7).sha256

    assert told(stores[0]) == stores[0].part.content
    both = told(*stores)
    assert len(both) == 64
    assert len({both, told(*stores[::-1]), *(store.part.content for store in stores)}) == 4


@pytest.mark.parametrize("kind", [Batches, EvaluationBatches])
def test_any_rows_are_those_of_the_whole_batch(make_store, kind):
    stores = [make_store([63, 1000, 5, 17]), make_store([40] * 9, first=2000)]
    seed = {"seed": 3} if kind is Batches else {}
    batches = kind(stores, sequence_length=16, batch_size=7, **seed)
    # the last step of the evaluation is padded
    for step in (0, 2, 13):
        whole = batches(step)
        for start, stop in ((0, 3), (3, 4), (4, 7), (1, 6)):
            for found, expected in zip(batches.rows(step, start, stop), whole, strict=True):
                np.testing.assert_array_equal(found, expected[start:stop])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"sequence_length": -1}, "sequence_length = -1 must be at least 1"),
        ({"packing": "hole"}, "packing = 'hole' must be one of split, whole"),
        ({"stores": []}, "at least one store"),
        ({"weights": [1.0, 2.0]}, r"weights = \[1.0, 2.0\] for 1 stores; give one weight a store"),
    ],
)
def test_values_that_cannot_be(make_store, changes, message):
    arguments = {"stores": [make_store([5])], "sequence_length": 4, "batch_size": 2} | changes
    with pytest.raises(ConfigError, match=message):
        Batches(**arguments, seed=0)
    if "weights" not in changes:
        with pytest.raises(ConfigError, match=message):
            EvaluationBatches(**arguments)


def test_another_thread_may_ask_for_another_epoch_meanwhile(make_store, monkeypatch):
    store = make_store([63, 7, 30])
    made = {"sequence_length": 16, "batch_size": 4, "seed": 0}
    expected = [Batches([store], **made)(step) for step in range(3)]
    batches, pack, asked = Batches([store], **made), batches_module.PACKINGS["split"], []
    assert batches.steps_per_epoch == 2

    def interrupted(*arguments):
        if not asked:
            asked.append(None)
            asked[0] = batches(2)
        return pack(*arguments)

    monkeypatch.setitem(batches_module.PACKINGS, "split", interrupted)
    for found, wanted in ((batches(0), expected[0]), (asked[0], expected[2])):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("packing", ["split", "whole"])
@pytest.mark.parametrize("stores", [1, 3])
def test_batches_depend_on_seed_and_step_alone(make_store, packing, stores):
    opened = [make_store([63, 7, 30, 1, 12] * 4) for _ in range(stores)]
    arguments = {"sequence_length": 16, "batch_size": 5, "seed": 11, "packing": packing}
    in_order = Batches(opened, **arguments)
    expected = [in_order(step) for step in range(60)]
    for step in np.random.default_rng(0).permutation(60):
        fresh = Batches(opened, **arguments)(int(step))
        for found, wanted in zip(fresh, expected[step], strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("packing", ["split", "whole"])
def test_epochs_and_seeds_differ(make_store, packing):
    store = make_store([20] * 100)

    def epoch(seed, number):
        batches = Batches([store], sequence_length=21, batch_size=10, seed=seed, packing=packing)
        steps = range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch)
        return np.concatenate([batches(step).tokens for step in steps])

    epochs = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    for index, one in enumerate(epochs):
        # a document a row: after sorting rows by their first word, all orders agree
        assert sorted(map(tuple, one)) == sorted(map(tuple, epochs[0]))
        for other in epochs[index + 1 :]:
            assert (one[:, 1] == other[:, 1]).mean() < 0.1
    neighbours = np.diff(epochs[0][:, 1])
    assert (neighbours == 20).mean() < 0.1


def test_split_packing_moves_the_cuts_between_epochs(make_store):
    store = make_store([13, 29, 8, 40, 3, 17])
    batches = Batches([store], sequence_length=16, batch_size=1, seed=0)
    steps = batches.steps_per_epoch
    first = {tuple(batches(step).tokens[0]) for step in range(steps)}
    second = {tuple(batches(step).tokens[0]) for step in range(steps, 2 * steps)}
    assert first != second


def test_rows_of_long_documents_are_shuffled(make_store):
    store = make_store([1000, 1000])
    batches = Batches([store], sequence_length=10, batch_size=200, seed=0)
    first = batches(0).tokens[:, 1]
    assert (np.diff(first) == 10).mean() < 0.1


def test_prompts_carry_no_loss(make_store):
    store = make_store([5, 3], prompts=[2, 0])
    batch = EvaluationBatches([store], sequence_length=10, batch_size=1)(0)
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4, 5, 0, 6, 7, 8]]
    assert batch.targets.tolist() == [[1, 2, 3, 4, 5, 0, 6, 7, 8, 0]]
    assert batch.loss_weights.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert batch.document_start.tolist() == [[0] * 6 + [6] * 4]


def test_documents_need_not_be_separated(make_store):
    batches = Batches(
        [make_store([5, 3])],
        sequence_length=4,
        batch_size=2,
        seed=0,
        separate_documents=False,
    )
    assert batches(0).document_start is None
    assert [array.dtype for array in batches(0)[:3]] == [np.int32, np.int32, np.float32]


def test_a_mixture_keeps_its_shares_and_its_sources_epochs(make_store):
    # a row is one document, so its first word names it
    sizes, weights = [50, 400, 7], [0.25, 0.7, 0.05]
    stores = [make_store([1] * size, first=1 + 1000 * number) for number, size in enumerate(sizes)]
    batches = Batches(stores, weights=weights, sequence_length=2, batch_size=64, seed=5)
    assert batches.steps_per_epoch is None
    words = np.concatenate([batches(step).tokens[:, 1] for step in range(64)])
    for block in words.reshape(2, 2048):
        counts = np.bincount(block // 1000, minlength=3)
        np.testing.assert_array_equal(counts, [512, 1434, 102])
    for number, size in enumerate(sizes):
        own = words[words // 1000 == number]
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size


@given(st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=50))
def test_shares_fill_a_block_and_none_is_empty(weights):
    shares = _shares(weights)
    exact = np.array(weights) / sum(weights) * 2048
    assert shares.sum() == 2048
    assert shares.min() >= 1
    # raising the smallest to one row costs the others at most as many rows
    assert np.abs(shares - exact).max() < 1 + (exact < 1).sum()


def test_the_permutation_is_the_same_on_every_platform_and_version():
    assert permutation_of(10, 42, 0, 7).tolist() == [2, 1, 0, 5, 8, 9, 4, 6, 7, 3]
    assert sorted(permutation_of(1000, 1, 1, 1)) == list(range(1000))
