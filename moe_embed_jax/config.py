"""From a config file (ml_collections) to the frozen dataclasses that the code reads.

Every section of a config is a dataclass, in a module that does not import jax, so that a mistake is
reported at once. A key that the dataclass does not know is an error that names it and the nearest
known key, so a typo never trains silently.
"""

import ast
import dataclasses
import difflib
import json
import pathlib
import runpy
import traceback
from collections.abc import Iterator

from moe_embed_jax import storage
from moe_embed_jax.errors import UserError
from moe_embed_jax.json_file import printable

# In the folder of a run, and of a model that we wrote.
RUN_CONFIG = "config.json"  # its "model" section tells such a folder from others
CHECKPOINTS = "checkpoints"
RENAMED = {"page": "config"}  # keys of earlier versions
_STATED = "_stated"  # of an instance that `fill` made
FREE, FREE_IF_DROPLESS = "free", "free if dropless"


def setting(default, resume: str = "", computes: bool = False, flag: str = ""):
    """A field of a config dataclass, with what the rest of the package may do with it.

    Args:
      resume: whether a resumed run may change it. `FREE`: yes, because it changes no number by more
        than rounding. `FREE_IF_DROPLESS`: yes, as long as no expert drops tokens, because the field
        decides which tokens. "": no, as for a field without `setting`.
      computes: it says how a model is computed, not what the model is.
      flag: the help text of the launchers' flag for it (`launching.add_flags`).
    """
    metadata = {"resume": resume, "computes": computes, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


def build(cls, values, name: str = ""):
    """An instance of dataclass `cls` from a mapping; nested dataclasses from nested mappings.

    Args:
      values: a dict or `ml_collections.ConfigDict`.
      name: path of the section, for messages ("model", "data.vocabulary").

    Raises `UserError` for unknown keys and for values of the wrong type.
    """
    if not hasattr(values, "items"):
        raise UserError(f"config key {name}={values!r} must be a section with keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    where = f"{name}." if name else ""
    arguments = {}
    for key, value in dict(values).items():
        if key not in fields:
            raise _unknown(where + key, key, fields, where)
        arguments[key] = _value(fields[key].type, value, where + key)
    missing = [
        key
        for key, field in fields.items()
        if key not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"config key {where}{missing[0]} is missing")
    return cls(**arguments)


class _AnyKeys(dict):
    """A section (of type `dict`) that takes any keys, nested ones too; later ones are merged in."""


class _Whole(dict):
    """A section given on the command line as one literal: replaces what a `_AnyKeys` has there."""


def defaults(cls) -> dict:
    """All keys of the dataclass with their default values, nested; None where there is none."""
    result = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            result[field.name] = defaults(field.type)
        elif field.type is dict:
            result[field.name] = _AnyKeys()
        else:
            result[field.name] = None if field.default is dataclasses.MISSING else field.default
    return result


def load(classes, spec: str, overrides: dict[str, str]):
    """An instance of a config class from a config file and command-line overrides.

    Args:
      classes: the class, or {objective: class}: the file's key `objective` chooses, the first one
        where it has none.
      spec: `path/to/config.py` or `path/to/config.py:variant`; the file defines
        `get_config(variant)`, which returns a `ConfigDict` or dict.
      overrides: "model.width" -> text of a Python literal (or a bare string).

    Raises `UserError` in one line, naming file or key.
    """
    return fill(*read_config_file(classes, spec), overrides)


def fill(cls, stated_values: dict, overrides: dict[str, str]):
    """`load` of a config file that `read_config_file` read."""
    values = defaults(cls)
    _merge(values, stated_values, "")
    given = set(_keys(stated_values))
    for key, text in overrides.items():
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if isinstance(value, dict):
            value = _Whole(value)
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(values, value, "")
        given |= set(_keys(value))
    config = build(cls, values)
    object.__setattr__(config, _STATED, given)
    return config


def _keys(section, prefix: str = "") -> Iterator[str]:
    """ "model.width" of every leaf of nested mappings."""
    for key, value in dict(section).items():
        if hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def stated(config) -> set[str]:
    """The keys, "model.width", that the config file or the command line gave a config; of one that
    was built in code, those that differ from the defaults."""
    given = getattr(config, _STATED, None)
    if given is None:
        lines = differences(defaults(type(config)), dataclasses.asdict(config))
        given = {line.partition(":")[0] for line in lines}
    return given


def read_config_file(classes, spec: str) -> tuple[type, dict]:
    """(the class, the values) of a config file; arguments and errors as in `load`."""
    path, _, variant = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        get_config = runpy.run_path(path).get("get_config")
        values = get_config(variant) if callable(get_config) else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(_failure(path, error)) from error
    if not callable(get_config):
        raise UserError(f"config file {path} does not define get_config(variant)")
    if not hasattr(values, "items"):
        raise UserError(f"config file {path}: get_config must return a dict, not {values!r:.40}")
    values = dict(values)
    return (classes if isinstance(classes, type) else _chosen(classes, values, path)), values


def _failure(path: str, error: Exception) -> str:
    """One line for an error in the code of a config file."""
    line = getattr(error, "lineno", None)  # of a syntax error
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == path else line
    what = " ".join(str(error).split())
    return f"config file {path}, line {line}: {type(error).__name__}: {what}"


def _chosen(classes: dict, values: dict, path: str) -> type:
    objective = values.get("objective", next(iter(classes)))
    if not isinstance(objective, str) or objective not in classes:
        raise UserError(f"{path}: objective={objective!r}: choose one of {', '.join(classes)}")
    return classes[objective]


def _merge(values: dict, section, name: str) -> None:
    for key, value in dict(section).items():
        if not isinstance(key, str):
            raise UserError(f"config key {name}{key!r:.40} must be a string")
        if isinstance(values, _AnyKeys):
            is_section = hasattr(value, "items")
            was_section = isinstance(values.get(key), dict)
            if key not in values or is_section != was_section or isinstance(value, _Whole):
                values[key] = _AnyKeys() if is_section else None
        elif key not in values:
            raise _unknown(name + key, key, values, name)
        if isinstance(values[key], dict):
            if not hasattr(value, "items"):
                raise UserError(f"config key {name}{key}={value!r} must be a section with keys")
            _merge(values[key], value, f"{name}{key}.")
        else:
            values[key] = value


def _unknown(full: str, key: str, known, where: str) -> UserError:
    near = difflib.get_close_matches(key, known, n=1)
    if RENAMED.get(key) in known:
        near = [RENAMED[key]]
    hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(known)}"
    return UserError(f"unknown config key {printable(full)}; {hint}")


def _value(kind, value, name: str):
    if dataclasses.is_dataclass(kind):
        return build(kind, value, name)
    if kind is dict or kind == dict[str, float] | None:
        if value is not None and not hasattr(value, "items"):
            raise UserError(f"config key {name}={value!r} must be a section with keys")
        return None if value is None else dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 1 << 1000:
            raise UserError(f"config key {name} is too large a number")
        return float(value)
    if kind in (int, float, str, bool) and type(value) is not kind:
        raise UserError(
            f"config key {name}={value!r:.60} is a {type(value).__name__}; it must be a "
            f"{kind.__name__}"
        )
    return value


def select(config, resume: str) -> dict:
    """The values, nested, of the fields of a config dataclass that are of this kind; see `setting`.
    Sections without one are left out."""
    selected = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = select(value, resume)
            if value:
                selected[field.name] = value
        elif field.metadata.get("resume", "") == resume:
            selected[field.name] = value
    return selected


def save_json(path, content: dict) -> None:
    """Writes JSON so that a reader sees either the old or the new file."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    storage.write(storage.path(path), text)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested dicts differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines
