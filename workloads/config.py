"""Declares configurations (`config`), reads and overrides them, and validates them (`build`) with errors that name every fault.

A config class is defined beside the class that it configures::

    @config
    class ViewsConfig:
        full_size: PositiveInt = 128
        \"\"\"Side of the square full view, pixels.\"\"\"

YAML files, `key=value` on the command line and sweep spaces use the same dotted keys. The docstring of a field is its help text.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import pydantic
import yaml
from pydantic import ConfigDict, TypeAdapter

from workloads.errors import ConfigError

T = TypeVar("T")

ADDED_LATER = "added_later"
"""Annotation of a key that a release added to an existing config: `Annotated[int, ADDED_LATER]`.

At its default such a key does not enter `config_hash`, so that runs of earlier releases keep their names and can be resumed.
"""

_LOG = logging.getLogger(__name__)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(pydantic.Field, dataclasses.field))
def config(cls: type[T]) -> type[T]:
    """Make `cls` a configuration: frozen and keyword-only; refuses unknown keys, `True` for 1, NaN and infinity."""
    settings = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )
    return typing.cast(
        type[T], pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, slots=True, config=settings)
    )


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number (in YAML 1.1, which PyYAML follows, it is a string), and refuses a key that is given twice."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.[\d_]+([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    repeated = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if repeated is not None:
        raise ConfigError(f"key {repeated!r} is given twice{str(node.start_mark).replace(chr(10), ' ')}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse YAML from `text`; `source` is its name in errors."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    data = parse_yaml(text, source=str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    return data


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "c=[x, y]"]` → `{"a.b": 1, "c": ["x", "y"]}`; values are YAML.

    Of a key that is given twice the last value counts, so that scripts can append to a user's arguments; a warning says so.

    Raises:
        ConfigError: an argument is not `key=value`, or its value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*", key):
            raise ConfigError(f"{argument!r}: expected key=value with a dotted key, as in objective.temperature=0.1")
        if key in overrides:
            _LOG.warning("%s: given twice on the command line; the last value counts: %s", key, value)
        overrides[key] = parse_yaml(value, source=key)
    return overrides


def apply_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested `data` with dotted `overrides` set.

    Choosing another `kind` replaces its whole block: the old kind's keys would be unknown to the new one.
    """
    result = json.loads(json.dumps(data))
    for key, value in sorted(overrides.items(), key=lambda item: not item[0].endswith(".kind")):
        *parents, leaf = key.split(".")
        block = result
        for depth, parent in enumerate(parents):
            block = block.setdefault(parent, {})
            if not isinstance(block, dict):
                raise ConfigError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a group of keys")
        if leaf == "kind" and block.get("kind") != value:
            block.clear()
        block[leaf] = value
    return result


def build(cls: type[T], data: Mapping[str, Any]) -> T:
    """Validate nested `data` as `cls`.

    Raises:
        ConfigError: one line that names every fault, each by its full dotted key; for an unknown key also the nearest valid one.
    """
    try:
        # Through JSON, because strict validation accepts a list for a tuple only there.
        return TypeAdapter(cls).validate_json(json.dumps(_with_default_kinds(cls, data)))
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(cls, error)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None


def _with_default_kinds(cls: type, data: Any) -> Any:
    """Add the default `kind` of a union where `data` sets some of its keys but no kind."""
    if not isinstance(data, dict):
        return data
    hints = typing.get_type_hints(cls, include_extras=True)
    completed = dict(data)
    for field in dataclasses.fields(cls):
        blocks, value = list(_blocks(hints[field.name])), data.get(field.name)
        if not blocks or not isinstance(value, dict):
            continue
        default = cls.__pydantic_fields__[field.name].default  # type: ignore[attr-defined]
        if len(blocks) > 1 and "kind" not in value and dataclasses.is_dataclass(default):
            value = {"kind": default.kind, **value}  # type: ignore[union-attr]
        chosen = [b for b in blocks if value.get("kind") in typing.get_args(typing.get_type_hints(b).get("kind", None))]
        completed[field.name] = _with_default_kinds((chosen or blocks)[0], value)
    return completed


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_UNION_MEMBER = re.compile(
    r"constrained-\w+|function-.*|\w+\[.*\]|int|float|str|bool|none"
)  # pydantic's names of a union's types


@dataclasses.dataclass(frozen=True, slots=True)
class _Fault:
    """One error of pydantic, located by the dotted key that a user would write."""

    key: str
    kind: str | None  # of the innermost block of a union that holds the key
    is_alternative: bool  # the key takes several types, and this is what is wrong for one of them
    error: Mapping[str, Any]

    @property
    def is_unknown_key(self) -> bool:
        return self.error["type"] in _UNKNOWN


def _explain(cls: type, error: pydantic.ValidationError) -> str:
    """Every fault in one line, unknown keys first; several are numbered."""
    kinds = {tag for tags in _union_tags(cls) for tag in tags}
    groups: dict[str, list[_Fault]] = {}  # of a key that takes several types, one fault for each type
    for fault in (_located(error, kinds) for error in error.errors(include_url=False)):
        group = re.sub(r"(\.\d+)+$", "", fault.key) if fault.is_alternative else fault.key
        groups.setdefault(f"{fault.is_alternative} {group}", []).append(fault)
    known = valid_keys(cls)
    ordered = sorted(groups.values(), key=lambda faults: not faults[0].is_unknown_key)
    sentences = list(dict.fromkeys(sentence for faults in ordered for sentence in _sentences(faults, known)))
    if len(sentences) == 1:
        return sentences[0]
    return f"{len(sentences)} faults: " + " ".join(f"({number}) {text}" for number, text in enumerate(sentences, 1))


