import pytest
from gin_files import loaded, message, train, with_base
from hypothesis import given
from hypothesis import strategies as st

from seqeff import config
from seqeff.checks import UserError


@pytest.mark.parametrize(
    ("override", "field", "expected"),
    [
        ("Train.deterministic=true", "deterministic", True),
        ("Train.deterministic=False", "deterministic", False),
        ("Train.note=null", "note", None),
        ("Train.note=None", "note", None),
        ("Train.note=cosine", "note", "cosine"),
        ("Train.note='quoted'", "note", "quoted"),
        ("Train.note=/data/a-b.txt", "note", "/data/a-b.txt"),
        ("Train.note=1.2.3", "note", "1.2.3"),
        ("Train.note=it's", "note", "it's"),
        ("Train.note=a=b", "note", "a=b"),
        ("Train.note=1\nTrain.steps = 2", "note", "1\nTrain.steps = 2"),
        ("Train.steps=3_000", "steps", 3000),
        ("Train.steps= 12 ", "steps", 12),
        ("Train.shape=[3, 4]", "shape", (3, 4)),
        ("Train.shape=(5,)", "shape", (5,)),
        ("Train.limits={'a': 1e-4}", "limits", {"a": 1e-4}),
        ("Train.limits={a: 1e-4, 'b:c': 2.0}", "limits", {"a": 1e-4, "b:c": 2.0}),
        ("Train.limits={}", "limits", {}),
    ],
)
def test_override_values(override, field, expected):
    value = getattr(train(override), field)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_with_references_lists_of_words_and_scopes():
    root = train(
        "Train.optimizer=@Muon()",
        "Muon.learning_rate=1e-4",
        "Model.attention=@SeparatorAttention()",
        "SeparatorAttention.separators=[., ';', a b, true_]",
        "Train.sources=[@a/TextFiles(), @b/TextFiles()]",
        "TextFiles.path=p",
        "b/TextFiles.weight=3",
    )
    assert root.optimizer.learning_rate == 1e-4
    assert root.model.attention.separators == (".", ";", "a b", "true_")
    assert [source.weight for source in root.sources] == [1.0, 3]


def test_errors_name_the_override():
    assert message(with_base(""), "Train.stpes=5") == (
        "--gin.Train.stpes=5: Train has no field stpes; did you mean steps?"
    )
    assert message(with_base(""), "Train.optimizer=@Muno()") == (
        "--gin.Train.optimizer=@Muno(): no config class is called Muno; did you mean Muon?"
    )
    for bad in ("Train.steps", "Train.steps=", "=3", "Train steps=3"):
        assert message(with_base(""), bad).startswith(f"--gin.{bad}: write --gin.NAME=VALUE")
    assert message(with_base(""), "Train.optimizer=@Muon(").startswith(
        "--gin.Train.optimizer=@Muon(: "
    )


def test_earlier_overrides(folder):
    earlier = folder / "overrides.txt"
    earlier.write_text("Train.steps=3\nTrain.tracker=@Wandb()\nWandb.project=p\nAdamW.b1=0.5\n")

    def load(*overrides):
        return config.load("base.gin", overrides, earlier=earlier)

    assert load().overrides == tuple(earlier.read_text().splitlines())
    result = load("Train.steps=4")
    assert (result.root.steps, result.root.tracker.project) == (4, "p")
    # what a new one replaces takes its bindings along
    result = load("Train.tracker=None", "AdamW.b1=0.6")
    assert result.root.tracker is None
    assert result.overrides == ("Train.steps=3", "Train.tracker=None", "AdamW.b1=0.6")
    earlier.write_text("Train.steps=3\nTrain.stpes=4\n")
    with pytest.raises(UserError, match=r"overrides\.txt:2: Train has no field stpes"):
        load()


def test_overrides_are_kept_with_absolute_paths_on_one_line(folder):
    text = with_base("FILE = 'a'\nTrain.corpus = @Corpus()\nCorpus.file = %FILE")
    given = ["FILE=b", "Corpus.patterns=[c/*.txt, /d/*]", "Train.note=two\nlines"]
    assert loaded(text, *given).overrides == (
        f"FILE='{folder}/b'",
        f"Corpus.patterns=('{folder}/c/*.txt', '/d/*')",
        "Train.note='two\\nlines'",
    )


def test_split_overrides():
    arguments = ["train", "x.gin", "--gin.A.b=1", "--dry-run", "--gin.s/A.c", "-2", "--gin.M=a b"]
    assert config.split_overrides(arguments) == (
        ["A.b=1", "s/A.c=-2", "M=a b"],
        ["train", "x.gin", "--dry-run"],
    )
    assert config.split_overrides(["a", "--", "--gin.A.b=1"]) == ([], ["a", "--", "--gin.A.b=1"])
    for arguments in (["--gin.A.b"], ["--gin.A.b", "--dry-run"]):
        with pytest.raises(UserError, match=r"^--gin.A.b has no value; write --gin.A.b=VALUE$"):
            config.split_overrides(arguments)


@given(
    st.lists(
        st.one_of(
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.booleans(),
            st.none(),
            st.text(max_size=8),
        ),
        max_size=4,
    )
)
def test_python_literals_pass_through_an_override_unchanged(values):
    statement = config.overrides.override_statement(f"A.b={values!r}")
    assert statement == f"A.b = {values!r}"


@given(st.text(alphabet="abz./:- \n", min_size=1, max_size=12).filter(str.strip))
def test_bare_words_become_strings(word):
    statement = config.overrides.override_statement(f"A.b={word}")
    assert statement == f"A.b = {word.strip()!r}"
