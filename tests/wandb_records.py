"""What an offline run of W&B holds, read from its own file."""

import json
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FULL, FIRST, LAST = 32768, 1, 2, 4


def records(path):
    """The records of an offline run: LevelDB's log format behind a header of 7 bytes."""
    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place < len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == size == 0:
            place += left
            continue
        chunk = data[place + 7 : place + 7 + size]
        place += 7 + size
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def items(message):
    """The values by key; those of tables and pictures are dictionaries."""
    values = {}
    for item in message:
        value = json.loads(item.value_json)
        *outer, last = item.nested_key or [item.key]
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return values
