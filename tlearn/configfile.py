"""Reading and writing a Config: YAML files, `a.b=c` overrides, `--quick`, and errors that say what to do.

Order of precedence, weakest first: the defaults, the YAML file, `--quick`, `a.b=c` on the command line.
Imports no torch.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tlearn.config import Config
from tlearn.dataconfig import Section
from tlearn.errors import TlearnError
from tlearn.shrink import changes

_SCALARS = (
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
)
"""YAML 1.2's reading of plain scalars: `1e-4` is a number, `off` is a word."""


class _Loader(yaml.SafeLoader):
    """Plain options only, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} is no option name")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as the same string."""


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # other styles fold line breaks, of which YAML 1.1 knows more than Python
    style = '"' if set(text) & set("\n\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_str)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _parse_yaml(text: str) -> Any:
    """Plain values.

    Raises:
        ValueError: what is wrong with the text.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), *, quick: bool = False) -> Config:
    """Read a YAML file, apply `--quick` and the overrides, check everything.

    Args:
        path: the YAML file; None: the defaults.
        overrides: `a.b=c` strings, values in YAML; `stages.0.epochs=3` reaches into lists.
        quick: a short run on small images (`quick.*`).

    Raises:
        TlearnError: one message with every problem: where, value, what is allowed, the nearest key.
    """
    config, given = _loaded(path, overrides, quick=quick)
    return shrunk(config, given) if quick else config


def full_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> tuple[Config, frozenset[str]]:
    """What `shrunk` makes a quick run of: the full run, and the options of the command line.

    Raises:
        TlearnError: as `load_config`.
    """
    return _loaded(path, overrides, quick=True)


def shrunk(config: Config, given: Iterable[str]) -> Config:
    """What `--quick` makes of a run; options that were `given` on the command line stay.

    Raises:
        TlearnError: options that do not go together then.
    """
    raw, explicit = given_options(config), frozenset(given)
    for key, value in changes(config):
        # `stages=[...]` covers `stages.0.epochs`; `stages.0.epochs=2` only itself
        if not any(key == other or key.startswith(f"{other}.") for other in explicit):
            _put(raw, key, value)
    return _validate(raw, "the configuration with --quick", explicit)


def _loaded(path: str | Path | None, overrides: Sequence[str], *, quick: bool) -> tuple[Config, frozenset[str]]:
    raw = _read_yaml(Path(path)) if path is not None else {}
    given = dict(_parse_override(text) for text in overrides)
    # A strategy named on the command line replaces the stages of a file (of a finished run, say).
    if "strategy" in given and not any(key.split(".")[0] == "stages" for key in given):
        raw.pop("stages", None)
    for key, value in given.items():
        _put(raw, key, value)
    explicit = frozenset(leaf for key, value in given.items() for leaf in _dict_leaves(key, value))
    config = _validate(raw, f"{path}" if path is not None else "the command line", explicit)
    _check_effect(config, explicit, quick=quick)
    return config, explicit


_NEEDS = {
    "data.augment.scale": ("crop", "resized"),
    "data.augment.ratio": ("crop", "resized"),
    "data.augment.pad_px": ("crop", "padded"),
    "data.augment.magnitude": ("policy", "rand"),
}
"""Options that do something beside another one only."""


def _check_effect(config: Config, given: Iterable[str], *, quick: bool) -> None:
    """What somebody typed and would not be used is a mistake."""
    for key in given:
        section = key.partition(".")[0]
        if section == "quick" and not quick:
            raise TlearnError(f"the command line: {key} has no effect without --quick")
        option, value = _NEEDS.get(key, ("", None))
        if option and getattr(config.data.augment, option) != value:
            raise TlearnError(
                f"the command line: {key} has no effect without {option}: {value}; set data.augment.{option}={value}"
            )
        if config.stages is None:
            continue
        if key == "epochs":
            raise TlearnError(
                "the command line: epochs has no effect where stages are listed; set stages.0.epochs, or strategy=NAME "
                "to make new stages"
            )
        if section in ("optimizer", "schedule") and all(getattr(stage, section) for stage in config.stages):
            raise TlearnError(
                f"the command line: {key} has no effect: every stage names its own {section}; "
                f"set stages.0.{key}, or strategy=NAME to make new stages"
            )


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal Config."""
    text: str = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def dump_options(options: dict[str, Any]) -> str:
    """YAML of some options, short lists and groups in a line each."""
    text: str = yaml.dump(
        options, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=116, default_flow_style=None
    )
    return text


def as_overrides(options: dict[str, Any]) -> list[str]:
    """The same as `a.b=c`."""
    return [f"{key}={_in_a_line(value)}" for key, value in _options(options)]


def _options(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict) and value:
            yield from _options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _in_a_line(value: Any) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=True
    )
    return text.removesuffix("...\n").strip()


def given_options(config: Config) -> dict[str, Any]:
    """Options that somebody has set, nested; not those that are at their defaults."""
    return config.model_dump(mode="json", exclude_unset=True)


