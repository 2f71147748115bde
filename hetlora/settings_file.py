"""Settings in a file: YAML, TOML or JSON, read as a dict that `Config` validates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hetlora.errors import ConfigError
from hetlora.text_files import parse_json, read_text, shortened


def read_settings(path: str | Path) -> dict[str, Any]:
    """`Config.read`."""
    path = Path(path)
    text = read_text(path, "config file", most=2**18)
    try:
        values = _parse(path.suffix.lower(), text)
    except Exception as error:  # the three parsers raise unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if mark := getattr(error, "problem_mark", None):  # of YAML, whose first line says neither what is wrong nor where
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or reason}"
        raise ConfigError(f"config file {path}: not valid {path.suffix or 'YAML'} ({reason})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: expected settings as 'name: value', got {type(values).__name__}")
    if odd := [name for name in values if not isinstance(name, str)]:
        raise ConfigError(f"config file {path}: expected the name of a setting, got {shortened(repr(odd[0]))}")
    return values


def _parse(suffix: str, text: str) -> Any:
    if suffix == ".toml":
        try:
            import tomllib
        except ModuleNotFoundError:  # Python 3.10
            import tomli as tomllib  # type: ignore[no-redef]
        return tomllib.loads(text)
    if suffix == ".json":
        return parse_json(text)
    return _parse_yaml(text)


def _parse_yaml(text: str) -> Any:
    """YAML without references, which a few lines can expand to more than any memory holds, and without a name that comes twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1}: references (*name) are not allowed, write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"line {node.start_mark.line + 1}: the key {twice[0]!r} comes twice")
            return super().construct_mapping(node, deep)

    found = yaml.load(text, Loader)
    return {} if found is None else found
