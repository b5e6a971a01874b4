"""Reads the transaction log an offline wandb run leaves (`run-*.wandb`), for tests to look into.

The file is a LevelDB log (google/leveldb, doc/log_format.md) behind a seven-byte header: blocks of 32 KiB, records of
checksum (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last) and payload, a protobuf `Record`.
"""

import json
import time
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def read_wandb_file(path: Path, seconds: float = 20) -> tuple[str, dict, list[dict]]:
    """`(run id, config, history rows)` of a finished offline run; rows hold wandb's `_step` too.

    `Run.finish()` returns some milliseconds before wandb's own process has written the file out, so this waits, for at
    most `seconds`, for the record that ends a run.
    """
    return _contents(_finished_records(path, seconds))


def read_wandb_summary(path: Path, seconds: float = 20) -> tuple[str, dict]:
    """`(group, summary)` of a finished offline run, waiting as `read_wandb_file` does."""
    group, summary = "", {}
    for record in _finished_records(path, seconds):
        if record.WhichOneof("record_type") == "run":
            group = record.run.run_group
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return group, summary


def _finished_records(path: Path, seconds: float) -> list[wandb_internal_pb2.Record]:
    deadline = time.monotonic() + seconds
    while True:
        records = [wandb_internal_pb2.Record.FromString(payload) for payload in _payloads(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{path} has no end after {seconds} s"
        time.sleep(0.02)


def _contents(records: list[wandb_internal_pb2.Record]) -> tuple[str, dict, list[dict]]:
    run_id, config, history = "", {}, []
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
        if kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            config.update({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update})
        if kind == "history":
            items = record.history.item
            history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return run_id, config, history


def _payloads(data: bytes):
    position, parts = HEADER, []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):  # still being written
            return
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
