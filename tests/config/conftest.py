import sys
import textwrap

import pytest
from gin_files import BASE, MODELS, TRAINING, write

from seqeff import config


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    package = folder / "lab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(textwrap.dedent(MODELS))
    (package / "training.py").write_text(textwrap.dedent(TRAINING))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "PACKAGES", ("lab", "lab.absent", "absent"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.gin", BASE)
    return tmp_path
