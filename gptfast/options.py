"""Dataclass fields as command-line flags and YAML keys: one helper, one spelling, one error for a wrong value.

A field declared with gptfast.config.option(default, help, choices=, low=, high=) is the flag `--its-name` and the key `its_name`.
What runs is decided in this order: command line > --config file > the checkpoint's recorded config (with --resume) > default, so a
flag counts only where it was given: every flag's own default is None, and the field's default is only shown. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

import typer
from rich.markup import escape

from gptfast.errors import Error, LoadError, shown

T = TypeVar("T")
_WORDS: dict[Any, tuple[str, str]] = {  # type -> (what an error asks for, metavar)
    int: ("a whole number", "INT"), float: ("a number", "NUMBER"), str: ("text", "TEXT"), bool: ("true or false", "BOOL"),
    Path: ("a path", "PATH"),
}


@dataclass(frozen=True)
class Key:
    """One option: a dataclass field reduced to what flags and YAML need."""

    name: str
    kind: type  # int, float, str, bool or Path: of the value, or of a list's or mapping's items
    shape: Literal["one", "list", "mapping"]
    index: type  # type of a mapping's keys
    optional: bool
    default: Any
    help: str
    container: Callable[[Iterable[Any]], Any]
    choices: tuple[Any, ...] | None
    low: float | None
    high: float | None

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")


def _key(field: dataclasses.Field[Any], hint: Any) -> Key:
    meta, choices = field.metadata, field.metadata.get("choices")
    arms = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    inner = [arm for arm in arms if arm is not type(None)]
    if set(inner) == {int, float}:
        inner = [float]
    origin, items = typing.get_origin(inner[0]), typing.get_args(inner[0])
    kind, shape, index = inner[0], "one", str
    container: Any = list
    if origin is Literal:
        kind, choices = type(items[0]), choices or items
    elif origin in (dict, Mapping):
        index, kind, shape = items[0], items[1], "mapping"
    elif origin is not None:
        kind, shape, container = items[0], "list", {list: list, tuple: tuple, set: set, frozenset: frozenset}.get(origin, tuple)
    if kind not in _WORDS or index not in _WORDS:
        raise TypeError(f"field {field.name}: {hint} has no spelling on a command line")
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return Key(
        field.name, kind, shape, index, type(None) in arms, default, meta["help"], container,  # type: ignore[arg-type]
        tuple(choices) if choices else None, meta.get("low"), meta.get("high"),
    )


def keys(*classes: type) -> dict[str, Key]:
    """Name -> Key of every field with a help text; a field without one is no option. Two classes must not share a name."""
    known: dict[str, Key] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if "help" in field.metadata:
                if field.name in known:
                    raise TypeError(f"two classes declare the option {field.name}")
                known[field.name] = _key(field, hints[field.name])
    return known


# ------------------------------------------------------------------------------------------------------------------------ values


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean n_embd?)', or '' where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _scalar(key: Key, kind: type, value: Any, where: str) -> Any:
    """`value` from a flag (always text) or from YAML as `kind`. Raises gptfast.Error: `where`, the value, what is allowed."""
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    else:
        fits = isinstance(value, (str, int, float)) and not (kind is int and isinstance(value, float))
        fits = fits and not (kind in (str, Path) and not isinstance(value, str))
    try:
        converted = kind(value) if fits else None
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise Error(f"{where} is {shown(value)}; {_WORDS[kind][0]} is needed")
    if kind is not key.kind:
        return converted
    if key.choices is not None and converted not in key.choices:
        allowed = [str(choice) for choice in key.choices]
        raise Error(f"{where} is {shown(value)}{nearest(str(value), allowed)}; allowed: {', '.join(allowed)}")
    low, high = key.low, key.high
    number: Any = converted
    if not ((low is None or number >= low) and (high is None or number <= high)):  # NaN is outside wherever there is a bound
        span = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
        raise Error(f"{where} is {value}; allowed: {span}")
    return converted


def convert(key: Key, value: Any, where: str) -> Any:
    """A flag's text (a list of texts for a repeated flag) or a YAML value as the field's type. `none` and null mean None."""
    if value is None or (key.optional and value in ("none", ["none"])):
        if not key.optional:
            raise Error(f"{where} has no value; {_WORDS[key.kind][0]} is needed")
        return None
    if key.shape == "one":
        return _scalar(key, key.kind, value, where)
    if key.shape == "list":
        items = value if isinstance(value, (list, tuple)) else [value]
        return key.container(_scalar(key, key.kind, item, where) for item in items)
    texts = value if isinstance(value, (list, tuple)) else [value]
    pairs = value.items() if isinstance(value, dict) else [tuple(str(item).rpartition("=")[::2]) for item in texts]
    return {_scalar(key, key.index, index, where): _scalar(key, key.kind, item, where) for index, item in pairs}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple, set, frozenset)) else value


# ------------------------------------------------------------------------------------------------------------------------- flags


_DEFAULT = re.compile(r"\s*\(default: ([^)]*)\)")  # a help text may say what None stands for


def _shown(key: Key) -> str:
    told = _DEFAULT.search(key.help)
    if told:
        return told.group(1)
    if key.default is dataclasses.MISSING:
        return "required"
    if isinstance(key.default, bool):
        return "on" if key.default else "off"
    if key.default is None or key.default == "" or (key.shape != "one" and not key.default):
        return "none"
    return " ".join(map(str, key.default)) if key.shape == "list" else str(key.default)


def parameter(key: Key, panel: str, switch: bool = False) -> inspect.Parameter:
    """The keyword-only parameter that Typer turns into the flag; None or an empty list where it is not given."""
    names = [f"{key.flag}/--no-{key.flag[2:]}"] if key.kind is bool and not switch else [key.flag]
    choices = "|".join(map(str, key.choices or ()))
    metavar = choices if 0 < len(choices) <= 14 else "NAME" if choices else _WORDS[key.kind][1]  # the help's columns stay narrow
    metavar = f"{_WORDS[key.index][1]}={metavar}" if key.shape == "mapping" else metavar
    more: dict[str, Any] = {} if key.kind is bool and key.shape == "one" else {"metavar": metavar}
    listed = f": {', '.join(map(str, key.choices or ()))}" if metavar == "NAME" else ""
    text = escape(_DEFAULT.sub("", key.help) + listed) + ("" if key.shape == "one" else " (repeat the flag for more)")
    info = typer.Option(*names, help=text, show_default=_shown(key), rich_help_panel=panel, **more)
    annotation: Any = list[str] if key.shape != "one" else bool if key.kind is bool else str
    return inspect.Parameter(key.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, info])


def accept(
    panels: Mapping[str, Mapping[str, Key]], switches: tuple[str, ...] = ()
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorator: the command gets a flag for every key of {help panel: keys}, and an argument `given`, the dict of those values
    that the command line names, converted to the fields' types. `switches` are flags without a --no- form."""
    known = {name: key for panel in panels.values() for name, key in panel.items()}

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "given"]
        added = [parameter(key, title, key.name in switches) for title, panel in panels.items() for key in panel.values()]

        def command(**values: Any) -> T:
            asked = {name: values.pop(name) for name in known}
            given = {n: convert(known[n], v, known[n].flag) for n, v in asked.items() if v is not None and v != [] and v != ()}
            return function(given=given, **values)

        command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


