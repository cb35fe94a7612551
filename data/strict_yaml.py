"""Reads recipes in YAML; refuses what YAML would silently change: duplicate keys, 010 for 8, 1:30 for 90."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from data.config import shorten

# What PyYAML raises for invalid YAML; the last three for tags that do not fit their values.
_NOT_YAML: Final = (yaml.YAMLError, ValueError, AttributeError, LookupError, TypeError)
_MERGE: Final = "tag:yaml.org,2002:merge"
_DECIMAL: Final = re.compile(r"[-+]?(0|[1-9][0-9_]*|0[xb][0-9a-fA-F_]+)")
_MOST_VALUES: Final = 100_000  # of a file whose aliases are written out


class YamlError(ValueError):
    """A file or an override that cannot be read; the message is one line: `file: key: got X, expected Y`."""


def read_file(path: str | Path) -> dict[str, Any]:
    """Returns the keys of a YAML file, as nested dicts and lists that share none with each other.

    Raises:
        YamlError: it cannot be read, or has a value that YAML would silently change.
    """
    try:
        raw = _load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise YamlError(f"{path}: {error.strerror}, expected a recipe in YAML") from None
    except YamlError as error:
        raise YamlError(f"{path}: {error}") from None
    except RecursionError:
        raise YamlError(f"{path}: not YAML that can be read: nested too deeply") from None
    except _NOT_YAML as error:
        reason = " ".join(str(error).split())
        raise YamlError(f"{path}: not YAML: {reason}") from None
    if not isinstance(raw, dict):
        raise YamlError(f"{path}: got {type(raw).__name__}, expected a mapping of keys")
    return raw


def override(raw: dict[str, Any], given: str, path: str | Path) -> None:
    """Sets one `dotted.key=value`, the value in YAML, in the keys of the file `path`; adds sections that are missing.

    Raises:
        YamlError: it is not of this form, or sets a key of a value.
    """
    key, equals, text = given.partition("=")
    if not equals or not all(key.split(".")):
        raise YamlError(f"{path}: got {shorten(repr(given))}, expected dotted.key=value")
    if not text.strip():
        raise YamlError(f"{path}: {key}: got nothing, expected a value in YAML (null for none)")
    try:
        value = _load(text)
    except YamlError as error:
        raise YamlError(f"{path}: {key}: {str(error).removeprefix('line 1: ')}") from None
    except (*_NOT_YAML, RecursionError):
        raise YamlError(f"{path}: {key}: got {shorten(repr(text))}, expected a value in YAML") from None
    *parents, last = key.split(".")
    section: Any = raw
    for depth, parent in enumerate(parents):
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            where = ".".join(parents[: depth + 1])
            raise YamlError(f"{path}: {key}: {where} is a value, expected a section with keys")
    section[next((known for known in section if str(known) == last), last)] = value  # of a layer: a number


def _load(text: str) -> Any:
    return _unshared(yaml.load(text, _Loader), itertools.count(1))  # a SafeLoader


def _unshared(value: Any, counter: Iterator[int]) -> Any:
    """Returns a value whose aliases are written out, so that an override of one section leaves the others alone."""
    if next(counter) > _MOST_VALUES:
        raise YamlError(f"got more than {_MOST_VALUES:,} values, expected fewer: aliases count wherever they stand")
    if isinstance(value, dict):
        return {key: _unshared(each, counter) for key, each in value.items()}
    if isinstance(value, list):
        return [_unshared(each, counter) for each in value]
    return value


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns a mapping; rejects keys that occur twice or are no words."""
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                shown = "<<" if key_node.tag == _MERGE else f"a {key_node.id}"
                raise YamlError(f"line {line}: got {shown} as a key, expected a word or a number")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise YamlError(f"{key}: got it twice (line {line}), expected once")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """Returns a whole number; rejects notations that YAML 1.1 does not read as decimal."""
        if not _DECIMAL.fullmatch(node.value):
            value = self.construct_yaml_int(node)
            line = node.start_mark.line + 1
            raise YamlError(f"line {line}: got {node.value}, which YAML reads as {value}, expected a decimal number")
        return self.construct_yaml_int(node)

    def construct_real(self, node: yaml.ScalarNode) -> float:
        """Returns a number; rejects base 60 (1:30)."""
        if ":" in node.value:
            raise YamlError(f"line {node.start_mark.line + 1}: got {node.value}, expected a decimal number")
        return self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_real)