def completed(config: Config, options: dict[str, Any]) -> Config:
    """The config with options that nobody has set."""
    return _validate(_over(options, given_options(config)), "the plan", ())


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both; where both hold a value, `above`."""
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _over(below[key], above[key])
    return merged


def differing_keys(old: Config, new: Config) -> list[str]:
    """Dotted paths at which two configs differ, as `a.b: old -> new`."""
    before, after = (dict(_leaves(config.model_dump(mode="json"))) for config in (old, new))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


_ABSENT = object()


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, (dict, list)) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], node


def _dict_leaves(key: str, value: Any) -> Iterator[str]:
    """The options that `key=value` sets: `data={path: x}` sets data.path alone."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _dict_leaves(f"{key}.{name}", inner)
    else:
        yield key


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = _parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TlearnError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TlearnError(f"{path}: not a valid YAML file: {error}") from None
    if not isinstance(raw, dict | None):
        raise TlearnError(f"{path}: holds a {type(raw).__name__}, not options (`data:`, `model:`, ...)")
    return raw or {}


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise TlearnError(f"{text!r} is neither a config file that exists nor an option a.b=c")
    try:
        return key, _parse_yaml(value)
    except ValueError as error:
        raise TlearnError(f"{key}: the value {value!r} is not valid YAML: {error}") from None


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    """raw["a"]["b"] = value for key "a.b"; numbers index lists."""
    node: Any = raw
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(node, list):
            node = node[_position(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise TlearnError(f"{key}: {part!r} holds {node!r}, no options")
    if isinstance(node, list):
        node[_position(node, parts[-1], key)] = value
    else:
        node[parts[-1]] = value


def _position(items: list[Any], part: str, key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(items):
        raise TlearnError(f"{key}: {part!r} is no position in a list of {len(items)} (0 is the first)")
    return int(part)


def _validate(raw: dict[str, Any], source: str, given: Iterable[str]) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem, raw, source, set(given)) for problem in error.errors()]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise TlearnError("\n  ".join([f"{count} in the configuration:", *lines])) from None


def _explain(problem: Any, raw: dict[str, Any], source: str, given: set[str]) -> str:
    """One line: file, key, value, what is allowed, nearest key."""
    keys: list[str] = []
    node: Any = raw
    for part in problem["loc"]:
        # pydantic puts the tag of a union ("sgd") into the path: no key of ours
        if part in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
            keys.append(str(part))
            node = node[part]
        elif part == problem["loc"][-1] and problem["type"] == "missing":
            keys.append(str(part))
    key = ".".join(keys)
    origin = "the command line" if any(key == other or key.startswith(f"{other}.") for other in given) else source
    where = f"{origin}: {key}" if key else origin
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such option{_nearest(problem['loc'], keys)}"
    if problem["type"] == "missing":
        hint = " (data.path=FOLDER names the images)" if key == "data" else ""
        return f"{where}: is required{hint}"
    if problem["type"] in ("model_type", "model_attributes_type") and key:
        options = ", ".join(f"{key}.{name}" for name in _section_at(problem["loc"])[0].model_fields)
        return f"{where} = {problem['input']!r}: is a group of options: {options}"
    if problem["type"] == "union_tag_not_found":
        names = [kind.model_fields["name"].default for kind in _section_at(problem["loc"])[1]]
        return f"{where}: needs a `name`, one of {', '.join(names)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    value = "" if not key or isinstance(problem["input"], dict) else f" = {problem['input']!r}"
    nearest = ""
    if problem["type"] in ("literal_error", "union_tag_invalid"):
        expected = re.findall(r"'([^']+)'", str(problem["ctx"].get("expected") or problem["ctx"]["expected_tags"]))
        given_value = problem["ctx"].get("tag", problem["input"])
        close = difflib.get_close_matches(str(given_value), expected, n=1)
        nearest = f"; did you mean {close[0]}?" if close else ""
        if problem["type"] == "union_tag_invalid":
            message, value = f"should be one of {', '.join(expected)}", f".name = {given_value!r}"
    return f"{where}{value}: {message}{nearest}"


def _nearest(loc: Sequence[str | int], keys: Sequence[str]) -> str:
    """A hint for an unknown key: the closest sibling, another kind that has it, an option of that name elsewhere."""
    section, kinds = _section_at(loc[:-1])
    unknown, siblings = keys[-1], sorted(section.model_fields)
    if close := difflib.get_close_matches(unknown, siblings, n=1):
        return f"; did you mean {'.'.join([*keys[:-1], close[0]])}?"
    if owners := [kind.model_fields["name"].default for kind in kinds if unknown in kind.model_fields]:
        return f"; {' and '.join(owners)} has it, {section.model_fields['name'].default} does not"
    if elsewhere := sorted({".".join(key) for key in _known_keys(Config) if key[-1] == unknown}):
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    return f"; options here: {', '.join(siblings)}"


def _section_at(loc: Sequence[str | int]) -> tuple[type[Section], list[type[Section]]]:
    """The options at a pydantic location, and the kinds of its union; there a union is followed by its tag ("sgd")."""
    section: type[Section] = Config
    kinds: list[type[Section]] = []
    for part in loc:
        if part in section.model_fields:
            kinds = list(_sections_in(section.model_fields[str(part)].annotation))
            section = kinds[0]
        elif isinstance(part, str):
            section = next(kind for kind in kinds if kind.model_fields["name"].default == part)
    return section, kinds


def _known_keys(section: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        for inner in _sections_in(field.annotation):
            yield from _known_keys(inner, (*prefix, name))


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)
