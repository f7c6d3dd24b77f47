import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seqeff.checks import ConfigError, UserError
from seqeff.training import checkpoints
from seqeff.training.checkpoints import Checkpoints, CheckpointStore
from seqeff.training.mesh import MeshConfig

KEEP_ALL = Checkpoints(every=1, keep=100)


class Moments(NamedTuple):
    mu: dict[str, jax.Array]
    count: jax.Array


def make_state(step: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(step)
    weights = generator.normal(size=(8, 63)).astype(np.float32)
    weights[0, :4] = [np.nan, np.inf, -0.0, 1e-42]
    parameters = {
        "embedding": jnp.asarray(weights),
        "layers": {"scale": jnp.asarray(generator.normal(size=(16, 1000)), jnp.bfloat16)},
    }
    return {
        "parameters": parameters,
        "optimizer": (Moments({"embedding": jnp.asarray(weights + 1)}, jnp.int32(step)), ()),
        "accept": jnp.asarray(True),
        "key": jax.random.key(step),
    }


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def assert_same_bits(restored: Any, saved: Any) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert left.dtype == right.dtype
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_restores_the_same_bits_and_metadata(tmp_path: Path) -> None:
    state, metadata = make_state(7), {"tokens": 12, "config": {"a": [1, None, "x"]}}
    with CheckpointStore(tmp_path / "checkpoints", KEEP_ALL) as store:
        assert store.latest() is None
        store.save(7, state, metadata)
        store.wait()
        assert store.latest() == 7
    restored, found = CheckpointStore(tmp_path / "checkpoints").restore(None, abstract(state))
    assert_same_bits(restored, state)
    assert found == metadata


def test_donated_arrays_do_not_reach_the_checkpoint(tmp_path: Path) -> None:
    state = {"weights": jnp.ones((1000, 1000))}
    increase = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        for step in range(1, 6):
            store.save(step, state, {})
            state = increase(state)
        store.wait()
        for step in range(1, 6):
            restored, _ = store.restore(step, abstract(state))
            assert np.all(np.asarray(restored["weights"]) == step)


def test_restores_onto_another_mesh(tmp_path: Path) -> None:
    state = make_state()
    mesh = MeshConfig(data=2, fsdp=4).make()

    def shard(leaf: jax.Array, *axes: str) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*axes[: leaf.ndim])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    on_fsdp = jax.tree.map(lambda leaf: shard(leaf, "fsdp"), state)
    on_data = jax.tree.map(lambda leaf: shard(leaf, "data"), state)
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        store.save(1, state, {})
        from_one, _ = store.restore(1, on_fsdp)
        store.save(2, from_one, {})
        from_eight, _ = store.restore(2, on_data)
        back, _ = store.restore(2, abstract(state))
    assert len(from_one["parameters"]["embedding"].addressable_shards) == 8
    assert from_one["parameters"]["embedding"].addressable_shards[0].data.shape == (2, 63)
    assert from_eight["parameters"]["embedding"].addressable_shards[0].data.shape == (4, 63)
    for restored in (from_one, from_eight, back):
        assert_same_bits(restored, state)


def test_keeps_the_latest_and_the_permanent_ones(tmp_path: Path) -> None:
    state = {"weights": jnp.ones(3)}
    with CheckpointStore(tmp_path, Checkpoints(every=1, keep=2, keep_every=4)) as store:
        for step in range(1, 11):
            store.save(step, state, {})
    assert CheckpointStore(tmp_path).steps() == [4, 8, 9, 10]
    assert sorted(os.listdir(tmp_path)) == ["10", "4", "8", "9"]


