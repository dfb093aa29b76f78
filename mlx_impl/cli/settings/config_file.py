"""Read settings from YAML or TOML; write them as YAML. No MLX import.

YAML is read by the core schema of YAML 1.2 (section 10.3): 1e-5 is a number, `off` and 2024-01-01 are
strings. PyYAML's default is YAML 1.1, which reads them as a string, a boolean and a date.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from ...disk.files import read_bytes

# Parsing time grows with the square of the size. At these sizes the worst files found take seconds:
# nested brackets in YAML 3.5 s, a key with 8,000 dots in TOML 1.1 s.
MAX_YAML_BYTES, MAX_TOML_BYTES = 2**16, 2**14

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
    """YAML 1.2's core schema; a repeated key is an error."""

    yaml_implicit_resolvers = RESOLVERS

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                sentence = f"the key {key.value!r} is repeated"
                raise yaml.constructor.ConstructorError(None, None, sentence, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would otherwise not read back as the same string."""

    yaml_implicit_resolvers = RESOLVERS


def read_config(path: Path) -> dict[Any, Any]:
    """The keys and values in the file; ValueError for another kind of file or content."""
    readers = {".toml": read_toml, ".yaml": read_yaml, ".yml": read_yaml}
    max_bytes = MAX_TOML_BYTES if path.suffix == ".toml" else MAX_YAML_BYTES
    if path.suffix not in readers:
        raise ValueError(f"{path}: the name of a settings file must end in .yaml, .yml or .toml")
    try:
        text = read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: must be UTF-8 text") from None
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
        raise ValueError("must be TOML: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"must be TOML: {error}") from None


def read_yaml(text: str) -> object:
    """The value of the document; {} for an empty one."""
    try:
        values = yaml.load(text, Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("must be YAML: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"must be YAML: line {line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"must be YAML: {' '.join(str(error).split())}") from None
    return {} if values is None else values


def to_yaml(settings: dict[str, Any]) -> str:
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True)
