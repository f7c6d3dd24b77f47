import textwrap

import pytest
from gin_files import BASE, loaded, message, train, with_base, write

from seqeff import config


def test_unknown_class():
    assert message("Trian.steps = 1") == (
        "x.gin:1: no config class is called Trian; did you mean Train?"
    )
    assert message("Train.optimizer = @Adamw()").endswith("did you mean AdamW?")
    assert message("Zebra.steps = 1") == (
        "x.gin:1: no config class is called Zebra; import the module of this frozen dataclass"
    )


@pytest.mark.parametrize("name", ["Mutable", "_Private"])
def test_only_public_frozen_dataclasses_are_known(name):
    assert message(f"{name}.size = 1").startswith(f"x.gin:1: no config class is called {name}")


def test_unknown_field():
    assert message("\n\nTrain.stpes = 5").endswith(
        ": Train has no field stpes; did you mean steps?"
    )
    assert message("AdamW.zebra = 5") == (
        "x.gin:1: AdamW has no field zebra; its fields are learning_rate, b1"
    )


def test_a_path_through_fields_is_explained():
    assert message("Train.model.width = 5") == (
        "x.gin:1: Train.model is a field; bind the class that it builds by its own name"
    )


def test_unknown_macro():
    assert message(with_base("STEPS = 1\nTrain.steps = %STPES\nTrain.note = %STEPS")) == (
        "x.gin:3: no macro is called STPES; did you mean STEPS?"
    )


def test_misspelt_macro_definition():
    text = with_base("STEPS = 1\nTrain.steps = %STEPS\nSTPES = 2")
    assert message(text) == "x.gin:4: macro STPES is never used; did you mean STEPS?"


def test_a_reference_needs_parentheses():
    assert message(with_base("Train.optimizer = @Muon")) == (
        "x.gin:2: @Muon lacks its parentheses; write @Muon()"
    )


def test_names_that_two_modules_share(folder):
    write(
        folder / "other.py",
        """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Muon:
            learning_rate: float = 1.0
            beta: float = 0.5
    """,
    )
    assert message("import other\nMuon.beta = 1.0") == (
        "x.gin:2: Muon is ambiguous; write one of lab.training.Muon, other.Muon"
    )
    result = loaded(
        "import other\n"
        + with_base("Train.optimizer = @training.Muon()\ntraining.Muon.learning_rate = 1")
    )
    assert "training.Muon.learning_rate = 1" in result.operative
    assert loaded(result.operative).root == result.root


def test_a_binding_of_a_class_that_is_never_built():
    text = with_base("Train.optimizer = @Muon()\nAdamW.b1 = 0.5")
    assert message(text) == (
        "x.gin:3: AdamW.b1 is never used: no AdamW is built (Train.optimizer = @Muon())"
    )
    assert message(with_base("Wandb.project = 'p'")) == (
        "x.gin:2: Wandb.project is never used: no Wandb is built (Train.tracker = None)"
    )
    assert message(with_base("SeparatorAttention.window = 8")).endswith(
        "no SeparatorAttention is built (Model.attention = @DenseAttention())"
    )
    assert message(with_base("Muon.learning_rate = 8"), "Train.optimizer=@AdamW()").startswith(
        "x.gin:2: Muon.learning_rate is never used"
    )


def test_protocols_of_one_method_name_are_told_apart(folder):
    write(
        folder / "made.py",
        """
        import dataclasses
        from typing import Protocol, runtime_checkable

        @runtime_checkable
        class Map(Protocol):
            def make(self, inputs): ...

        @runtime_checkable
        class Rate(Protocol):
            def make(self, steps): ...

        @dataclasses.dataclass(frozen=True)
        class Dense:
            def make(self, inputs): ...

        @dataclasses.dataclass(frozen=True)
        class Flat:
            def make(self, steps): ...

        @dataclasses.dataclass(frozen=True)
        class Falling:
            end: float = 0.0
            def make(self, steps): ...

        @dataclasses.dataclass(frozen=True)
        class Both:
            map: Map = Dense()
            rate: Rate = Flat()
    """,
    )
    assert message("import made\nFalling.end = 1.0", root="Both").endswith(
        "no Falling is built (Both.rate = @Flat())"
    )


