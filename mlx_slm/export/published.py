"""A published model by the name that a user gives: a directory, or one of the Hub with an optional revision."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_slm.hub import said_by_the_hub

HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
READ = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md")
"""Files that are downloaded: no pickles, no code."""


def is_hub_name(name: str) -> bool:
    """Whether a name can only be one of the Hub: of its form, and nothing on this machine."""
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.is_dir()


def download(name: str) -> Path:
    """The directory of `owner/model` or `owner/model@revision` in the Hub's cache, fetched where it is not there.

    Raises SlmError: no such model or revision, not allowed, or not reached.
    """
    from huggingface_hub import snapshot_download

    parts = HUB_NAME.fullmatch(name)
    assert parts is not None
    repo, revision = parts["repo"], parts["revision"]
    with said_by_the_hub(name, repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(READ)))


def revision_of(directory: Path) -> str | None:
    """The commit of a directory in the Hub's cache; None for another one."""
    ours = directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")
    return directory.name if ours and re.fullmatch(r"[0-9a-f]{40}", directory.name) else None
