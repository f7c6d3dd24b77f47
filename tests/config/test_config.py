import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap

import gin
import pytest
from gin_files import BASE, loaded, message, train, with_base, write

from seqeff import config
from seqeff.checks import UserError


def test_builds_plain_instances_of_the_classes_themselves():
    from lab.models import DenseAttention, Model
    from lab.training import AdamW, Train

    root = train()
    expected = Train(
        model=Model(width=64, attention=DenseAttention()), optimizer=AdamW(learning_rate=1e-3)
    )
    assert root == expected
    assert type(root) is Train
    assert type(root.model) is Model
    assert pickle.loads(pickle.dumps(root)) == root
    assert copy.deepcopy(root) == root
    assert hash(dataclasses.replace(root.model, width=128)) != hash(root.model)


def test_replace_and_direct_construction_know_nothing_of_the_bindings():
    from lab.models import DenseAttention, Model

    root = train("Model.heads=2")
    assert dataclasses.replace(root.model, width=32).heads == 2
    assert Model(width=8, attention=DenseAttention()).heads == 4


def test_leaves_gin_as_it_found_it():
    before = set(dict(gin.config._REGISTRY.items()))
    train()
    message(with_base("Train.stpes = 5"))
    assert set(dict(gin.config._REGISTRY.items())) == before
    assert gin.config_str() == ""
    assert gin.operative_config_str() == ""


def test_loads_many_configs_in_one_process():
    assert train("Train.steps=5").steps == 5
    assert train().steps == 100
    message(with_base("Train.steps = 'five'"))
    assert train() == train()


def test_scopes_give_two_objects_of_one_class_their_own_values():
    root = loaded(
        with_base("""
        Train.sources = (@books/TextFiles(), @news/TextFiles())
        books/TextFiles.path = 'books'
        news/TextFiles.path = 'news'
        TextFiles.weight = 2.0
        """)
    ).root
    assert [(s.path, s.weight) for s in root.sources] == [("books", 2.0), ("news", 2.0)]


def test_macros_and_lists():
    root = loaded(
        with_base("""
        STEPS = 7
        Train.steps = %STEPS
        Train.shape = [%STEPS, 3]
        Train.limits = {'loss': 2, 'norm': 1.5}
        """)
    ).root
    assert root.steps == 7
    assert root.shape == (7, 3)
    assert root.limits == {"loss": 2, "norm": 1.5}


def test_binding_blocks():
    assert loaded("Train:\n  steps = 3\n  note = 'n'\n" + textwrap.dedent(BASE)).root.steps == 3


def test_a_default_that_is_a_config_takes_its_own_bindings():
    result = loaded(with_base("RMSNorm.epsilon = 1e-3"))
    assert result.root.model.norm.epsilon == 1e-3
    assert "Model.norm = @RMSNorm()" in result.operative


def test_another_root():
    assert (
        loaded("Model.width = 8\nModel.attention = @DenseAttention()", root="Model").root.width == 8
    )
    assert (
        message("", root="Trian") == "x.gin: no config class is called Trian; did you mean Train?"
    )


def test_include_is_relative_to_the_file_that_includes(folder, monkeypatch):
    write(folder / "configs/paper/run.gin", "include '../models/small.gin'\nTrain.steps = 3")
    write(folder / "configs/models/small.gin", "include 'parts/base.gin'\nModel.heads = 8")
    write(folder / "configs/models/parts/base.gin", BASE)
    monkeypatch.chdir(folder.parent)
    path = os.path.relpath(folder / "configs/paper/run.gin")
    result = config.load(path)
    assert (result.root.steps, result.root.model.heads) == (3, 8)
    names = [line[2:] for line in result.text.splitlines() if line.endswith(".gin")]
    assert names == [
        path,
        os.path.relpath(folder / "configs/models/small.gin"),
        os.path.relpath(folder / "configs/models/parts/base.gin"),
    ]
    assert "Model.heads = 8" in result.text


def test_missing_include_names_includer_line_and_nearest_file(folder):
    write(folder / "models/small.gin", "")
    assert message("# small\ninclude 'models/smal.gin'") == (
        "x.gin:2: no file models/smal.gin; did you mean models/small.gin?"
    )
    assert message("include 'modles/small.gin'") == (
        "x.gin:1: no file modles/small.gin; did you mean models?"
    )


