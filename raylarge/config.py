"""Configuration: frozen dataclasses that stand beside their owner, read by OmegaConf.

    defaults of the dataclass  <  preset=NAME  <  a.b=c overrides

An unknown key is an error that names the nearest key, a wrong value one that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from raylarge.errors import UserError

T = TypeVar("T")

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SUCH = {int: "3", float: "0.5", bool: "true", str: "a"}
_UNFIT = (OmegaConfBaseException, TypeError)
"""What OmegaConf raises for a value of the wrong kind."""


def parse(schema: type[T], arguments: Sequence[str], presets: Mapping[str, Mapping[str, Any]]) -> T:
    """Turn command-line words such as `preset=tiny order.size=512` into a config object.

    Args:
        schema: a frozen dataclass; its fields are the keys, nested dataclasses the dots.
        arguments: words of the form `key=value`; of a key that is repeated the last counts.
        presets: named overrides, chosen by the word `preset=NAME`.

    Raises:
        UserError: a word that is no `key=value`, an unknown preset or key, an unfit value.
    """
    for word in arguments:
        if "=" not in word:
            raise UserError(f"'{word}' is not of the form key=value; keys: {_keys(schema)}.")
    names = [word.split("=", 1)[1] for word in arguments if word.startswith("preset=")]
    if names and names[-1] not in presets:
        known = ", ".join(sorted(presets))
        cure = f"choose one of: {known}" if known else "leave out preset="
        raise UserError(f"there is no preset '{names[-1]}'; {cure}.")
    layers = [OmegaConf.create(dict(presets[names[-1]]))] if names else []
    words = [word for word in arguments if not word.startswith("preset=")]
    return build(schema, *layers, *[_word(word) for word in words])


def build(schema: type[T], *layers: Mapping[str, Any] | DictConfig) -> T:
    """A config object from a dataclass and layers of values, later layers winning.

    Raises:
        UserError: an unknown key, a missing one, or a value of the wrong type.
    """
    base = OmegaConf.structured(schema)
    _thaw(base)
    try:
        merged = OmegaConf.merge(base, *layers)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            keys = [key for key in _leaves(base) if key in missing]
            said = " ".join(f"{key}=..." for key in keys)
            raise UserError(f"{', '.join(keys)} must be given; give {said}")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except ConfigKeyError as error:
        raise UserError(_unknown(base, str(error.full_key or error.key))) from error
    except _UNFIT as error:
        raise UserError(_unfit(schema, base, layers, error)) from error


def near(word: str, known: Iterable[str]) -> str | None:
    """Which of some names a misspelt one may stand for."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return (
        str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    )


def require(*rules: tuple[str, Any, bool, str]) -> None:
    """Refuse values that make no sense.

    Args:
        rules: key, value, whether it is fine, and what it must be.

    Raises:
        UserError: naming the first key that is not fine, its value and what it must be.
    """
    for key, value, fine, wish in rules:
        if not fine:
            raise UserError(f"{key}={shown(value)}: it must be {wish}.")


def require_place(key: str, path: str) -> None:
    """Refuse a folder or a URL that names no place.

    Raises:
        UserError: nothing is given, or a URL without its bucket.
    """
    if not path.removeprefix("file://").strip():
        raise UserError(f"{key}={path} is empty; name a folder or an s3:// URL.")
    if re.match(r"(?!file:)\w+://(/|$)", path):
        raise UserError(f"{key}={path} names no bucket; give one as in s3://BUCKET/FOLDER.")


def _unknown(base: DictConfig, key: str) -> str:
    """What to say of an unknown key: the nearest one, or those that stand where it was sought."""
    above, _, last = key.rpartition(".")
    beside = list(map(str, OmegaConf.select(base, above) if above else base))
    names = _leaves(base)
    same = next((name for name in names if name.split(".")[-1] == last), None)
    sibling = near(last, beside)
    beside_it = f"{above}.{sibling}".lstrip(".") if sibling else None
    meant = same or beside_it or (None if above else near(key, names))
    if meant:
        return f"unknown key '{key}'; did you mean '{meant}'?"
    return f"unknown key '{key}'; the keys there are: {', '.join(beside)}."


def _unfit(
    schema: type, base: DictConfig, layers: Sequence[Mapping[str, Any]], error: Exception
) -> str:
    """What to say of a value of the wrong kind: its key, the value and what is wanted."""
    for key, value in (pair for layer in layers for pair in _pairs(layer, base)):
        alone = OmegaConf.create()
        OmegaConf.update(alone, key, value)
        try:
            OmegaConf.merge(base, alone)
        except _UNFIT:
            return f"{key}={shown(value)} does not fit; give {_wanted(schema, key, base)}."
    return f"{_first_line(error)}."


def _pairs(layer: Any, node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and the values of a layer, as deep as the config has keys."""
    if isinstance(layer, DictConfig):
        layer = OmegaConf.to_container(layer)
    for key, value in layer.items():
        child = node._get_node(key)
        if isinstance(value, Mapping) and isinstance(child, DictConfig):
            yield from _pairs(value, child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _wanted(schema: type, key: str, base: DictConfig) -> str:
    """What the value of a key must be."""
    inner = next((name for name in _leaves(base) if name.startswith(f"{key}.")), None)
    if inner:
        return f"its keys one by one, such as {inner}"
    hint: Any = schema
    for part in key.split("."):
        hint = get_type_hints(hint)[part] if dataclasses.is_dataclass(hint) else Any
    kinds, null = [hint], ""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        null = " or null"
    return " or ".join(map(_kind, kinds)) + null


def _kind(kind: Any) -> str:
    if get_origin(kind) in (tuple, list):
        items = get_args(kind)
        count = "" if ... in items or len(items) == 1 else f"of {len(items)} "
        such = ",".join(_SUCH.get(item, "a") for item in items if item is not ...)
        return f"a list {count}such as [{such}]"
    return _WORDS.get(kind, "another value")


def _word(word: str) -> DictConfig:
    """One `a.b=value`; a value that YAML reads as nothing, or not at all, is a plain string."""
    key, value = word.split("=", 1)
    if value == "???":
        raise UserError(f"{word} is no value; give one, or leave {key} out for its default.")
    try:
        layer = OmegaConf.from_dotlist([word])
        if OmegaConf.select(layer, key) is not None or value in ("null", "~"):
            return layer
    except yaml.YAMLError:
        pass
    except OmegaConfBaseException as error:
        raise UserError(f"cannot read {word}: {_first_line(error)}.") from error
    layer = OmegaConf.create()
    OmegaConf.update(layer, key, value)
    return layer


def plain(config: Any) -> dict[str, Any]:
    """A config object as plain dicts and lists, ready for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def _thaw(node: DictConfig) -> None:
    """Frozen dataclasses arrive read-only; merging needs them open (the result is frozen)."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _thaw(child)


def _leaves(node: DictConfig, prefix: str = "") -> list[str]:
    names: list[str] = []
    for key in map(str, node):
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and len(child):
            names += _leaves(child, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


def _keys(schema: type) -> str:
    return ", ".join(_leaves(OmegaConf.structured(schema)))


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0].rstrip(".")