def test_saves_on_schedule_and_at_the_end() -> None:
    config = Checkpoints(every=4)
    assert [step for step in range(1, 11) if config.due(step, 10)] == [4, 8, 10]


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        store.save(1, {"weights": jnp.zeros(3)}, {})
        store.save(1, {"weights": jnp.ones(3)}, {})
        restored, _ = store.restore(1, {"weights": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert not np.asarray(restored["weights"]).any()


def test_goes_on_from_an_earlier_step(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        for step in (1, 2, 3):
            store.save(step, {"weights": jnp.zeros(3)}, {})
        store.discard_after(1)
        assert store.steps() == [1]
        store.save(2, {"weights": jnp.ones(3)}, {})
        restored, _ = store.restore(2, {"weights": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert np.asarray(restored["weights"]).all()


def test_restores_a_part(tmp_path: Path) -> None:
    state = make_state()
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        store.save(1, state, {})
        part = {"parameters": abstract(state)["parameters"]}
        restored, _ = store.restore(1, part, partial=True)
        assert_same_bits(restored, {"parameters": state["parameters"]})
        with pytest.raises(UserError, match=r"key \(key<fry>\[\] there, absent here\)"):
            store.restore(1, part)


def test_names_the_arrays_that_differ(tmp_path: Path) -> None:
    state = make_state()
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        store.save(1, state, {})
        other = abstract(state)
        other["parameters"]["embedding"] = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        other["parameters"]["head"] = jax.ShapeDtypeStruct((3,), jnp.float32)
        other["accept"] = jax.ShapeDtypeStruct((), jnp.int32)
        del other["parameters"]["layers"]
        for partial in (False, True):
            with pytest.raises(UserError) as error:
                store.restore(1, other, partial=partial)
            message = str(error.value)
            assert "parameters.embedding (float32[8,63] there, float32[8,64] here)" in message
            assert "parameters.head (absent there, float32[3] here)" in message
            assert "accept (bool[] there, int32[] here)" in message
            assert ("parameters.layers.scale" in message) is not partial


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        CheckpointStore(tmp_path / "nowhere").restore(None, {})
    assert not (tmp_path / "nowhere").exists()
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        store.save(5, {"weights": jnp.zeros(3)}, {})
        with pytest.raises(UserError, match="no checkpoint of step 6; it has 5"):
            store.restore(6, {})


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damage_to_any_file_is_named(tmp_path: Path, damage: Any) -> None:
    state = {"weights": jnp.arange(1000.0)}
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        store.save(3, state, {})
        store.save(4, state, {"tokens": 12})
        store.wait()
        files = [file for file in (tmp_path / "4").rglob("*") if file.is_file()]
        assert len(files) > 3
        for file in files:
            content = file.read_bytes()
            if not content and damage is not Path.unlink:
                continue
            damage(file)
            with pytest.raises(UserError, match=r"4 is damaged .*add --checkpoint 3") as error:
                store.restore(None, abstract(state))
            assert file.name in str(error.value)
            file.write_bytes(content)
        store.restore(None, abstract(state))
        os.truncate(tmp_path / "3" / "manifest.json", 9)
        with pytest.raises(UserError, match="no earlier one is kept"):
            store.restore(3, abstract(state))


def test_a_file_that_cannot_be_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"weights": jnp.arange(63.0)}

    def fail(file: Path) -> int:
        raise OSError(5, os.strerror(5), str(file))

    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        store.save(3, state, {})
        store.save(4, state, {})
        store.wait()
        monkeypatch.setattr(checkpoints, "_crc32", fail)
        with pytest.raises(UserError, match=r"4 is damaged .*Input/output .*add --checkpoint 3"):
            store.restore(None, state)


# kills itself: while Orbax writes, before the rename, after it, and while an old one is deleted
DYING = textwrap.dedent(
    """
    import os, pathlib, shutil, signal, sys, threading
    import jax, jax.numpy as jnp
    from seqeff.training import checkpoints

    directory, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store = checkpoints.CheckpointStore(directory, checkpoints.Checkpoints(every=1, keep=1))
    store.save(1, {"weights": jnp.full((63, 1000), 1.0)}, {})
    store.wait()

    def die_while_writing():
        while not any(p.is_file() for p in directory.glob(".saving-2/**/d/*")):
            pass
        die()

    def die_while_deleting(path, **_):
        next(p for p in path.rglob("*") if p.is_file()).unlink()
        die()

    if moment == "write":
        threading.Thread(target=die_while_writing, daemon=True).start()
    elif moment == "checksum":
        checkpoints._crc32 = die
    elif moment == "manifest":
        checkpoints._synchronise = die
    elif moment == "rename":
        checkpoints._synchronise = lambda path: path == directory and die()
    elif moment == "delete":
        shutil.rmtree = die_while_deleting
    store.save(2, {"weights": jnp.full((63, 1000), 2.0)}, {})
    store.wait()
    """
)


def run_python(
    code: str, *arguments: str, environment: Mapping[str, str] = {}
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=dict(os.environ) | environment
    )


def test_killed_while_saving(tmp_path: Path) -> None:
    moments = ("write", "checksum", "manifest", "rename", "delete")
    children = [run_python(DYING, str(tmp_path / moment), moment) for moment in moments]
    wanted = {"weights": jax.ShapeDtypeStruct((63, 1000), jnp.float32)}
    for moment, child in zip(moments, children, strict=True):
        _, errors = child.communicate(timeout=120)
        assert child.returncode == -signal.SIGKILL, errors
        directory = tmp_path / moment
        assert any(path.name.startswith(".") for path in directory.iterdir()) is (
            moment != "rename"
        )
        expected = {"rename": [1, 2], "delete": [2]}.get(moment, [1])
        assert CheckpointStore(directory).steps() == expected
        with CheckpointStore(directory, KEEP_ALL) as store:
            assert sorted(os.listdir(directory)) == [str(step) for step in expected]
            for step in expected:
                restored, _ = store.restore(step, wanted)
                assert np.all(np.asarray(restored["weights"]) == step)
            store.save(3, restored, {})
        assert CheckpointStore(directory).latest() == 3


SAVING = textwrap.dedent(
    """
    import sys
    import jax.numpy as jnp
    from seqeff.training.checkpoints import Checkpoints, CheckpointStore

    with CheckpointStore(sys.argv[1], Checkpoints(every=1, keep=2)) as store:
        print("ready", file=sys.stderr, flush=True)
        for step in range(1, 1000):
            store.save(step, {f"weights{i}": jnp.full((500, 1000), step) for i in range(8)}, {})
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", np.random.default_rng(0).uniform(0, 1.5, size=20).round(3))
def test_killed_at_any_moment(tmp_path: Path, seconds: float) -> None:
    child = run_python(SAVING, str(tmp_path))
    assert child.stderr is not None
    assert child.stderr.readline() == "ready\n"
    threading.Event().wait(seconds)
    child.kill()
    child.communicate()
    wanted = {f"weights{i}": jax.ShapeDtypeStruct((500, 1000), jnp.int32) for i in range(8)}
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        assert sorted(os.listdir(tmp_path)) == sorted(map(str, store.steps()))
        for step in store.steps():
            restored, _ = store.restore(step, wanted)
            assert all(np.all(np.asarray(leaf) == step) for leaf in restored.values())


FULL_DISK = textwrap.dedent(
    """
    import resource, sys
    import jax.numpy as jnp
    from seqeff.checks import UserError
    from seqeff.training.checkpoints import Checkpoints, CheckpointStore

    with CheckpointStore(sys.argv[1], Checkpoints(every=1)) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        store.save(1, {"small": jnp.ones(9)}, {})
        store.wait()
        store.save(2, {"large": jnp.ones((500, 1000))}, {})
        try:
            store.wait()
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
    """
)


def test_a_file_that_cannot_grow_is_a_user_error(tmp_path: Path) -> None:
    child = run_python(FULL_DISK, str(tmp_path))
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 2, errors
    assert errors.startswith(f"cannot write checkpoint {tmp_path}/.saving-2: File too large")
    assert errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["1"]


def test_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoint .*Not a directory"):
        CheckpointStore(tmp_path / "file" / "checkpoints", KEEP_ALL)


def test_config_checks() -> None:
    with pytest.raises(ConfigError, match=r"Checkpoints.keep = 0"):
        Checkpoints(keep=0)
    with pytest.raises(ConfigError, match=r"Checkpoints.every"):
        Checkpoints(every=1.5)  # type: ignore[arg-type]


# two processes of two devices each save one array that they share, and a copied one
TWO_PROCESSES = textwrap.dedent(
    """
    import os, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from seqeff.training.checkpoints import Checkpoints, CheckpointStore
    from seqeff.training.mesh import MeshConfig, replicated

    MeshConfig().initialise_distributed()
    assert jax.process_count() == 2 and jax.device_count() == 4
    mesh = MeshConfig(data=2, fsdp=2).make()
    both = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    places = {"weights": both, "count": replicated(mesh)}

    def state(step):
        values = {"weights": np.arange(64.0, dtype=np.float32).reshape(8, 8) + step, "count": step}
        return {
            name: jax.make_array_from_callback(
                np.shape(value), places[name], lambda index, value=value: np.asarray(value)[index]
            )
            for name, value in values.items()
        }

    with CheckpointStore(sys.argv[1], Checkpoints(every=1, keep=2)) as store:
        for step in (1, 2, 3):
            store.save(step, state(step), {"step": step})
    with CheckpointStore(sys.argv[1]) as store:
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in state(0).items()
        }
        restored, _ = store.restore(2, abstract)
        for name, leaf in state(2).items():
            for left, right in zip(leaf.addressable_shards, restored[name].addressable_shards):
                assert np.array_equal(left.data, right.data)
    """
)


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = []
    for index in range(2):
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        children.append(run_python(TWO_PROCESSES, str(tmp_path), environment=environment))
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]
    wanted = {
        "weights": jax.ShapeDtypeStruct((8, 8), jnp.float32),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    restored, metadata = CheckpointStore(tmp_path).restore(None, wanted)
    assert metadata == {"step": 3}
    assert np.array_equal(restored["weights"], np.arange(64.0).reshape(8, 8) + 3)
