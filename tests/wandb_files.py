"""Reads what W&B writes when it is offline: records of protocol buffers in LevelDB's log format.

The format: https://github.com/google/leveldb/blob/main/doc/log_format.md, after a header of seven bytes."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK = 32768  # bytes; a record does not reach over its end, but goes on in the next one


def read_records(path: Path) -> Iterator:
    "The records of a .wandb file, as far as they were written."
    data, position, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # no room for a record's head
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def read_ended(path: Path) -> list:
    "The records of a run that has ended: W&B's own process writes the end a moment after it has said so."
    records, deadline = list(read_records(path)), time.monotonic() + 10
    while not any(record.HasField("exit") for record in records) and time.monotonic() < deadline:
        time.sleep(0.1)
        records = list(read_records(path))
    return records


def wandb_runs(root: Path) -> list[dict]:
    "What each of W&B's offline files says."
    found = []
    for path in sorted(root.rglob("*.wandb")):
        records = read_ended(path)
        run = next(record.run for record in records if record.HasField("run"))
        rows = [record.history.item for record in records if record.HasField("history")]
        steps = [int(item.value_json) for row in rows for item in row if "trainer/global_step" in (item.key, *item.nested_key)]
        updates = [run.config, *(record.config for record in records if record.HasField("config"))]
        config = {item.key or item.nested_key[0]: json.loads(item.value_json) for update in updates for item in update.update}
        found.append(
            dict(
                run=run,
                steps=steps,
                config=config,
                exits=[r.exit.exit_code for r in records if r.HasField("exit")],
                alerts=[r.alert.title for r in records if r.HasField("alert")],
                files=[entry.ref for r in records if r.HasField("artifact") for entry in r.artifact.manifest.contents],
            )
        )
    return found
