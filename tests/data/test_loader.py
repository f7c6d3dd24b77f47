from __future__ import annotations

import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seqeff.checks import ConfigError
from seqeff.data.batches import Batches, EvaluationBatches
from seqeff.data.loader import Loader, place

_ONE_OF_TWO_PROCESSES = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

port, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, process)

from pathlib import Path
from seqeff.data import Batches, TokenStore, place

batches = Batches([TokenStore(Path(sys.argv[3]), "train")], sequence_length=8, batch_size=8, seed=0)
expected = batches(3)
asked = []
rows = batches.rows
batches.rows = lambda step, start, stop: (asked.append((start, stop)), rows(step, start, stop))[1]
devices = np.array(jax.devices()).reshape(2, 2)
for order, spec, wanted in [
    (devices, PartitionSpec(("data", "tensor")), (4 * process, 4 * process + 4)),
    (devices, PartitionSpec("data"), (4 * process, 4 * process + 4)),
    (devices.T, PartitionSpec("data"), (0, 8)),
]:
    mesh = jax.sharding.Mesh(order, ("data", "tensor"))
    found = place(batches, 3, NamedSharding(mesh, spec))
    assert asked.pop() == wanted
    for name, array in found._asdict().items():
        assert array.shape == (8, 8)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, getattr(expected, name)[shard.index])
print("ok")
"""


@pytest.fixture
def batches(make_store):
    return Batches([make_store([63, 7, 30])], sequence_length=16, batch_size=8, seed=0)


def loaders():
    return [thread for thread in threading.enumerate() if thread.name == "seqeff-loader"]


def assert_equal(batch, expected):
    for found, wanted in zip(batch, expected, strict=True):
        assert isinstance(found, jax.Array)
        np.testing.assert_array_equal(found, wanted)


def test_steps_come_in_order_from_the_first_to_the_last(batches):
    with Loader(batches, 5, 9) as loader:
        found = list(loader)
    assert len(found) == 4
    for step, batch in enumerate(found, start=5):
        assert_equal(batch, batches(step))
    assert loaders() == []


def test_an_endless_loader_stops_when_it_is_closed(batches):
    loader = Loader(batches, prefetch=3)
    assert_equal(next(loader), batches(0))
    loader.close()
    loader.close()
    assert loaders() == []
    assert list(loader) == []


def test_no_more_than_prefetch_batches_wait(batches):
    read = []
    rows = batches.rows
    batches.rows = lambda step, start, stop: (read.append(step), rows(step, start, stop))[1]
    with Loader(batches, prefetch=2) as loader:
        deadline = time.monotonic() + 10
        while len(read) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        # two wait, and a third is in the thread's hands
        assert read == [0, 1, 2]
        next(loader)


def test_errors_reach_the_consumer(batches):
    rows = batches.rows

    def fail(step, start, stop):
        if step == 2:
            raise OSError("the disk is gone")
        return rows(step, start, stop)

    batches.rows = fail
    loader = Loader(batches)
    next(loader)
    next(loader)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
    assert loaders() == []
    with pytest.raises(StopIteration):
        next(loader)


def test_documents_that_are_not_separated(make_store):
    batches = EvaluationBatches(
        [make_store([9])], sequence_length=4, batch_size=2, separate_documents=False
    )
    with Loader(batches, last_step=len(batches)) as loader:
        assert [batch.document_start for batch in loader] == [None, None]


@pytest.mark.parametrize(
    "spec", [PartitionSpec("data"), PartitionSpec(), PartitionSpec(None, "data")]
)
def test_arrays_are_sharded_as_asked(batches, spec):
    sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), spec)
    with Loader(batches, 2, 4, sharding=sharding) as loader:
        for step, batch in enumerate(loader, start=2):
            assert_equal(batch, batches(step))
            assert all(array.sharding == sharding for array in batch)


def test_a_batch_that_does_not_divide_among_devices_is_refused(make_store):
    batches = Batches([make_store([63])], sequence_length=16, batch_size=7, seed=0)
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
    with pytest.raises(ConfigError, match=r"Data\.batch_size = 7 .* does not divide"):
        place(batches, 0, sharding)


def test_each_process_reads_the_rows_of_its_devices(make_store, unused_port):
    store = make_store([63, 7, 30, 100])
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _ONE_OF_TWO_PROCESSES,
                str(unused_port),
                str(process),
                str(store.directory.parent),
            ],
            env=single_device_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [output for output, _ in outputs] == ["ok\n"] * 2, outputs[0][1] + outputs[1][1]


def single_device_environment():
    import os

    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    return environment


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
