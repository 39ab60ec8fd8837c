"""Read and write YAML with YAML 1.2's core types, and refuse repeated keys and aliases.

PyYAML reads YAML 1.1, where 2e-5 is text, `no` is false, 010 is 8, 1:30 is 90 and repeated keys are dropped silently.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from folora_q.recipe.yaml_causes import with_cause

KeyPath = tuple[str | int, ...]
# Deep enough for any recipe, far from Python's recursion limit.
MAX_DEPTH = 20
MAX_NUMBER_LENGTH = 400
# In characters: ten times a long recipe; reading takes less than two seconds in the worst case.
MAX_RECIPE_LENGTH = 65_536
CORE = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list] = {}
    # Only JSON's values; a SafeLoader also builds dates, sets and bytes for explicit tags.
    yaml_constructors = {
        tag: build
        for tag, build in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix("tag:yaml.org,2002:") in CORE
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "aliases are not allowed in a recipe; quote a value with a *", mark)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                message = f"the key {key.value!r} appears twice"
                raise ConstructorError(None, None, message, key.start_mark)
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value
        if len(text) > MAX_NUMBER_LENGTH:
            raise ValueError(f"a number of {len(text)} digits")
        if node.tag.endswith("float"):
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as another type."""

    yaml_implicit_resolvers = {first: list(known) for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()}


# The core schema of YAML 1.2.2, section 10.3.2.
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    for _reader in (_Loader, _Dumper):
        _reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def parse_yaml(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the value of a YAML document, and the line of every key and list item in it.

    Raises:
        ValueError: it is not valid YAML, or exceeds a limit; the message is one line and names the place. A YamlError
            also has the line itself and a hint.
    """
    if len(text) > MAX_RECIPE_LENGTH:
        raise ValueError(f"it has {len(text):,} characters, more than the limit of {MAX_RECIPE_LENGTH:,}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (loader.construct_document(node), dict(_lines(node))) if node is not None else (None, {})
    except yaml.YAMLError as error:
        raise with_cause(text, error) from None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        # A value that does not fit its explicit tag, such as `!!int x` or `!!timestamp x`.
        raise ValueError(f"a value does not fit its tag ({error})") from None


def dump_yaml(value: Any, flow: bool = False) -> str:
    """Return YAML that `parse_yaml` reads back to the same value; on one line with `flow`."""
    width = float("inf") if flow else 80
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=width)
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


def _lines(node: yaml.Node, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _lines(value, (*prefix, index))
