"""JSON that says when it was changed: records with a checksum of their own, lines with one each; fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path

from mlx_slm.files import Damaged, parse_json, read_bytes, read_json, require_form
from mlx_slm.report import Report

LINES_BYTES = 1 << 30


def append_json(file: Path, record: dict) -> None:
    """Add a line of JSON with one write, on a line of its own even behind one that a kill cut off. Its last key is
    `crc`, of what stands before it."""
    with open(file, "ab+", buffering=0) as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
        whole = out.read(1) in (b"\n", b"")
        out.write((b"" if whole else b"\n") + json_line(record).encode())


def json_line(record: dict) -> str:
    """A record as a line of `append_json`."""
    body = json.dumps(record)
    return f'{body[:-1]}, "crc": {zlib.crc32(body.encode())}}}\n'


def read_json_lines(file: Path, report: Report | None = None, keys: tuple[str, ...] = ()) -> list[dict]:
    """The records of a file that `append_json` wrote, without their `crc`; none if there is no file.

    A last line that a kill cut off is left out; other lines that are damaged, or lack one of `keys`, are too, and
    `report` says how many.
    """
    records = [record if record and all(key in record for key in keys) else None for record in _records(file)]
    if damaged := report and records[:-1].count(None):
        report.warn(f"{file}: {damaged} damaged lines are left out")
    return [record for record in records if record is not None]


def count_damaged_lines(file: Path) -> int:
    """Lines of a file that `append_json` wrote, but for one that a kill cut off, which are not as they were."""
    return _records(file)[:-1].count(None)


def _records(file: Path) -> list[dict | None]:
    """The record of each line, None for a damaged one; the last is what stands behind the last line end."""
    lines = read_bytes(file, LINES_BYTES).decode("utf-8", "replace").split("\n") if file.exists() else [""]
    return [_record(line) for line in lines]


def _record(line: str) -> dict | None:
    body, mark, crc = line.rpartition(', "crc": ')
    body += "}"
    if not mark or crc != f"{zlib.crc32(body.encode())}}}":
        return None
    return parse_json(body)


def fingerprint(value) -> str:
    """SHA-256 of the canonical JSON of `value`: equal if and only if the values are equal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if any("\ud800" <= sign <= "\udfff" for sign in text):  # of a file name that is no UTF-8
        text = json.dumps(value, indent=1)
    write_text(path, text)


def write_record(path: Path, record: dict) -> None:
    """Write a dict as JSON with its own checksum; `read_record` gives it back."""
    record = json.loads(json.dumps(record))
    write_json(path, record | {"checksum": fingerprint(record)})


def read_record(path: Path, form: type | None = None) -> dict:
    """What `write_record` wrote; raises Damaged where a byte of it changed since, or it is not of a form."""
    record = read_json(path)
    checksum = record.pop("checksum", None) if isinstance(record, dict) else None
    if checksum != fingerprint(record):
        raise Damaged(f"{path} was changed after it was written; bring it back, or start over with --fresh")
    if form is not None:
        require_form(record, form, path)
    return record


def write_text(path: Path, text: str) -> None:
    """Write a text file, likewise whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
