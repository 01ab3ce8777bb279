"""Configuration: frozen dataclasses that stand beside their owner, read by OmegaConf.

    defaults of the dataclass  <  preset=NAME  <  a.b=c overrides

An unknown key is an error that names the nearest key, a wrong value one that names the key.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from raylarge.errors import UserError

T = TypeVar("T")


def parse(schema: type[T], arguments: Sequence[str], presets: Mapping[str, Mapping[str, Any]]) -> T:
    """Turn command-line words such as `preset=tiny order.size=512` into a config object.

    Args:
        schema: a frozen dataclass; its fields are the keys, nested dataclasses the dots.
        arguments: words of the form `key=value`.
        presets: named overrides, chosen by the word `preset=NAME`.

    Raises:
        UserError: a word that is no `key=value`, an unknown preset or key, an unfit value.
    """
    for word in arguments:
        if "=" not in word:
            raise UserError(f"'{word}' is not of the form key=value; keys: {_keys(schema)}.")
    name = next((word.split("=", 1)[1] for word in arguments if word.startswith("preset=")), None)
    if name is not None and name not in presets:
        known = ", ".join(sorted(presets))
        raise UserError(f"there is no preset '{name}'; choose one of: {known}.")
    layers = [OmegaConf.create(dict(presets[name]))] if name else []
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
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        near = difflib.get_close_matches(key, _leaves(base), n=1, cutoff=0.0)
        raise UserError(f"unknown key '{key}'; did you mean '{near[0]}'?") from error
    except OmegaConfBaseException as error:
        key = f"'{error.full_key}': " if error.full_key else ""
        raise UserError(f"{key}{_first_line(error)}.") from error


def _word(word: str) -> DictConfig:
    """One `a.b=value`; a value that YAML reads as nothing, or not at all, is a plain string."""
    key, value = word.split("=", 1)
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
