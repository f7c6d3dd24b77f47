import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import pytest

from seqeff.checks import ConfigError, UserError, check_types, require


@runtime_checkable
class Norm(Protocol):
    def apply(self, value): ...


class RMSNorm:
    def apply(self, value):
        return value


def config_of(annotation):
    @dataclasses.dataclass(frozen=True)
    class Config:
        field: annotation

        def __post_init__(self):
            check_types(self)

    return Config


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [3, -1], [3.0, True, "3", None]),
        (float, [3.5, 3], [True, "3", None]),
        (bool, [True], [1, "True", None]),
        (str, ["", "a"], [1, None, b"a"]),
        (int | None, [3, None], [3.5, False]),
        (Any, [3, None, object()], []),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0]),
        (tuple[int, ...], [(), (1, 2), [1]], [(1.5,), 1, "12", {1}]),
        (tuple[int, str], [(1, "a")], [(1,), (1, "a", "b"), ("a", 1)]),
        (list[str], [["a"], ("a",)], ["a", [1]]),
        (Sequence[float], [[1, 2.5]], [["1"]]),
        (dict[str, int], [{}, {"a": 1}], [{"a": "1"}, {1: 1}, []]),
        (Mapping[str, tuple[int, ...]], [{"a": (1,)}], [{"a": 1}]),
        (Norm, [RMSNorm()], [RMSNorm, 3, None]),
        (Norm | None, [RMSNorm(), None], [RMSNorm]),
        (Callable[[int], int], [abs], [3]),
        (type, [int], [3]),
    ],
)
def test_check_types(annotation, good, bad):
    config = config_of(annotation)
    for value in good:
        assert config(value).field is value
    for value in bad:
        with pytest.raises(ConfigError, match=r"^Config\.field = "):
            config(value)


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, (1.0, math.inf), {"a": [math.nan]}]
)
def test_floats_must_be_finite(value):
    with pytest.raises(ConfigError, match=r"^Config\.field = .* is not finite; give a number"):
        config_of(Any)(value)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (int, "5", "Config.field = '5' is of type str; give int"),
        (int | None, 1.5, "Config.field = 1.5 is of type float; give int or None"),
        (Literal["a", "b"], "c", "Config.field = 'c' is of type str; give 'a' or 'b'"),
        (tuple[int, ...], 1, "Config.field = 1 is of type int; give tuple[int, ...]"),
        (dict[str, Norm], 1, "Config.field = 1 is of type int; give dict[str, Norm]"),
    ],
)
def test_the_message_names_the_field_its_value_and_the_type(annotation, value, message):
    with pytest.raises(ConfigError) as caught:
        config_of(annotation)(value)
    assert str(caught.value) == message


def test_an_annotation_that_cannot_be_read():
    config = dataclasses.make_dataclass("Config", [("field", "Absent")])
    with pytest.raises(
        ConfigError, match=r"^Config: name 'Absent' is not defined, but an annotation"
    ):
        check_types(config(1))


def test_require():
    require(True, "unused")
    with pytest.raises(UserError, match=r"^Config\.size = 0 must be positive$"):
        require(False, "Config.size = 0 must be positive")
