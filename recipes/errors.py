"""One-line messages for pydantic's errors in a recipe."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ValidationError

# Tags of the union members of a key (one plan, several, learned) in pydantic's locations; they are not keys.
ONE, SEVERAL, LEARNED = "<one>", "<several>", "<learned>"
_TAGS: Final = (ONE, SEVERAL, LEARNED)
_UNKNOWN: Final = ("extra_forbidden", "invalid_key")  # kinds of faults whose location ends with the unknown key
_LIMITS: Final = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_TYPE_NAMES: Final = {str: "text", int: "whole number", float: "number", bool: "true or false"}


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line: `file: key: got X, expected Y`."""


def first_fault(error: ValidationError, schema: type[BaseModel], source: str | Path) -> RecipeError:
    """Returns the first fault of `error` as one line that begins with `source` and the dotted key."""
    fault = error.errors()[0]
    kind, found = fault["type"], fault["input"]
    location = _location(schema, fault["loc"], is_unknown=kind in _UNKNOWN)
    where = f"{source}: {'.'.join(part for part in location if part not in _TAGS) or 'recipe'}"
    if kind in _UNKNOWN:
        location = [part for part in location if part != "[key]"]
        where = f"{source}: {'.'.join(part for part in location if part not in _TAGS)}"
        known = _fields(schema, location[:-1])
        return RecipeError(f"{where}: unknown key; {suggestion(location[-1], known)}")
    accepted = _describe_field(schema, location)
    if kind == "missing":
        return RecipeError(f"{where}: missing key, expected {accepted}")
    if kind == "value_error":
        return RecipeError(f"{where}: {fault['ctx']['error']}")
    hint = _float_hint(found) if "number" in accepted else ""
    return RecipeError(f"{where}: got {_describe_value(found)}, expected {accepted}{hint}")


def _location(schema: type[BaseModel], parts: Sequence[int | str], *, is_unknown: bool) -> list[str]:
    """Returns the keys, list indices and tags of a fault, without pydantic's other names of union members."""
    section: Any = schema
    annotation: Any = None
    location, is_mapping = [], False
    for part in parts:
        if section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            section, is_mapping = _section(annotation), _takes_names(annotation)
        elif part in _TAGS:
            section, is_mapping = _section(_member(annotation, part)) or section, part == ONE and is_mapping
        elif not (isinstance(part, int) or is_mapping or is_unknown):
            continue
        else:
            is_mapping = False
        location.append(str(part))
    return location


def _member(annotation: Any, tag: int | str) -> Any:
    """Returns the member of a union with this tag."""
    if any(getattr(mark, "tag", None) == tag for mark in getattr(annotation, "__metadata__", ())):
        return annotation
    members = (_member(part, tag) for part in typing.get_args(annotation))
    return next((found for found in members if found is not None), None)


def _takes_names(annotation: Any) -> bool:
    """Returns whether an annotation accepts a mapping with arbitrary keys."""
    origin = typing.get_origin(annotation)
    return origin in (dict, Mapping) or any(_takes_names(part) for part in typing.get_args(annotation))


def suggestion(name: str, known: Sequence[str]) -> str:
    """Returns "did you mean 'x'?" for the known name nearest to `name`, or the list of known names."""
    short = {"".join(word[0] for word in key.split("_")): key for key in known}
    close = difflib.get_close_matches(name, known, n=1) or [key for key in known if name in key]
    if name in short or close:
        return f"did you mean '{short.get(name) or close[0]}'?"
    return f"expected {', '.join(known)}"


def _describe_value(value: Any) -> str:
    return f"{_shortened(value)} ({type(value).__name__})"


def _shortened(value: Any) -> str:
    """Returns the repr of a value, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _float_hint(found: Any) -> str:
    """Returns a hint for a number that YAML reads as text: `2e-5` and `2.0e5` are text, `2.0e-5` and `2.0e+5` not."""
    if not isinstance(found, str):
        return ""
    try:
        value = float(found)
    except ValueError:
        return ""
    if not math.isfinite(value):
        return ""
    mantissa, mark, exponent = (found if "e" in found.lower() else repr(value)).lower().partition("e")
    if not mark:
        return f"; write {value}"
    point, sign = "" if "." in mantissa else ".0", "" if exponent[:1] in "+-" else "+"
    return f"; write {mantissa}{point}e{sign}{exponent}"


def _fields(schema: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Returns the keys that the section at `location` accepts."""
    section: Any = schema
    annotation: Any = None
    for part in location:
        if part in _TAGS:
            section = _section(_member(annotation, part)) or section
        elif part in section.model_fields:  # else the name or number of one of several sections
            annotation = section.model_fields[part].annotation
            section = _section(annotation)
    return list(section.model_fields)


def _section(annotation: Any) -> Any:
    """Returns the model class in `Model`, `Model | None`, lists and mappings of it; None for any other annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _section(part)) is not None), None)


def _describe_field(schema: type[BaseModel], location: Sequence[str]) -> str:
    """Describes the values that the field at `location` accepts, with their limits."""
    section: Any = schema
    annotation: Any = None
    words = "a mapping of keys"
    for part in location:
        if part.isdecimal():  # a place in a list
            continue
        if part in _TAGS:
            section = _section(_member(annotation, part)) or section
            continue
        if section is None or part not in section.model_fields:
            break
        field = section.model_fields[part]
        annotation = field.annotation
        words = _describe_type(annotation)
        limits = [
            f"{sign} {getattr(mark, name)}"
            for mark in field.metadata
            for name, sign in _LIMITS.items()
            if hasattr(mark, name)
        ]
        if limits:
            words = words.replace("number", "number " + " and ".join(limits))
        if any(getattr(mark, "min_length", 0) for mark in field.metadata):
            words = (
                words.replace("text", "text that is not empty") if words.startswith("text") else f"{words}, not empty"
            )
        section = _section(annotation)
    return words


def _describe_type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(arg) for arg in args)
    if origin is Literal:
        return ", ".join(str(arg) for arg in args)
    if origin is typing.Annotated:
        return _describe_type(args[0])
    if origin in (list, tuple):
        if not args:
            return "a list"
        items = _describe_type(args[0]).replace("a mapping", "mappings").replace("number", "numbers")
        return f"a list of {items}"
    if origin in (dict, Mapping) or annotation in (dict, Mapping):
        return "a mapping of keys"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping of {', '.join(annotation.model_fields)}"
    return _TYPE_NAMES.get(annotation, str(annotation))
