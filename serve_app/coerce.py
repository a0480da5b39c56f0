"""Frozen dataclasses out of YAML values or command-line strings, by the types of their fields.

Strict: an unknown key, a value of another type or a key given twice is a `ConfigError` that says what would do.
"""

import difflib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from serve_app.errors import ConfigError

T = TypeVar("T")

_BOOLS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
_NONES = ("none", "null")


def build_dataclass(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass `cls`; `where` is the dotted key of `values`, for the messages.

    Strings become what the field's type says ("1_000", "on", "none"); other values have to be of that type, but an
    int is fine for a float. A section (a field that is a dataclass) without a value keeps its defaults.
    """
    if not isinstance(values, Mapping):
        raise _wrong(where or cls.__name__, values, _describe(cls))
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    kinds = get_type_hints(cls)
    given = {}
    for name, value in values.items():
        if name not in known:
            raise _unknown(cls, list(known), str(name), where)
        if not (_has_default(known[name]) and _is_empty_section(kinds[name], value)):
            given[name] = _coerce(kinds[name], value, _join(where, name))
    for name, field in known.items():
        if name not in given and not _has_default(field):
            raise ConfigError(
                f"{_join(where, name)} is missing, expected {_describe(kinds[name])}", key=_join(where, name)
            )
    return cls(**given)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested ones, at any depth: {"a.b": 1, "a": {"c": 2}} is {"a": {"b": 1, "c": 2}}."""
    tree: dict[str, Any] = {}
    _merge(tree, flat, "")
    return tree


def _merge(tree: dict[str, Any], values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        full = _join(where, str(key))
        *sections, name = str(key).split(".")
        if not (name and all(sections)):
            raise ConfigError(f"the key {full!r} has an empty part: write it as section.name")
        node = tree
        for depth, section in enumerate(sections, start=1):
            if node.get(section) is None:  # absent, or a section left empty
                node[section] = {}
            elif not isinstance(node[section], dict):
                raise _section_and_value(_join(where, ".".join(sections[:depth])), node[section])
            node = node[section]
        if isinstance(value, Mapping):
            if node.get(name) is None:
                node[name] = {}
            elif not isinstance(node[name], dict):
                raise _section_and_value(full, node[name])
            _merge(node[name], value, full)
        elif isinstance(node.get(name), dict):
            if value is not None:
                raise _section_and_value(full, value)
        elif name in node:
            raise ConfigError(f"{full} is given twice, as {node[name]!r} and as {value!r}: keep one")
        else:
            node[name] = value


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`; raises ConfigError."""
    if kind is Any:
        return value
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return value if isinstance(value, kind) else build_dataclass(kind, value, where)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _coerce_union(kind, value, where)
    if origin is Literal:
        for choice in get_args(kind):
            if type(value) is type(choice) and value == choice:
                return choice
        for choice in get_args(kind):
            if isinstance(value, str) and _parses_to(choice, value):
                return choice
    elif origin is tuple and get_args(kind)[1:] == (...,):
        items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if isinstance(items, Sequence):
            item_kind = get_args(kind)[0]
            return tuple(_coerce(item_kind, item, f"{where}[{i}]") for i, item in enumerate(items))
    elif (origin or kind) in (dict, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif kind in _SCALARS:
        try:
            return _SCALARS[kind](value)
        except (ValueError, OverflowError):
            pass
    else:
        raise TypeError(f"{where}: fields of type {kind} are not supported in a configuration. This is a bug.")
    raise _wrong(where, value, _describe(kind))


def _coerce_union(kind: Any, value: Any, where: str) -> Any:
    members = [member for member in get_args(kind) if member is not types.NoneType]
    if len(members) < len(get_args(kind)) and _is_none(value):
        return None
    if len(members) == 1 and is_dataclass(members[0]):
        return _coerce(members[0], value, where)  # its errors name the keys within
    for member in sorted(members, key=lambda member: (type(value) is not member or member is str, member is str)):
        try:
            return _coerce(member, value, where)
        except ConfigError:
            continue
    raise _wrong(where, value, _describe(kind))


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _BOOLS:
        return _BOOLS[value.strip().lower()]
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, int | str) and not isinstance(value, bool):
        return int(value)
    raise ValueError


def _to_float(value: Any) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        number = float(value)
        if not math.isnan(number):  # a NaN would pass every check of a range
            return number
    raise ValueError


def _to_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError


_SCALARS: dict[Any, Callable[[Any], Any]] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _parses_to(choice: Any, text: str) -> bool:
    if choice is None:
        return _is_none(text)
    try:
        return bool(_SCALARS[type(choice)](text) == choice)
    except ValueError:
        return False


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _NONES)


def _is_empty_section(kind: Any, value: Any) -> bool:
    """A heading with nothing under it, as YAML gives it."""
    return value is None and (is_dataclass(kind) or (get_origin(kind) or kind) in (dict, Mapping))


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _describe(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if member is types.NoneType else _describe(member) for member in get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join("none" if choice is None else str(choice) for choice in get_args(kind))
    if origin is tuple:
        return f"a list, each {_describe(get_args(kind)[0])}"
    if is_dataclass(kind):
        return "a section with " + ", ".join(field.name for field in fields(kind) if field.init)
    return _WORDS.get(kind, "a section of keys and values")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    hint = ""
    if isinstance(value, bool) and expected.startswith(("text", "one of")):
        hint = " (a bare on, off, yes or no is a truth value in YAML: put it in quotes)"
    return ConfigError(f"{key} is {value!r}, expected {expected}{hint}", key=key)


def _section_and_value(key: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{key} is given both as a value ({value!r}) and as a section ({key}.…): keep one of the two", key=key
    )


def _unknown(cls: type[Any], known: list[str], key: str, where: str) -> ConfigError:
    same_name = [path for path in _paths(cls) if path.rsplit(".", 1)[-1] == key]
    nearest = same_name or difflib.get_close_matches(key, known, n=1)
    suggestion = f"; did you mean {_join(where, nearest[0])}?" if nearest else "."
    place = f"in {where}" if where else "at the top"
    return ConfigError(
        f"{_join(where, key)} is not a setting{suggestion} Known {place}: {', '.join(known)}", key=_join(where, key)
    )


def _paths(cls: type[Any], prefix: str = "") -> list[str]:
    """The dotted names of all fields under `cls`."""
    paths = []
    for name, kind in get_type_hints(cls).items():
        paths.append(_join(prefix, name))
        if is_dataclass(kind):
            assert isinstance(kind, type)
            paths += _paths(kind, _join(prefix, name))
    return paths
