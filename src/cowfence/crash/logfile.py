"""A recorded run in a file: ``cowfence crash record`` writes it, ``cowfence crash judge --log`` reads it.

A line of JSON, then the bytes that it announces, again and again:

    {"cowfence-crash-log": 1, "image": NAME, "program": TEXT, "commands": [TEXT, ...], "entries": COUNT}
    {"file": NAME, "bytes": LENGTH}         and the file's bytes before the run; one for each file
    {"guest": true, "bytes": LENGTH}        and the bytes of the guest's disk before the run
    {"op": "write", "file": NAME, "offset": N, "mark": TEXT, "bytes": LENGTH}     and what was written
    {"op": "zero" or "discard", "file": NAME, "offset": N, "length": N, "mark": TEXT}
    {"op": "truncate", "file": NAME, "size": N, "mark": TEXT}          {"op": "fence", "file": NAME, "mark": TEXT}
    {"op": "done", "position": N, "failed": BOOL}
    {"op": "note", "event": TEXT, "fields": {...}, "bytes": LENGTH}    and the field ``data``, where the note has one

Numbers are bytes; positions count entries from 0. The file may come from anywhere: what it announces must be there, files stay
below 1 GiB, and whatever breaks the format is refused with the line that does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

from cowfence.crash.foreign_run import ForeignRun
from cowfence.errors import Corrupt
from cowfence.storage.oplog import Discard, Done, Entry, Fence, Note, Truncate, Write, Zero

_VERSION: Final = 1
_KEY: Final = "cowfence-crash-log"
_LINE_MAX: Final = 1 << 20
_FILE_MAX: Final = 1 << 30
_EVENTS: Final = {
    "write.begin": {"command", "offset", "data"},
    "discard.begin": {"command", "offset", "length_bytes"},
    "end": {"token"},
    "flush.begin": {"command"},
    "flush.end": {"token"},
    "reopened": {"data"},
    "tool.begin": {"command"},
    "tool.end": {"token"},
}
"""The notes that a run may hold, and the fields that each needs."""
_OPENS: Final = {"end": ("write.begin", "discard.begin"), "flush.end": ("flush.begin",), "tool.end": ("tool.begin",)}


def is_run(content: bytes) -> bool:
    """True where ``content`` starts like the log of a run."""
    return content.startswith(b'{"' + _KEY.encode())


def save(run: ForeignRun, target: BinaryIO) -> None:
    """Write ``run``."""
    head = {
        _KEY: _VERSION,
        "image": run.image,
        "program": run.program,
        "commands": list(run.commands),
        "entries": len(run.entries),
    }
    _put(target, head)
    for name, content in run.initial.items():
        _put(target, {"file": name}, content)
    _put(target, {"guest": True}, run.guest)
    for entry in run.entries:
        _put_entry(target, entry)


def _put(target: BinaryIO, line: dict[str, object], data: bytes | None = None) -> None:
    if data is not None:
        line["bytes"] = len(data)
    target.write(json.dumps(line).encode() + b"\n")
    if data:
        target.write(data)


def _put_entry(target: BinaryIO, entry: Entry) -> None:
    if isinstance(entry, Note):
        fields = dict(entry.fields)
        data = fields.pop("data", None)
        _put(target, {"op": "note", "event": entry.event, "fields": fields}, data if isinstance(data, bytes) else None)
    elif isinstance(entry, Done):
        _put(target, {"op": "done", "position": entry.position, "failed": entry.failed})
    else:
        line: dict[str, object] = {"op": type(entry).__name__.lower(), "file": entry.file, "mark": entry.mark}
        if isinstance(entry, Write):
            _put(target, line | {"offset": entry.offset}, entry.data)
        elif isinstance(entry, Zero | Discard):
            _put(target, line | {"offset": entry.offset, "length": entry.length_bytes})
        elif isinstance(entry, Truncate):
            _put(target, line | {"size": entry.size_bytes})
        else:
            _put(target, line)


def load(content: bytes, name: str = "log") -> ForeignRun:
    """The run in ``content``. Raises Corrupt with the number of the line that breaks the format."""
    return _Reader(content, name).run()


class _Reader:
    def __init__(self, content: bytes, name: str) -> None:
        self._source = io.BytesIO(content)
        self._length = len(content)
        self._name = name
        self._line = 0
        self._entries: list[Entry] = []
        self._files: dict[str, bytes] = {}

    def run(self) -> ForeignRun:
        head = self._next()
        if head.get(_KEY) != _VERSION:
            raise self._corrupt(f"not a log of a run in version {_VERSION} of the format")
        image, program = self._text(head, "image"), self._text(head, "program")
        commands = head.get("commands")
        if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
            raise self._corrupt("'commands' is no list of texts")
        count = self._number(head, "entries", self._length)
        while "guest" not in (line := self._next()):
            self._files[self._text(line, "file")] = self._data(line)
        guest = self._data(line)
        if image not in self._files:
            raise self._corrupt(f"the image {image!a} is none of the files")
        for _ in range(count):
            self._entries.append(self._entry(self._next()))
        if self._source.read(1):
            raise self._corrupt("something stands behind the last entry")
        return ForeignRun(self._files, guest, tuple(self._entries), program, tuple(commands), image)

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(f"{self._name}: line {self._line}", what)

    def _next(self) -> dict[str, Any]:
        self._line += 1
        text = self._source.readline(_LINE_MAX)
        if not text.endswith(b"\n"):
            raise self._corrupt("it is cut off" if len(text) < _LINE_MAX else "it is too long")
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise self._corrupt("it is no JSON") from None
        if not isinstance(line, dict):
            raise self._corrupt("it is no JSON object")
        return line

    def _text(self, line: Mapping[str, Any], key: str) -> str:
        value = line.get(key)
        if not isinstance(value, str):
            raise self._corrupt(f"{key!a} is no text")
        return value

    def _number(self, line: Mapping[str, Any], key: str, most: int) -> int:
        value = line.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self._corrupt(f"{key!a} is no number from 0 to {most}")
        return value

    def _data(self, line: Mapping[str, Any]) -> bytes:
        length_bytes = self._number(line, "bytes", self._length - self._source.tell())
        return self._source.read(length_bytes)

    def _entry(self, line: dict[str, Any]) -> Entry:
        operation = self._text(line, "op")
        if operation == "note":
            return self._note(line)
        if operation == "done":
            position = self._number(line, "position", max(0, len(self._entries) - 1))
            if not self._entries or isinstance(self._entries[position], Note | Done):
                raise self._corrupt(f"entry {position} is no operation that could end")
            return Done(position, bool(line.get("failed")))
        file, mark = self._text(line, "file"), self._text(line, "mark")
        if file not in self._files:
            raise self._corrupt(f"{file!a} is none of the files")
        if operation == "fence":
            return Fence(file, mark)
        if operation == "truncate":
            return Truncate(file, self._number(line, "size", _FILE_MAX), mark)
        offset = self._number(line, "offset", _FILE_MAX)
        if operation == "write":
            data = self._data(line)
            if offset + len(data) > _FILE_MAX:
                raise self._corrupt("it leads past 1 GiB")
            return Write(file, offset, data, mark)
        length_bytes = self._number(line, "length", _FILE_MAX - offset)
        if operation == "zero":
            return Zero(file, offset, length_bytes, mark)
        if operation == "discard":
            return Discard(file, offset, length_bytes, mark)
        raise self._corrupt(f"there is no operation {operation!a}")

    def _note(self, line: dict[str, Any]) -> Note:
        event, fields = self._text(line, "event"), line.get("fields")
        needed = _EVENTS.get(event)
        if needed is None or not isinstance(fields, dict):
            raise self._corrupt(f"there is no note {event!a}, or it has no fields")
        if "bytes" in line:
            fields["data"] = self._data(line)
        if not needed <= fields.keys() or isinstance(fields.get("data", b""), str):
            raise self._corrupt(f"the note {event!a} needs {', '.join(sorted(needed))}")
        if event in _OPENS:
            token = self._number(fields, "token", max(0, len(self._entries) - 1))
            opened = self._entries[token] if self._entries else None
            if not isinstance(opened, Note) or opened.event not in _OPENS[event]:
                raise self._corrupt(f"entry {token} is nothing that {event!a} could end")
        for key in ("offset", "length_bytes"):
            if key in fields:
                self._number(fields, key, _FILE_MAX)
        return Note(event, fields)
