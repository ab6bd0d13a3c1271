"""Sources -> documents. A source is a file, a glob, a directory, `hf:<dataset>...` (hub_source) or
`docs:<packages>`."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.storage.artifacts import file_fingerprint
from mlx_slm.storage.records import fingerprint
from mlx_slm.text import docstrings
from mlx_slm.text.hub_stream import read_hub
from mlx_slm.text.kinds import is_hidden, kind_of, known_kinds
from mlx_slm.text.readers import Reading, read_file

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Source:
    """One source as the user wrote it, with the split that it was given for (None: split by hash)."""

    text: str
    split: str | None

    @classmethod
    def parse(cls, text: str) -> Source:
        """'train=a.jsonl' -> Source('a.jsonl', 'train')."""
        head, equals, rest = text.partition("=")
        return cls(rest, head) if equals and head in SPLITS else cls(text, None)

    @property
    def remote(self) -> bool:
        return self.text.startswith(("hf:", "docs:"))

    def files(self, reading: Reading | None = None) -> list[Path]:
        """The files of a local source in a fixed order; raises SlmError if there are none or a kind is unknown.

        Hidden files of a directory, and those in hidden folders, are left out, as are unknown kinds and what lies in
        folders behind links; `reading` counts.
        """
        path = Path(self.text).expanduser()
        try:
            if path.is_dir():
                return self._files_in(path, reading or Reading())
            paths = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        except OSError as error:
            raise SlmError(f"{self.text[:200]}: {error.strerror}") from error
        files = [file for file in paths if file.is_file()]
        if reading and (folders := sum(file.is_dir() for file in paths)):
            reading.left_out["in a folder that the pattern names"] += folders
        if not files:
            what = "not a file with bytes of its own" if path.exists() else "no such file"
            pattern = " or the pattern" if "*" in self.text else ""
            raise SlmError(f"{self.text}: {what}; check the path{pattern}")
        for file in files:
            if not kind_of(file):
                raise SlmError(f"{file}: unknown kind of file; known: {known_kinds()}")
        return files

    def _files_in(self, directory: Path, reading: Reading) -> list[Path]:
        files = []
        for file in sorted(directory.rglob("*")):
            if file.is_dir():
                if file.is_symlink():
                    reading.left_out["in a folder behind a link"] += 1
            elif not file.is_file():
                reading.left_out["without bytes of its own"] += 1
            elif is_hidden(file, directory):
                reading.left_out["hidden"] += 1
            elif not kind_of(file):
                reading.left_out["of unknown kind"] += 1
            else:
                files.append(file)
        if not files:
            raise SlmError(f"{self.text}: no text files in this directory ({known_kinds()})")
        return files

    def fingerprint(self) -> str:
        """Changes when the text behind the source may have changed."""
        if self.text.startswith("docs:"):
            return fingerprint([self.text, docstrings.versions(self.text[5:])])
        if self.remote:
            return fingerprint(self.text)
        return fingerprint([(p.name, file_fingerprint(p)) for p in self.files()])

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield the documents, in the source's order."""
        if self.text.startswith("docs:"):
            yield from docstrings.documents(self.text[5:])
        elif self.remote:
            yield from read_hub(self.text, reading)
        else:
            for path in self.files(reading):
                count = 0
                for document in read_file(path, reading):
                    count += 1
                    yield document
                if not count:
                    reading.empty_files.append(str(path))


@dataclass(frozen=True)
class Preparation:
    """A set that is to be read, split and tokenised."""

    name: str
    sources: list[str]
    fresh: bool = False
    """Make it again, even if its inputs changed."""
    strict: bool = False
    """Fail on invalid UTF-8 instead of replacing it."""
    field: str | None = None
    """The field that holds the text. Default: the configuration's."""
    limit: int | None = None
    """Stop after this many bytes of training text. Default: the configuration's."""
