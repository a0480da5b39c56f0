"""Dataclasses out of YAML values or command-line strings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from serve_app.coerce import build_dataclass, unflatten
from serve_app.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    size: int = 1
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"inner.size is {self.size}, the least is 1")


@dataclass(frozen=True)
class Outer:
    name: str = "a"
    count: int = 0
    ratio: float = 0.0
    on: bool = False
    kind: Literal["x", "y"] = "x"
    hertz: Literal[16000, 8000] = 16000
    path: str | None = "p"
    limit: int | None = 1
    word: int | str = 0
    level: Literal["low", None] = "low"
    sizes: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Required:
    size: int
    inner: Inner


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("name", "on", "on"),
        ("name", "3", "3"),
        ("count", 3, 3),
        ("count", "3", 3),
        ("count", "-3", -3),
        ("count", "1_000", 1000),
        ("ratio", 0.5, 0.5),
        ("ratio", 2, 2.0),
        ("ratio", "2", 2.0),
        ("ratio", "1e-3", 1e-3),
        ("ratio", "inf", float("inf")),
        *[("on", value, True) for value in (True, "true", "True", "on", "ON", "1")],
        *[("on", value, False) for value in (False, "false", "off", "0")],
        ("kind", "y", "y"),
        ("hertz", 8000, 8000),
        ("hertz", "8000", 8000),
        ("hertz", "8_000", 8000),
        ("path", "q", "q"),
        ("path", None, None),
        ("path", "none", None),
        ("path", "null", None),
        ("limit", "none", None),
        ("limit", "5", 5),
        ("word", "5", 5),
        ("word", "five", "five"),
        ("level", None, None),
        ("level", "none", None),
        ("level", "low", "low"),
        ("sizes", [1, "2"], (1, 2)),
        ("sizes", "1,2", (1, 2)),
        ("sizes", "", ()),
        ("options", {"a": "1"}, {"a": "1"}),
        ("options", None, {}),
        ("inner", {"size": "2"}, Inner(2)),
        ("inner", Inner(7), Inner(7)),
        ("inner", {}, Inner()),
        ("inner", None, Inner()),
    ],
)
def test_values_become_what_the_field_says(key: str, value: Any, expected: Any) -> None:
    found = getattr(build_dataclass(Outer, {key: value}), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("name", 3, "text"),
        ("name", ["a"], "text"),
        ("name", None, "text"),
        ("name", False, "text (a bare on, off, yes or no is a truth value in YAML: put it in quotes)"),
        ("count", "abc", "a whole number"),
        ("count", "", "a whole number"),
        ("count", "3.0", "a whole number"),
        ("count", 3.5, "a whole number"),
        ("count", 3.0, "a whole number"),
        ("count", True, "a whole number"),
        ("count", None, "a whole number"),
        ("count", [3], "a whole number"),
        ("ratio", "x", "a number"),
        ("ratio", "nan", "a number"),
        ("ratio", float("nan"), "a number"),
        ("ratio", True, "a number"),
        ("ratio", 10**400, "a number"),
        ("on", 1, "true or false"),
        ("on", "maybe", "true or false"),
        ("kind", "z", "one of x, y"),
        ("kind", 1, "one of x, y"),
        ("hertz", 44100, "one of 16000, 8000"),
        ("hertz", "fast", "one of 16000, 8000"),
        ("hertz", 16000.0, "one of 16000, 8000"),
        ("path", 3, "text or none"),
        ("limit", "many", "a whole number or none"),
        ("word", [1], "a whole number or text"),
        ("level", "high", "one of low, none"),
        ("sizes", 3, "a list, each a whole number"),
        ("options", "a", "a section of keys and values"),
        ("inner", 3, "a section with size, rate"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_would_do(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_dataclass(Outer, {key: value}, "app")
    assert caught.value.message == f"app.{key} is {value!r}, expected {expected}"
    assert caught.value.details == {"key": f"app.{key}"}


def test_errors_within_name_the_full_key() -> None:
    with pytest.raises(ConfigError, match=r"^a\.inner\.size is 'x', expected a whole number$"):
        build_dataclass(Outer, {"inner": {"size": "x"}}, "a")
    with pytest.raises(ConfigError, match=r"^sizes\[1\] is 'x', expected a whole number$"):
        build_dataclass(Outer, {"sizes": [1, "x"]})
    with pytest.raises(ConfigError, match=r"^inner\.size is 0, the least is 1$"):
        build_dataclass(Outer, {"inner": {"size": "0"}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coutn": 1}, "a.coutn is not a setting; did you mean a.count? Known in a: name, count,"),
        (
            {"inner": {"sise": 1}},
            "a.inner.sise is not a setting; did you mean a.inner.size? Known in a.inner: size, rate",
        ),
        ({"rate": 1}, "a.rate is not a setting; did you mean a.inner.rate?"),
        ({"zzz": 1}, "a.zzz is not a setting. Known in a: name, count,"),
        ({3: 1}, "a.3 is not a setting. Known in a: name, count,"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_dataclass(Outer, values, "a")
    assert caught.value.message.startswith(message)


def test_what_has_no_default_has_to_be_given() -> None:
    assert build_dataclass(Required, {"size": 1, "inner": {}}) == Required(1, Inner())
    with pytest.raises(ConfigError, match=r"^size is missing, expected a whole number$"):
        build_dataclass(Required, {"inner": {}})
    with pytest.raises(ConfigError, match=r"^inner is None, expected a section with size, rate$"):
        build_dataclass(Required, {"size": 1, "inner": None})
    with pytest.raises(ConfigError, match=r"^Required is 3, expected a section with size, inner$"):
        build_dataclass(Required, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flat", "tree"),
    [
        ({}, {}),
        ({"a": 1}, {"a": 1}),
        ({"a.b": 1, "a.c.d": 2}, {"a": {"b": 1, "c": {"d": 2}}}),
        ({"a": {"b": 1}, "a.c": 2}, {"a": {"b": 1, "c": 2}}),
        ({"a.c": 2, "a": {"b": 1}}, {"a": {"b": 1, "c": 2}}),
        ({"a": {"b.c": 1}, "a.b": {"d": 2}}, {"a": {"b": {"c": 1, "d": 2}}}),
        ({"a": {}}, {"a": {}}),
        ({"a": None, "a.b": 1}, {"a": {"b": 1}}),
        ({"a.b": 1, "a": None}, {"a": {"b": 1}}),
        ({"a": None}, {"a": None}),
    ],
)
def test_unflatten(flat: dict[str, Any], tree: dict[str, Any]) -> None:
    assert unflatten(flat) == tree


def test_unflatten_leaves_what_it_was_given() -> None:
    given = {"a": {"b": 1}, "a.c": 2}
    unflatten(given)["a"]["b"] = 3
    assert given == {"a": {"b": 1}, "a.c": 2}


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"a": 3, "a.b": 4}, "a is given both as a value (3) and as a section (a.…): keep one of the two"),
        ({"a.b": 4, "a": 3}, "a is given both as a value (3) and as a section (a.…): keep one of the two"),
        ({"a": 3, "a.b.c": 4}, "a is given both as a value (3) and as a section (a.…): keep one of the two"),
        (
            {"a.b": 3, "a": {"b": {"c": 1}}},
            "a.b is given both as a value (3) and as a section (a.b.…): keep one of the two",
        ),
        ({"a.b": 3, "a": {"b": 4}}, "a.b is given twice, as 3 and as 4: keep one"),
        ({"a..b": 1}, "the key 'a..b' has an empty part: write it as section.name"),
        ({".a": 1}, "the key '.a' has an empty part: write it as section.name"),
        ({"a.": 1}, "the key 'a.' has an empty part: write it as section.name"),
    ],
)
def test_unflatten_refuses_conflicts(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        unflatten(flat)
    assert caught.value.message == message
