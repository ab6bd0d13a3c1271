"""How a data set of the Hub is written as a source.

    hf:OWNER/DATASET[@REVISION][:CONFIG][?KEY=VALUE[&KEY=VALUE ...]]

`split` (default: train) and `files` (a pattern such as data/*.jsonl.gz, several with commas) are keys; any other is a
field of the records, perhaps within another (meta.pile_set_name), and only records with that value are taken. A
directory of a data set works in the place of its name.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from mlx_slm.errors import SlmError

PREFIX = "hf:"
FORM = "hf:OWNER/DATASET[@REVISION][:CONFIG][?split=SPLIT&files=PATTERN&FIELD=VALUE]"


@dataclass(frozen=True)
class HubSource:
    text: str
    """As it was written."""
    name: str
    """On the Hub, or a directory."""
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    """(path of a field, value) that a record must have."""

    @classmethod
    def parse(cls, text: str) -> HubSource:
        """Raises SlmError for what is not of the form above."""
        address, _, query = text.removeprefix(PREFIX).partition("?")
        name, config = _split_config(address)
        revision = None
        if not _is_directory(name):
            name, at, revision = name.partition("@")
            revision = revision if at else None
            if at and _is_directory(name):
                raise SlmError(f"{text}: {name} is a directory, which has no revisions: leave @{revision} out")
        keys = [part.partition("=") for part in re.split(r"&(?=[\w.-]+=)", query)] if query else []
        if (
            not name
            or config == ""
            or revision == ""
            or any(not (key and equals and value) for key, equals, value in keys)
        ):
            raise SlmError(f"{text}: write it as {FORM}")
        given = {key: value for key, _, value in keys if key in ("split", "files")}
        if len(given) < sum(key in ("split", "files") for key, _, _ in keys):
            raise SlmError(f"{text}: split or files is there twice; several files are written with commas")
        files = tuple(given["files"].split(",")) if "files" in given else ()
        conditions = tuple((key, value) for key, _, value in keys if key not in given)
        return cls(text, name, revision, config, given.get("split", "train"), files, conditions)

    @property
    def is_directory(self) -> bool:
        return _is_directory(self.name)

    def takes(self, record: dict, where: str) -> bool:
        """Whether a record has the values that are asked for; raises SlmError where it has no such field."""
        return all(self._value(record, path, where) == value for path, value in self.conditions)

    def _value(self, record: dict, path: str, where: str) -> str:
        field = record
        for key in path.split("."):
            if not isinstance(field, dict) or key not in field:
                raise SlmError(f"{where}: its records have no field {path!r}; their fields: {', '.join(record)}")
            field = field[key]
        return str(field)


def _split_config(address: str) -> tuple[str, str | None]:
    if _is_directory(address):
        return address, None
    name, colon, config = address.rpartition(":")
    return (name, config) if colon else (address, None)


def _is_directory(name: str) -> bool:
    return os.path.isdir(os.path.expanduser(name))