# ------------------------------------------------------------------------------------------------------------------ configuration


def read_mapping(values: Any, known: Mapping[str, Key], where: str) -> dict[str, Any]:
    """A mapping of keys (from YAML, JSON, a checkpoint) with every value converted.

    Raises gptfast.Error, naming `where`, for an unknown key (with the nearest one) and for a wrong value.
    """
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise Error(f"{where} holds {type(values).__name__}; a mapping of option names to values is needed")
    for name in values:
        if name not in known:
            raise Error(f"{where}: unknown key {shown(name)}{nearest(str(name), known)}")
    return {name: convert(known[name], value, f"{where}: {name}") for name, value in values.items()}


def read_yaml(path: Path | str, known: Mapping[str, Key]) -> dict[str, Any]:
    """The values of a --config file. Raises gptfast.LoadError where it is no readable YAML, gptfast.Error for its content."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise LoadError(f"config file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or type(error).__name__
        raise LoadError(f"config file {path}{f', line {mark.line + 1}' if mark else ''}: not YAML ({problem})") from error
    return read_mapping(values, known, f"config file {path}")


class Layers(NamedTuple):
    """The sources of a run's configuration, strongest first; each holds only what it names."""

    command_line: dict[str, Any]
    config_file: dict[str, Any]
    recorded: dict[str, Any]

    def merged(self) -> dict[str, Any]:
        """All values that were given, the layer that counts most on top."""
        return {**self.recorded, **self.config_file, **self.command_line}

    def build(self, cls: type[T], **fixed: Any) -> T:
        """An instance of the dataclass `cls` from these layers over its defaults; `fixed` wins over all of them."""
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in {**self.merged(), **fixed}.items() if name in names})


def layers(given: dict[str, Any], config: Path | str | None, recorded: Any, known: Mapping[str, Key]) -> Layers:
    """Reads and checks every source: `given` from accept(), the YAML file `config`, the mapping `recorded` in a checkpoint."""
    file = read_yaml(config, known) if config is not None else {}
    return Layers({n: v for n, v in given.items() if n in known}, file, read_mapping(recorded, known, "recorded config"))


def to_yaml(title: str, instance: Any, known: Mapping[str, Key]) -> str:
    """The options `known` of a dataclass instance as YAML that --config reads back, under a comment with the title."""
    import yaml

    values = {name: _plain(getattr(instance, name)) for name in known}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
    if any(line_break in text for line_break in "\x85\u2028\u2029"):  # written as they are, they are read back as spaces
        text = yaml.safe_dump(values, sort_keys=False, default_flow_style=False)
    return f"# {title}\n{text}"
