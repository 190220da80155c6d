"""Damage to files, drawn from a seeded generator: single bytes, and the structure of JSON."""

from __future__ import annotations

import json
import random
import struct
from copy import deepcopy
from typing import Any

__all__ = ["mutated"]

# JSON texts that `json.dumps` would not write; put in place of these marks.
_MARKS = {
    "@deep@": "[" * 5000 + "]" * 5000,
    "@nested@": '{"a":' * 200 + "1" + "}" * 200,
    "@digits@": "9" * 5000,
    "@inf@": "1e999",
    "@nan@": "NaN",
    "@lone@": '"\\ud800"',
}
_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 2**16, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, 0.5, -1.5,
    1e308, "", "x", "x" * 5000, "../x.safetensors", "/etc/passwd", "a\0b", "[/red]", "${layer}",
    "é" * 40, "1", "-1", "00", [], {}, [[]], [1, 2, 3], {"a": 1}, [0] * 3000, list(range(50)),
    *_MARKS,
)  # fmt: skip
_PIECES = (
    b"9", b"-", b"0", b"null", b'"', b"[", b"]", b"{", b"}", b"1e9", b",", b":", b"\\", b"\xff",
    b"\0", b"true", b"e", b".", b"\\ud800", b"F64", b"I4", b"/../", b"9999999999999999999",
)  # fmt: skip


def mutated(raw: bytes, kind: str, rng: random.Random) -> bytes:
    """Damage a file.

    `kind` is 'json', 'lines' (one JSON a line), 'safetensors', or one of two whose facts are JSON
    within a safetensors file: 'metadata' and 'state'.
    """
    if rng.random() < 0.02:
        return rng.choice([b"", b"\0" * len(raw), raw[: rng.randrange(len(raw) + 1)], raw * 2])
    if kind == "metadata" and rng.random() < 0.8:
        return _within_metadata(raw, rng)
    if kind == "state" and rng.random() < 0.6:
        return _within_facts(raw, rng)
    if kind in ("safetensors", "metadata", "state"):
        return _safetensors(raw, rng)
    if rng.random() < 0.35:
        return _bytes(raw, rng)
    if kind == "lines":
        lines = raw.splitlines()
        if rng.random() < 0.2:
            rng.shuffle(lines)
        at = rng.randrange(len(lines))
        lines[at] = _structure(lines[at], rng)
        return b"\n".join(lines) + b"\n"
    return _structure(raw, rng)


def _safetensors(raw: bytes, rng: random.Random) -> bytes:
    (n,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + n], raw[8 + n :]
    header = _bytes(header, rng) if rng.random() < 0.35 else _structure(header, rng)
    if rng.random() < 0.15:
        data = rng.choice([data[: rng.randrange(len(data) + 1)], data + b"x" * rng.randrange(64)])
    length = len(header)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_000])
    return struct.pack("<Q", length % 2**64) + header + data


def _parted(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def _joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _within_metadata(raw: bytes, rng: random.Random) -> bytes:
    header, data = _parted(raw)
    (name,) = header["__metadata__"]
    changed = mutated(header["__metadata__"][name].encode(), "json", rng)
    header["__metadata__"][name] = changed.decode("utf-8", "replace")
    return _joined(header, data)


def _within_facts(raw: bytes, rng: random.Random) -> bytes:
    header, data = _parted(raw)
    entry = header["facts"]
    begin, end = entry["data_offsets"]
    changed = mutated(data[begin:end], "json", rng)
    entry["data_offsets"] = [begin, begin + len(changed)]
    entry["shape"] = [len(changed)]
    return _joined(header, data[:begin] + changed + data[end:])


def _bytes(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        piece = rng.choice(_PIECES) if rng.random() < 0.7 else rng.randbytes(rng.randint(1, 6))
        match rng.randrange(6):
            case 0:
                out[at : at + len(piece)] = piece
            case 1:
                out[at:at] = piece
            case 2:
                del out[at : at + rng.randint(1, 8)]
            case 3:
                del out[at:]
            case 4:
                out[at:at] = out[at : at + rng.randint(1, 200)]
            case 5 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def _structure(raw: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(raw)
    except ValueError:
        return _bytes(raw, rng)
    box = [value]
    for _ in range(rng.randint(1, 3)):
        _change(box, rng)
    text = json.dumps(box[0])
    for mark, meant in _MARKS.items():
        text = text.replace(json.dumps(mark), meant)
    return text.encode()


def _change(box: list[Any], rng: random.Random) -> None:
    """One change somewhere: places are drawn level by level, so that no long list hides others."""
    owner: Any = box
    key: Any = 0
    while isinstance(owner[key], (dict, list)) and owner[key] and rng.random() < 0.85:
        owner = owner[key]
        key = rng.choice(list(owner)) if isinstance(owner, dict) else rng.randrange(len(owner))
    old = owner[key]
    match rng.randrange(9):
        case 0 if owner is not box:
            del owner[key]
        case 1 if isinstance(owner, dict):
            owner[rng.choice([f"{key}x", "", str(old)[:40], "__metadata__", "0"])] = owner.pop(key)
        case 2 if isinstance(owner, list) and owner is not box:
            owner.insert(key, deepcopy(old))
        case 3:
            owner[key] = [old]
        case 4 if isinstance(old, int):
            owner[key] = old + rng.choice([-2, -1, 1, 2, 8, 64])
        case 5 if isinstance(old, str):
            at = rng.randrange(len(old) + 1)
            owner[key] = old[:at] + rng.choice(["x", "/", "..", "\0", "0", " "]) + old[at:]
        case 6 if isinstance(owner, dict) and len(owner) > 1:
            owner[key] = deepcopy(owner[rng.choice(list(owner))])
        case _:
            owner[key] = deepcopy(rng.choice(_VALUES))
