import dataclasses
import importlib
import pickle
import re
import sys
import textwrap

from gin_files import BASE, loaded, message, write

from seqeff import config

MY_ATTENTION = """
    import dataclasses
    import helper
    from lab.models import DenseAttention

    @dataclasses.dataclass(frozen=True)
    class MyAttention:
        window: int = helper.WINDOW
        def attend(self):
            import late
            return late.VALUE
"""
MY_GIN = """
    import my_attention
    include '../base.gin'
    Model.attention = @MyAttention()
    MyAttention.window = 8
"""


def test_an_attention_from_outside_the_repository(folder):
    write(folder / "lab1/my_attention.py", MY_ATTENTION)
    write(folder / "lab1/helper.py", "WINDOW = 1")
    write(folder / "lab1/late.py", "VALUE = 'late'")
    write(folder / "lab1/mine.gin", MY_GIN)
    first = config.load("lab1/mine.gin")
    attention = first.root.model.attention
    assert (type(attention).__name__, attention.window, attention.attend()) == (
        "MyAttention",
        8,
        "late",
    )
    assert pickle.loads(pickle.dumps(attention)) == attention
    assert first.operative.startswith("import my_attention\n")
    assert first.modules == {
        "helper": folder / "lab1/helper.py",
        "my_attention": folder / "lab1/my_attention.py",
    }
    # from a run directory that keeps copies
    run = write(folder / "run/operative_config.gin", first.operative)
    for name, source in first.modules.items():
        write(folder / f"run/modules/{name}.py", source.read_text())
    again = config.load(run, module_paths=[folder / "run/modules"])
    assert dataclasses.asdict(again.root) == dataclasses.asdict(first.root)
    assert again.modules["my_attention"] == folder / "run/modules/my_attention.py"
    # and another module of the same name, in the same process
    write(folder / "lab2/my_attention.py", MY_ATTENTION.replace("MyAttention", "Other"))
    write(folder / "lab2/helper.py", "WINDOW = 2")
    write(
        folder / "lab2/mine.gin",
        MY_GIN.replace("MyAttention", "Other").replace("Other.window = 8", ""),
    )
    assert config.load("lab2/mine.gin").root.model.attention.window == 2
    assert message("MyAttention.window = 1").startswith(
        "x.gin:1: no config class is called MyAttention"
    )


def test_wrong_type_in_a_class_that_does_not_check_itself(folder):
    write(
        folder / "plain.py",
        """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Plain:
            size: int = 1
    """,
    )
    assert message("import plain\nPlain.size = '8'", root="Plain") == (
        "x.gin:2: Plain.size = '8' is of type str; give int"
    )


def test_packages_and_the_forms_of_import(folder):
    write(folder / "kit/__init__.py", "from kit.parts import Part")
    write(
        folder / "kit/parts.py",
        """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Part:
            size: int = 1
    """,
    )
    for head, name in (
        ("import kit", "Part"),
        ("import kit.parts", "kit.parts.Part"),
        ("from kit import parts", "parts.Part"),
        ("import kit.parts as pieces", "pieces.Part"),
        ("from __gin__ import dynamic_registration\nimport kit.parts", "kit.parts.Part"),
    ):
        result = loaded(f"{head}\n{name}.size = 3", root="Part")
        assert result.root.size == 3
        assert result.modules == {
            "kit.__init__": folder / "kit/__init__.py",
            "kit.parts": folder / "kit/parts.py",
        }
        assert loaded(result.operative, root="Part").root == result.root


def test_imports_that_fail(folder):
    write(folder / "my_attention.py", "")
    assert re.fullmatch(
        r"x\.gin:1: no module my_atention in .* installed; did you mean my_attention\?",
        message("import my_atention"),
    )
    write(folder / "needs.py", "import no_such_package_at_all")
    assert message("import needs") == (
        "x.gin:1: import needs: No module named 'no_such_package_at_all'"
    )
    write(folder / "broken_module.py", "x = 1\ny = z")
    assert message("import broken_module") == (
        f"x.gin:1: import broken_module: {folder}/broken_module.py:2: "
        "NameError: name 'z' is not defined"
    )
    write(folder / "bad_syntax.py", "x = 1\ny = = 2")
    assert message("import bad_syntax").startswith(
        f"x.gin:1: import bad_syntax: {folder}/bad_syntax.py:2: SyntaxError"
    )
    write(folder / "json.py", "")
    importlib.import_module("json")
    assert message("import json") == (
        f"x.gin:1: {folder}/json.py is hidden by another loaded module json; rename it"
    )


def test_search_path_is_left_as_it_was(folder):
    write(folder / "needs_nothing.py", "")
    before = list(sys.path)
    loaded("import needs_nothing\n" + textwrap.dedent(BASE))
    assert sys.path[: len(before)] == before
    message("import no_such_module")
    assert sys.path[: len(before)] == before
