"""Files and flags -> ConfigDict -> Config. Unknown, missing and mistyped keys raise."""

import dataclasses
import inspect
import json
import pathlib
import sys
import types
import typing
from collections.abc import Collection
from typing import Any

import ml_collections

from dpojax.config.data import unescape
from dpojax.config.model import SIZES
from dpojax.config.online import names_reward_code
from dpojax.config.rules import validate
from dpojax.config.schema import CODE_SETTINGS, MAY_BE_INFINITE, Config
from dpojax.config.shipped import nearest_config, shipped_file, shipped_folder
from dpojax.errors import ConfigError, nearest_setting
from dpojax.objectives.settings import canonical_name, settings_not_taken
from dpojax.untrusted.plain_data import existing_path, number_fault, read_json
from dpojax.untrusted.user_function import names_code, run_file


def _convert(value, kind, field: str):
    """`value` as `kind` (a dataclass, a plain type, `T | None` or dict[str, str]); ConfigError
    otherwise.
    """
    if dataclasses.is_dataclass(kind):
        return _from_dict(kind, value, field)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is dict:
        of = typing.get_args(kind)[1]
        if not isinstance(value, dict):
            raise ConfigError(
                f"{field} is {value!r}; it must map names to values of type {of.__name__}"
            )
        return {k: _convert(v, of, f"{field}.{k}") for k, v in value.items()}
    if kind in (int, float):
        fault = number_fault(value, kind, infinite=field in MAY_BE_INFINITE)
        if fault is not None:
            raise ConfigError(f"{field} is {value!r:.60}, of type {type(value).__name__}; {fault}")
        return kind(value)
    if not isinstance(value, kind):
        raise ConfigError(
            f"{field} is {value!r:.200}, of type {type(value).__name__}; it must be {kind.__name__}"
        )
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{field} is {value!r:.200}; it holds a NUL character")
    return value


def _from_dict(cls, values: dict, prefix: str):
    hints = typing.get_type_hints(cls)
    dot = f"{prefix}." if prefix else ""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{prefix} is {values!r}; it must be a section with the keys {', '.join(hints)}"
        )
    for key in values:
        if key not in hints:
            near = nearest_setting(f"{dot}{key}", setting_kinds())
            raise ConfigError(
                f"{dot}{key} is not a setting; {prefix or 'the config'} has"
                f" {', '.join(hints)}{near}"
            )
    for key in hints:
        if key not in values:
            raise ConfigError(f"{dot}{key} is missing; every config names it")
    return cls(**{key: _convert(values[key], kind, f"{dot}{key}") for key, kind in hints.items()})


def from_config_dict(
    values: ml_collections.ConfigDict, *, overridden: frozenset[str] = frozenset()
) -> Config:
    """The run's frozen settings.

    Args:
      values: from a config file, command-line overrides applied.
      overridden: dotted keys that the command line set: a size given together with model.init is an
        error.
    Raises: ConfigError naming the key, its value and the fix.

    >>> values = dpojax.load_config_file("tldr")
    >>> values.loss.beta = 0.5
    >>> dpojax.from_config_dict(values).loss.beta
    0.5
    """
    tree = (
        json.loads(values.to_json_best_effort())
        if isinstance(values, ml_collections.ConfigDict)
        else values
    )
    model = tree.get("model") if isinstance(tree, dict) else None
    defines = next((k for k in ("init", "shape") if isinstance(model, dict) and model.get(k)), None)
    if isinstance(model, dict) and defines:
        if defines == "init" and "model.shape" in overridden and model.get("shape"):
            raise ConfigError(
                f"model.shape is {model['shape']!r} while model.init is {model['init']!r}; drop one"
                " of the two"
            )
        for size in SIZES:
            if f"model.{size}" in overridden:
                raise ConfigError(
                    f"model.{size} is {model.get(size)!r} while model.{defines} is"
                    f" {model[defines]!r}, which defines it; drop one of the two"
                )
            model[size] = None
        if defines == "init":
            model["shape"] = ""
    if isinstance(tree, dict):
        # run.json of dpojax 0.1 has no such key: its stages were these two.
        tree.setdefault("stages", "sft,dpo")
        _drop_defaults(tree, overridden)
    config = _from_dict(Config, tree, "")
    loss = dataclasses.replace(config.loss, name=canonical_name(config.loss.name))
    config = dataclasses.replace(config, loss=loss)
    if config.sft.num_steps == -1:
        steps = 0 if config.model.init else config.sft.steps_from_random
        config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, num_steps=steps))
    validate(config)
    return config