def test_a_binding_in_a_file_that_chose_otherwise(folder):
    write(folder / "base.gin", textwrap.dedent(BASE) + "Muon.learning_rate = 0.1")
    assert message("include 'base.gin'") == (
        "base.gin:7: Muon.learning_rate is never used: no Muon is built "
        "(Train.optimizer = @AdamW())"
    )


def test_an_unused_binding_in_an_override():
    assert message(with_base(""), "Muon.learning_rate=0.1") == (
        "--gin.Muon.learning_rate=0.1: Muon.learning_rate is never used: no Muon is built "
        "(Train.optimizer = @AdamW())"
    )
    assert message(with_base(""), "AdamW.b1=0.1", "Train.optimizer=@Muon()").startswith(
        "--gin.AdamW.b1=0.1: AdamW.b1 is never used"
    )


def test_a_replaced_choice_takes_its_bindings_along(folder):
    assert type(loaded(with_base("Train.optimizer = @Muon()")).root.optimizer).__name__ == "Muon"
    assert type(train("Train.optimizer=@Muon()").optimizer).__name__ == "Muon"
    write(
        folder / "sparse.gin",
        with_base("""
        Model.attention = @SeparatorAttention()
        WINDOW = 32
        SeparatorAttention.window = %WINDOW
    """),
    )
    root = loaded("include 'sparse.gin'\nModel.attention = @DenseAttention()").root
    assert type(root.model.attention).__name__ == "DenseAttention"
    assert (
        config.load("sparse.gin", ["SeparatorAttention.window=9"]).root.model.attention.window == 9
    )


def test_a_replaced_default_takes_its_bindings_along(folder):
    write(folder / "norm.gin", with_base("RMSNorm.epsilon = 1e-3"))
    root = config.load("norm.gin", ["Model.norm=@LayerNorm()"]).root
    assert type(root.model.norm).__name__ == "LayerNorm"
    assert message("include 'norm.gin'\nModel.norm = @LayerNorm()", "RMSNorm.epsilon=1") == (
        "--gin.RMSNorm.epsilon=1: RMSNorm.epsilon is never used: no RMSNorm is built "
        "(Model.norm = @LayerNorm())"
    )


def test_a_replaced_choice_through_a_macro(folder):
    write(
        folder / "sparse.gin",
        with_base("""
        ATTENTION = @SeparatorAttention()
        Model.attention = %ATTENTION
        SeparatorAttention.window = 3
    """),
    )
    for override in ("ATTENTION=@DenseAttention()", "Model.attention=@DenseAttention()"):
        root = config.load("sparse.gin", [override]).root
        assert type(root.model.attention).__name__ == "DenseAttention"


def test_an_override_of_a_macro_without_effect():
    text = with_base("STEPS = 1\nTrain.steps = %STEPS")
    assert loaded(text, "STEPS=64").root.steps == 64
    assert loaded(text, "Train.steps=3").root.steps == 3
    assert message(text, "Train.steps=3", "STEPS=64") == "--gin.STEPS=64: macro STEPS is never used"


def test_a_scope_that_is_never_entered():
    text = with_base("""
        Train.sources = (@books/TextFiles(),)
        books/TextFiles.path = 'b'
        boks/TextFiles.weight = 3.0
    """)
    assert message(text) == (
        "x.gin:4: boks/TextFiles.weight is never used: TextFiles is built in books; "
        "did you mean books?"
    )


def test_setting_a_field_twice(folder):
    assert message("Train.steps = 1\nTrain.steps = 2") == (
        "x.gin:2: Train.steps is set again, after x.gin:1; keep one"
    )
    assert message("Model.width = 1\ninclude 'base.gin'") == (
        "base.gin:4: Model.width is set by an include, after x.gin:1; keep one"
    )
    assert train("Train.steps=1", "Train.steps=2").steps == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Train.steps = '5'", "Train.steps = '5' is of type str; give int"),
        ("Train.steps = 1.5", "Train.steps = 1.5 is of type float; give int"),
        ("Train.deterministic = 1", "Train.deterministic = 1 is of type int; give bool"),
        ("Train.note = 5", "Train.note = 5 is of type int; give str or None"),
        ("AdamW.b1 = 'x'", "AdamW.b1 = 'x' is of type str; give float"),
        ("Model.heads = 5", "Model.width = 64 must be a multiple of Model.heads = 5"),
        (
            "Model.dtype = 'float3'",
            "Model.dtype = 'float3' is unknown; give 'float32' or 'bfloat16'; did you mean "
            "float32?",
        ),
        (
            "Model.attention = 'DenseAttention'",
            "Model.attention = 'DenseAttention' is of type str; give Attention; did you mean "
            "@DenseAttention()?",
        ),
    ],
)
def test_wrong_values_are_placed_at_their_binding(line, expected):
    place = "base.gin:4" if "multiple" in expected else "x.gin:2"
    assert message(with_base(line)).startswith(f"{place}: {expected}")


