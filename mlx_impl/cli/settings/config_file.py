"""Settings in a file: YAML or TOML in, YAML out. No MLX import.

YAML is read by the core schema of YAML 1.2 (section 10.3), in which 1e-5 is a number, `off` a word and
2024-01-01 a name; PyYAML's own is that of YAML 1.1, where each is something else.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from ...disk.files import read_bytes

# The worst files of these sizes take seconds: brackets in YAML 3.5 s, a key with 8,000 dots in TOML 1.1 s,
# whose time grows with the square of the size.
MOST_YAML_BYTES, MOST_TOML_BYTES = 2**16, 2**14

CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
RESOLVERS = {
    None: [(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{rule})$")) for tag, rule in CORE_SCHEMA.items()]
}


class Loader(yaml.SafeLoader):
    """The core schema; a key that stands twice is an error."""

    yaml_implicit_resolvers = RESOLVERS

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                sentence = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, sentence, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """What `Loader` reads back as it was."""

    yaml_implicit_resolvers = RESOLVERS


def read_config(path: Path) -> dict[Any, Any]:
    """The keys and values in a file; ValueError of one sentence where it holds nothing of the kind."""
    readers = {".toml": read_toml, ".yaml": read_yaml, ".yml": read_yaml}
    most_bytes = MOST_TOML_BYTES if path.suffix == ".toml" else MOST_YAML_BYTES
    if path.suffix not in readers:
        raise ValueError(f"{path}: a configuration must end in .yaml, .yml or .toml")
    try:
        text = read_bytes(path, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: must be UTF-8") from None
    try:
        values = readers[path.suffix](text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold keys and values, got a {type(values).__name__}")
    return values


def read_toml(text: str) -> object:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("must be TOML, and is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"must be TOML: {error}") from None


def read_yaml(text: str) -> object:
    """{} where there is nothing but comments."""
    try:
        values = yaml.load(text, Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("must be YAML, and is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"must be YAML: line {line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"must be YAML: {' '.join(str(error).split())}") from None
    return {} if values is None else values


def to_yaml(settings: dict[str, Any]) -> str:
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True)