# Settings that say the same in two ways: what the command line sets turns the other one, a config's
# default, off.
ALTERNATIVES = (
    ("num_steps", -1, "num_epochs", 0.0),
    ("optim.warmup_steps", 0, "optim.warmup_ratio", 0.0),
    ("data.eval", "", "data.eval_share", 0.0),
)


def _section(tree: dict, key: str) -> tuple[dict, str]:
    """The section of plain settings that holds a dotted key, {} if there is none, and the key's
    last part.
    """
    *sections, last = key.split(".")
    node = tree
    for name in sections:
        inner = node.get(name)
        node = inner if isinstance(inner, dict) else {}
    return node, last


def _drop_defaults(tree: dict, overridden: frozenset[str]) -> None:
    """Turns off the config's defaults that stand against what the command line sets, in place."""
    for first, first_off, second, second_off in ALTERNATIVES:
        for given, given_off, key, off in (
            (first, first_off, second, second_off),
            (second, second_off, first, first_off),
        ):
            node, last = _section(tree, key)
            given_node, given_last = _section(tree, given)
            is_set = given in overridden and given_node.get(given_last) != given_off
            if is_set and key not in overridden and last in node:
                node[last] = off
    loss = tree.get("loss")
    if "loss.name" in overridden and isinstance(loss, dict) and isinstance(loss.get("name"), str):
        for key in settings_not_taken(loss["name"], loss):
            if f"loss.{key}" not in overridden:
                loss[key] = None


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain data: what `config.json` holds, and what a later `--config=config.json`
    reads.
    """
    return dataclasses.asdict(config)


def flat_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat_settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def changed_settings(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configs as plain data, one text per setting."""
    found = []
    for key in {**saved, **now}:
        old = saved.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {old!r} -> {new!r}")
    return found


def load_config_file(
    spec: str, *, allow_code: bool = False, overridden: Collection[str] = ()
) -> ml_collections.ConfigDict:
    """`FILE.py[:argument]` (calls its get_config), `FILE.json`, or the name of a shipped config
    with or without argument (`tldr`, `tldr:paper`) -> ConfigDict.

    Args:
      allow_code: a .json file may name functions of modules and files, which are executed.
      overridden: dotted keys that the command line sets: what the file says of them does not
        matter.
    Raises: ConfigError if the file does not exist, does not load, names code that is not allowed,
      or refuses the argument.

    >>> dpojax.load_config_file("hh:paper").loss.name
    'sigmoid'
    """
    path, _, argument = spec.partition(":")
    file = shipped_file(path) or existing_path(path)
    if file is None or not file.is_file():
        what = (
            "is a folder; name a file in it"
            if file is not None and file.is_dir()
            else "there is no such file"
        )
        raise ConfigError(f"--config={spec!r:.300}: {what}{nearest_config(path)}")
    if file.suffix == ".json":
        values = _load_plain(file)
        if not allow_code:
            _refuse_code(file, values, overridden)
        return values
    _open_package_of(file)
    try:
        module = run_file(str(file), file.stat().st_mtime_ns, f"dpojax_config_{file.stem}")
        if not argument:
            return module.get_config()
        if not inspect.signature(module.get_config).parameters:
            raise ConfigError(f"--config={spec!r:.300}: {path!r:.300} takes no argument")
        return module.get_config(argument)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's file raises is theirs to read
        raise ConfigError(f"--config={spec}: {type(error).__name__}: {error}") from error


def _open_package_of(file: pathlib.Path) -> None:
    """Lets a config of one's own import the files beside it, as its folder's name and theirs.

    The shipped configs need no such path, and of an installation it would be the package's inside.
    """
    folder = file.resolve().parent
    root = str(folder.parent)
    if folder != shipped_folder().resolve() and root not in sys.path:
        sys.path.append(root)


