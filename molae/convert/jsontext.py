"""JSON as a person would lay it out: indented, but lists of numbers on one line."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["json_text"]


def json_text(value: Any) -> str:
    """Indented JSON text of a document, ending in a newline."""
    return _text(value, "") + "\n"


def _text(value: Any, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(key)}: {_text(v, deeper)}" for key, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list, tuple)) for v in value):
        if all(isinstance(v, (list, tuple)) and _is_flat(v) for v in value):
            return "[" + ", ".join(json.dumps(v) for v in value) + "]"
        return "[\n" + ",\n".join(deeper + _text(v, deeper) for v in value) + f"\n{indent}]"
    return json.dumps(value)


def _is_flat(value: Any) -> bool:
    return not any(isinstance(v, (dict, list, tuple)) for v in value)
