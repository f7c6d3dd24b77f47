"""Names of the hub, with a hub that only pretends."""

import shutil
from pathlib import Path

import pytest
from hugging_face import make_run
from tiny_run import files_of, refused, seqeff
from variants import llama

from seqeff.interop import hub
from seqeff.runs import RunDirectory

pytestmark = pytest.mark.usefixtures("quick_compilation")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run = make_run(folder / "run", llama())
    assert seqeff("export", run.path, "--to", "hf").status == 0
    return run.path / "hf"


@pytest.fixture
def downloads(saved, tmp_path, monkeypatch):
    """What was asked for; the answer is a copy of a model."""
    asked = []
    snapshot = tmp_path / COMMIT

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns))
        shutil.copytree(saved, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_name_is_downloaded(downloads, tmp_path):
    result = seqeff("import", "owner/a-model@main", tmp_path / "run")
    assert result.status == 0, result.errors
    assert [(name, revision) for name, revision, _ in downloads] == [("owner/a-model", "main")]
    first = RunDirectory(tmp_path / "run").config.read_text().partition("\n")[0]
    assert first == f"# imported from owner/a-model@{COMMIT}"


def test_files_of_pytorch_are_asked_for_where_there_are_no_others(downloads, saved, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    hub.pull("owner/model")
    assert [patterns for *_, patterns in downloads][1] == ["pytorch_model*.bin"]


def test_what_is_a_name():
    assert hub.is_name("EleutherAI/pythia-160m")
    assert hub.is_name("EleutherAI/pythia-160m@refs/pr/1")
    for other in ("pythia", "/a/b", "./a", "../a", "a/b/c", "", "~/a"):
        assert not hub.is_name(other)


def test_a_directory_comes_before_a_name(downloads, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "owner/model")
    assert seqeff("import", "owner/model", tmp_path / "run").status == 0
    assert not downloads


def test_no_network_is_told(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("Name or service not known.\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    line = refused("import", "owner/model", tmp_path / "run")
    assert line.startswith(
        "cannot get owner/model from the Hugging Face hub: Name or service not known; "
    )
    assert not (tmp_path / "run").exists()


def test_upload(saved, tmp_path, monkeypatch):
    run = saved.parent
    uploaded = {}

    class Api:
        def create_repo(self, name, private, exist_ok):
            assert private
            assert exist_ok
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path):
            uploaded[repo_id] = files_of(folder_path)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    arguments = ("export", run, "--to", "hf", "--push", "me/mine", "--output")
    result = seqeff(*arguments, tmp_path / "out")
    assert result.output.splitlines()[-1] == "https://hub/me/mine"
    assert uploaded["me/mine"] == files_of(tmp_path / "out")

    def fail(*_, **__):
        raise PermissionError("401 Client Error")

    with monkeypatch.context() as patch:
        patch.setattr(Api, "create_repo", fail)
        line = refused(*arguments, tmp_path / "again")
    assert "as me/mine: 401 Client Error; see to the network and to `hf auth login`, and" in line
    left = files_of(tmp_path / "again")
    uploaded.clear()

    # what is there is uploaded, if it is what would be written
    result = seqeff(*arguments, tmp_path / "again")
    assert result.status == 0, result.errors
    said = f"{tmp_path / 'again'} holds this export already", "https://hub/me/mine"
    assert tuple(result.output.splitlines()) == said
    assert uploaded["me/mine"] == files_of(tmp_path / "again") == left
    uploaded.clear()
    line = refused(*arguments, tmp_path / "again", "--dtype", "bfloat16")
    expected = "exists already, with another content; give another --output"
    assert line == f"{tmp_path / 'again'} {expected}"
    (tmp_path / "again/further").touch()
    assert "exists already, with another content" in refused(*arguments, tmp_path / "again")
    assert not uploaded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


@pytest.mark.parametrize("name", ["mine", "me/mine@main", "a/b/c", ""])
def test_names_that_cannot_be_uploaded(saved, tmp_path, no_devices, name):
    line = refused("export", saved.parent, "--to", "hf", "--output", tmp_path / "x", "--push", name)
    assert line == f"--push {name} is no name of the hub: give OWNER/NAME".replace("  ", " ")
    assert not (tmp_path / "x").exists()