def test_wrong_value_in_a_scope_in_a_macro_and_in_an_override():
    text = with_base("""
        Train.sources = (@a/TextFiles(), @b/TextFiles())
        TextFiles.path = 'p'
        b/TextFiles.weight = 'heavy'
    """)
    assert message(text).startswith("x.gin:4: TextFiles.weight = 'heavy' is of type str")
    assert message(with_base("STEPS = 'n'\nTrain.steps = %STEPS")).startswith(
        "x.gin:3: Train.steps"
    )
    assert message(with_base(""), "Train.steps=many").startswith(
        "--gin.Train.steps=many: Train.steps = 'many' is of type str"
    )


def test_missing_fields(folder):
    assert message("Train.model = @Model()\nModel.width = 3") == (
        "x.gin:1: Model.attention must be set; add Model.attention = ... "
        "or --gin.Model.attention=VALUE"
    )
    assert message("Train.steps = 3").startswith(
        "x.gin: Train.model, Train.optimizer must be set; add"
    )
    write(folder / "part.gin", "Train.model = @Model()\nModel.width = 3")
    assert message("include 'part.gin'") == (
        "x.gin: Model.attention must be set (Model is built by part.gin:1); add Model.attention = "
        "... or --gin.Model.attention=VALUE"
    )


def test_required_macro():
    text = with_base("Train.steps = %gin.REQUIRED")
    assert message(text) == (
        "x.gin:2: Train.steps must be set; add Train.steps = ... or --gin.Train.steps=VALUE"
    )
    assert loaded(text, "Train.steps=4").root.steps == 4
    assert message(with_base("STEPS = %gin.REQUIRED\nTrain.steps = %STEPS")).startswith(
        "x.gin:3: Train.steps must be set"
    )


def test_a_config_that_contains_itself():
    assert message(with_base("A = %B\nB = %A\nTrain.steps = %A")) == (
        "x.gin: a macro or a config contains itself"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Train.steps = 1\nTrain.deterministic = true",
            "x.gin:2: true is not a gin value; write True",
        ),
        ("Train.note = null", "x.gin:1: null is not a gin value; write None"),
        (
            "Train.note = cosine",
            "x.gin:1: cosine is not a gin value; write 'cosine', @cosine() or %cosine",
        ),
        (
            "Train steps = 3",
            "x.gin:1: cannot read `Train steps = 3`: couldn't parse statement, expected",
        ),
        ("Train.steps = 3 4", "x.gin:1: cannot read `Train.steps = 3 4`: expected newline"),
        ("Train.steps =", "x.gin:1: cannot read `"),
        ("\nTrain.steps = $3", "x.gin:1: cannot read `Train.steps = $3`"),
        ("Train.shape = (1,", "x.gin:1: a bracket or a quote is not closed"),
        ("Train.note = 'abc", "x.gin:1: "),
    ],
)
def test_syntax_errors(text, expected):
    assert message(text).startswith(expected)


def test_a_bug_in_a_config_class_keeps_its_traceback(folder):
    write(
        folder / "broken.py",
        """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Broken:
            size: int = 1
            def __post_init__(self):
                if self.size == 2:
                    raise ValueError("size two")
                raise KeyError("bug")
    """,
    )
    with pytest.raises(KeyError, match=r"^'bug'$"):
        loaded("import broken", root="Broken")
    assert message("import broken\nBroken.size = 2", root="Broken") == "x.gin: Broken: size two"