def _sentences(faults: Sequence[_Fault], known: Sequence[str]) -> list[str]:
    """One sentence for each fault; for a value of none of the types that its key takes, one for all of them."""
    if not faults[0].is_alternative:
        return [_sentence(fault, known) for fault in faults]
    of_right_type = [f for f in faults if not f.error["type"].endswith(("_type", "_parsing", "literal_error"))]
    if of_right_type:
        return [_sentence(fault, known) for fault in of_right_type]
    wanted = " or ".join(fault.error["msg"].removeprefix("Input should be ") for fault in faults)
    return [f"{faults[0].key}: input should be {wanted} (given: {faults[0].error.get('input')!r})"]


def _located(error: Mapping[str, Any], kinds: set[str]) -> _Fault:
    names: list[str] = []
    kind, is_alternative = None, False
    for index, part in enumerate(error["loc"]):
        is_last = index == len(error["loc"]) - 1
        if part in kinds and not is_last:  # pydantic's location has the union's tag; the dotted key has not
            kind = part
        elif isinstance(part, str) and index > 0 and _UNION_MEMBER.fullmatch(part):
            is_alternative = True
        elif not (is_last and part in kinds and error["type"] == "value_error"):
            names.append(str(part))
    return _Fault(".".join(names) or "config", kind, is_alternative, error)


def _sentence(fault: _Fault, known: Sequence[str]) -> str:
    key, error = fault.key, fault.error
    if fault.is_unknown_key:
        if key in known:
            return f"unknown key {key}: kind {fault.kind} does not have it"
        leaf = key.rpartition(".")[2]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        best = next(iter([*(name for name in known if name.rpartition(".")[2] == leaf), *close]), None)
        return f"unknown key {key}; " + (f"did you mean {best}?" if best else f"known keys: {', '.join(known)}")
    if error["type"] == "union_tag_invalid":
        tag, expected = str(error["ctx"]["tag"]), str(error["ctx"]["expected_tags"]).replace("'", "")
        close = difflib.get_close_matches(tag, expected.split(", "), n=1)
        return (
            f"{key}.kind: {tag!r} is unknown; " + (f"did you mean {close[0]}? " if close else "") + f"known: {expected}"
        )
    message: str = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    names_its_key = r"[a-z_.]+: " if key == "config" else r"[a-z_]+(\.[a-z_]+)+: "
    if error["type"] == "value_error" and re.match(names_its_key, message):
        return message  # a check of several keys
    if error["type"] == "value_error" and key != "config" and re.match(r"[a-z_]+: ", message):
        return f"{key}.{message}"  # a check of the block, which does not know where the block stands
    given = "" if error["type"] in ("missing", "value_error") else f" (given: {error.get('input')!r})"
    return f"{key}: {message[0].lower() + message[1:]}{given}"


def _blocks(annotation: Any) -> Iterator[type]:
    """The config classes within a field's annotation, through unions, Optional and Annotated."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for inner in typing.get_args(annotation):
            yield from _blocks(inner)


def _mapped_blocks(annotation: Any) -> Iterator[type]:
    """The config classes that are values of a field's mapping, as `dict[str, X | Y]`."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is dict:
        yield from _blocks(typing.get_args(annotation)[1])


def _union_tags(cls: type) -> Iterator[list[str]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        for block in (*_blocks(hints[field.name]), *_mapped_blocks(hints[field.name])):
            yield list(typing.get_args(typing.get_type_hints(block).get("kind", None)))
            yield from _union_tags(block)


def valid_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of `cls`, including those of all kinds of its unions."""
    hints = typing.get_type_hints(cls, include_extras=True)
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        nested = [k for block in _blocks(hints[field.name]) for k in valid_keys(block, key + ".")]
        keys += nested or [key]
    return list(dict.fromkeys(keys))


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """`(dotted key, default, help)` of every key of `cls`; the help text is the field's docstring."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rows: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(cls):
        blocks = list(_blocks(hints[field.name]))
        if blocks:
            rows += [row for block in blocks for row in describe(block, prefix + field.name + ".")]
            continue
        info = cls.__pydantic_fields__[field.name]  # type: ignore[attr-defined]
        default = "required" if info.is_required() else json.dumps(to_dict(info.get_default(call_default_factory=True)))
        rows.append((prefix + field.name, default, " ".join((info.description or "").split())))
    return list(dict.fromkeys(rows))


def to_dict(value: Any) -> Any:
    """A config as nested dicts and lists, ready for YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A config as one dict of dotted keys, for MLflow's parameters."""
    nested = to_dict(value)
    if not isinstance(nested, dict):
        return {prefix.rstrip("."): nested}
    return {k: v for name, item in nested.items() for k, v in flatten(item, f"{prefix}{name}.").items()}


def to_yaml(value: Any) -> str:
    """A config as YAML text, from which `build` restores it."""
    return yaml.safe_dump(to_dict(value), sort_keys=False, default_flow_style=None, width=120)


def config_hash(value: Any) -> str:
    """SHA-256 (hex) of the resolved config, independent of the order of its keys; `ADDED_LATER` keys count if they were set."""
    return hashlib.sha256(json.dumps(to_dict(without_unset_additions(value)), sort_keys=True).encode()).hexdigest()


def without_unset_additions(value: Any) -> Any:
    """A config as nested dicts, without the `ADDED_LATER` keys that have their default: what its identity is made of."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        known = getattr(type(value), "__pydantic_fields__", {})
        return {
            name: without_unset_additions(item)
            for name, item in ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
            if name not in known or ADDED_LATER not in known[name].metadata or item != known[name].get_default()
        }
    if isinstance(value, (list, tuple)):
        return [without_unset_additions(item) for item in value]
    if isinstance(value, dict):
        return {key: without_unset_additions(item) for key, item in value.items()}
    return value
