"""Reads what trackers keep, with little of their own code: numbers, {(step, name): number}, and names of pictures."""

import json
import sqlite3
import struct

import numpy as np


def of_lines(folder) -> dict:
    """The numbers of metrics.jsonl. The last one counts where a step has a name twice."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found |= {(record["step"], name): value for name, value in record.items() if name != "step"}
    return found


def events(path) -> list:
    """The events of a file as TensorBoard reads them. A record is a length, its checksum, an event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def of_tensorboard(folder) -> tuple[dict, set, dict]:
    """Numbers (float32), names of pictures, hyper-parameters. A START event hides older events from its step on."""
    from tensorboardX.proto.event_pb2 import SessionLog
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    numbers, pictures, settings = {}, set(), {}
    for path in sorted(folder.glob("events.*")):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                numbers = {key: value for key, value in numbers.items() if key[0] < event.step}
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    numbers[event.step, value.tag] = value.simple_value
                elif value.WhichOneof("value") == "image":
                    pictures.add(value.tag)
                elif value.tag.endswith("session_start_info"):
                    started = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
                    settings = {name: getattr(x, x.WhichOneof("kind")) for name, x in started.hparams.items()}
    return numbers, pictures, settings


def of_wandb(folder) -> tuple[dict, set, dict]:
    """Numbers, names of pictures, and the configuration, from W&B's offline files: LevelDB's log with protocol buffers.

    A record lies in one or several parts of 7 bytes of header (checksum, length, kind), and no part crosses 32 KiB.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    numbers, pictures, settings = {}, set(), {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        content, at, record = path.read_bytes(), 7, b""
        assert content.startswith(b":W&B")
        while at + 7 <= len(content):
            _, length, kind = struct.unpack("<IHB", content[at : at + 7])
            room = 32768 - at % 32768
            if room < 7 or kind == 0:
                at += room
                continue
            record += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                entry, record = Record.FromString(record), b""
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in entry.history.item
                }
                for name, value in row.items():
                    if name.endswith("._type") and value == "image-file":
                        pictures.add(name.removesuffix("._type"))
                    elif "/" in name:
                        numbers[row["_step"], name] = value
                settings |= {item.key: json.loads(item.value_json) for item in entry.run.config.update}
    return numbers, pictures, settings


def of_trackio(database, run) -> tuple[dict, set, dict]:
    """Numbers, names of pictures, and the configuration of a run, whose name ends in `run`, from trackio's database."""
    numbers, pictures = {}, set()
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics WHERE run_name LIKE ? ORDER BY id", (f"%{run}",))
        for step, row in rows.fetchall():
            for name, value in json.loads(row).items():
                if isinstance(value, dict):
                    pictures.add(name)
                else:
                    numbers[step, name] = value
        ((settings,),) = connection.execute("SELECT config FROM configs WHERE run_name LIKE ?", (f"%{run}",)).fetchall()
    return numbers, pictures, json.loads(settings)


def as_float32(numbers: dict) -> dict:
    """TensorBoard keeps numbers in 32 bits."""
    return {key: float(np.float32(value)) for key, value in numbers.items()}