def _load_plain(file: pathlib.Path) -> ml_collections.ConfigDict:
    """The settings of a .json file. Raises ConfigError for a file that holds none."""
    values = read_json(file, infinite=True)
    try:
        return ml_collections.ConfigDict(values)
    # a key with a dot, or that is a method's name
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: not settings: {error}") from error


def _refuse_code(
    file: pathlib.Path, values: ml_collections.ConfigDict, overridden: Collection[str]
) -> None:
    """Raises ConfigError where plain data names a function: to call it, its module or file would be
    executed.
    """
    for setting in CODE_SETTINGS:
        section, _, name = setting.rpartition(".")
        part: Any = values.get(section) if section else values
        text = part.get(name) if isinstance(part, ml_collections.ConfigDict) else None
        if setting in overridden or not isinstance(text, str):
            continue
        # Folders and URLs of rewards hold a colon too.
        names = names_reward_code if setting == "reward.terms" else names_code
        if names(text):
            raise ConfigError(
                f"{file}: {setting} is {text!r:.200}, which names code, and plain data executes"
                " none; if you trust that code, add --allow_code"
            )


def apply_override(
    values: ml_collections.ConfigDict, key: str, text: str, *, flag: str = "config"
) -> None:
    """Sets `values.key` from the text of a command-line flag, read as the type that the key has.

    Args:
      flag: what stands before the key on the command line, for messages.
    Raises: ConfigError for an unknown key or text of another type.
    """
    flag = f"--{flag}.{key}={text}"
    *parents, last = key.split(".")
    node: Any = values
    for depth, part in enumerate(parents):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            raise ConfigError(f"{flag}: {_unknown(node, '.'.join(parents[:depth]), part, key)}")
        node = node[part]
    if not isinstance(node, ml_collections.ConfigDict) or (
        last not in node and not (last and _is_mapping(".".join(parents)))
    ):
        raise ConfigError(f"{flag}: {_unknown(node, '.'.join(parents), last, key)}")
    if last in node and isinstance(node[last], ml_collections.ConfigDict):
        keys = ", ".join(f"{key}.{k}" for k in map(str, node[last])) or f"{key}.NAME"
        raise ConfigError(f"{flag}: it is a section; set {'one of ' if ', ' in keys else ''}{keys}")
    kind, optional = _kind_of(key)
    readers = {bool: _read_bool, int: int, float: float, str: str}
    try:
        value = None if optional and text == "None" else readers[kind](text)
    except ValueError as error:
        raise ConfigError(f"{flag}: it must be of type {kind.__name__}") from error
    if key == "data.prompt_template":
        value = unescape(value)
    with node.unlocked(), node.ignore_type():
        node[last] = value


def _unknown(node: Any, section: str, part: str, key: str) -> str:
    """Why `part` of the dotted `key` is no setting of `section`, and what is."""
    near = nearest_setting(key, setting_kinds())
    if not isinstance(node, ml_collections.ConfigDict):
        return f"{section} is a setting, not a section; set {section} itself"
    return (
        f"there is no setting {part!r}; {section or 'the config'} has"
        f" {', '.join(map(str, node))}{near}"
    )


def setting_kinds(section: Any = None, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, with the type that its field declares."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Config if section is None else section).items():
        deeper = dataclasses.is_dataclass(kind)
        found |= setting_kinds(kind, f"{prefix}{name}.") if deeper else {prefix + name: kind}
    return found


def _is_mapping(key: str) -> bool:
    """Whether a section maps names of the user's choice:
    mesh.rules, reference.rules, loss.extra.
    """
    kind: Any = Config
    for part in filter(None, key.split(".")):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return typing.get_origin(kind) is dict


def _kind_of(key: str) -> tuple[type, bool]:
    """The type of a setting, and whether it may be None.

    A config file's extra keys, which fail later, are text.
    """
    kind: Any = Config
    for part in key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part, str)
        else:  # a mapping: rules to names, loss.extra to numbers
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else str
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return options[0], type(None) in options


def _read_bool(text: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except KeyError as error:
        raise ValueError(text) from error