def test_missing_or_unreadable_file(folder):
    with pytest.raises(UserError, match=r"^no file bsae.gin; did you mean base.gin\?$"):
        config.load("bsae.gin")
    with pytest.raises(UserError, match=r"^cannot read \.: .*directory"):
        config.load(".")
    (folder / "binary.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"^cannot read binary\.gin: .*utf-8"):
        config.load("binary.gin")


def test_a_file_included_twice_is_read_once(folder):
    write(folder / "a.gin", "include 'base.gin'\nModel.width = 128")
    assert loaded("include 'a.gin'\ninclude 'base.gin'").root.model.width == 128


def test_a_file_cannot_include_itself(folder):
    write(folder / "a.gin", "include 'x.gin'")
    assert message("include 'a.gin'") == "a.gin:1: x.gin includes itself"


def test_an_error_in_an_included_file_is_placed_there(folder):
    write(folder / "a.gin", "\nTrain.stpes = 1")
    write(folder / "a.gin", "Train.steps = 1\nTrain.stpes = 1")
    assert message("include 'a.gin'").startswith("a.gin:2: Train has no field stpes")


FULL = """
    WINDOW = 32
    Model.attention = @SeparatorAttention()
    SeparatorAttention.window = %WINDOW
    Train.note = 'a long text of many words, which gin breaks into pieces over several lines'
    Train.sources = (@books/TextFiles(), @news/TextFiles())
    books/TextFiles.path = 'books'
    news/TextFiles.path = 'news'
    news/TextFiles.weight = 0.1
    Train.limits = {'b': 1e-30, 'a': -2.5}
"""


def test_operative_config_is_whole_and_loads_again(folder):
    write(folder / "dense.gin", BASE)
    write(folder / "full.gin", "include 'dense.gin'\n" + textwrap.dedent(FULL))
    first = config.load("full.gin", ["Train.steps=9"])
    for line in ("Train.steps = 9", "AdamW.b1 = 0.9", "news/TextFiles.weight = 0.1", "WINDOW = 32"):
        assert line in first.operative.splitlines()
    assert "include" not in first.operative
    assert first.overrides == ("Train.steps=9",)
    (folder / "dense.gin").unlink()
    again = loaded(first.operative)
    assert again.root == first.root
    assert again.operative == first.operative


def test_operative_text_does_not_depend_on_the_order_of_bindings():
    lines = [*textwrap.dedent(BASE).split("\n"), "Train.steps = 4"]
    assert loaded("\n".join(lines)).operative == loaded("\n".join(reversed(lines))).operative


def test_old_names_still_load(monkeypatch):
    old = loaded(with_base("Model.attention = @SeparatorAttention()")).operative
    old = old.replace("SeparatorAttention", "SepAttention").replace(".window", ".size")
    assert message(old).startswith("x.gin:")
    monkeypatch.setitem(config.ALIASES, "SepAttention", "SeparatorAttention")
    monkeypatch.setitem(config.ALIASES, "SeparatorAttention.size", "SeparatorAttention.window")
    result = loaded(old)
    assert result.root.model.attention.window == 64
    assert "SeparatorAttention.window = 64" in result.operative


@pytest.mark.parametrize("touches", [False, True])
def test_loading_touches_no_device(folder, touches):
    write(
        folder / "probe.py",
        f"""
        import dataclasses, jax
        @dataclasses.dataclass(frozen=True)
        class Probe:
            def __post_init__(self):
                {"jax.devices()" if touches else "pass"}
    """,
    )
    write(folder / "probe.gin", "import probe")
    program = "from seqeff.config import load; load('probe.gin', root='Probe')"
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert (done.returncode != 0) is touches, done.stderr.decode()


def test_others_are_built_beside_the_root():
    from lab.training import Muon

    found = loaded(with_base(""), "Muon.learning_rate=0.5", others=["Muon"])
    assert found.others == (Muon(learning_rate=0.5),) and found.root == train()
    with open("again.gin", "w") as file:
        file.write(found.operative)
    assert config.load("again.gin", others=["Muon"]).others == found.others
    # else nothing uses it
    assert "no Muon is built" in message(with_base(""), "Muon.learning_rate=0.5")
