"""A bundle that somebody handed over: read, checked, and its parts taken into a workspace.

Section 7 of the paper: whoever pretrained never sees the private text, and whoever specialises needs no generic text.
`handover` writes bundles. One may come from anybody, so nothing in it is trusted: only regular files under the names
that a bundle has are read, all of them in full before the first is used, each in a form that is known, and nothing is
written but copies of these below the workspace (docs/reliability.md).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_slm.clustering.clusters import KIND as CLUSTERS
from mlx_slm.clustering.clusters import read_levels
from mlx_slm.config.files import dump_config, load_config
from mlx_slm.config.schema import DEFAULT_ENCODER, Config, ProjectionConfig, TokenizerConfig
from mlx_slm.embedding.encoder import FITTED, key_of, open_fitted
from mlx_slm.embedding.encoder import KIND as ENCODER
from mlx_slm.errors import SlmError
from mlx_slm.experts.experts import has_experts
from mlx_slm.files import Damaged, load_tokenizer_json, open_regular, read_json, regular_files
from mlx_slm.models.projected import ProjectedShape, network_shapes
from mlx_slm.models.transformer import parameter_shapes
from mlx_slm.report import Report
from mlx_slm.storage.arrays import read_safetensors
from mlx_slm.storage.artifacts import MANIFEST, is_litter, load_manifest, replace_directory, verify
from mlx_slm.storage.forms import Manifest, RunForm, TokenizerSettings
from mlx_slm.storage.records import fingerprint, write_text
from mlx_slm.storage.workspace import Workspace, plain_name
from mlx_slm.text.hub_tokenizer import CONFIG_FILE, JSON_FILE, open_tokenizer
from mlx_slm.text.tokenizer import KIND as TOKENIZER
from mlx_slm.training.checkpoint import KIND as CHECKPOINT
from mlx_slm.training.checkpoint import WEIGHTS, checkpoint_path
from mlx_slm.training.find import find_run
from mlx_slm.training.runs import CONFIG, EXPERT, RECORD, Run, read_run

KIND = "bundle"
TOKENIZER_FOLDER = "tokenizer"
NAMES = re.compile(
    r"manifest\.json|run\.json|config\.yaml|README\.md"
    r"|tokenizer/(manifest\.json|tokenizer\.model|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja)"
    r"|clusters/\d{1,7}/(manifest\.json|centroids\.safetensors)"
    r"|encoder/(?P<key>(lsi|static)-[0-9a-f]{8})/"
    r"(manifest\.json|lsi\.safetensors|model\.safetensors|config\.json|tokenizer\.json)"
    r"|(expert-\d{1,7}/)?checkpoints/step-\d{1,12}/(manifest\.json|model\.safetensors)"
    r"|expert-\d{1,7}/run\.json",
    re.ASCII,
)
"""All that a bundle has."""


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether a directory is a bundle."""
    manifest = Path(path) / MANIFEST
    record = read_json(manifest, links=False) if os.path.lexists(manifest) else None
    return isinstance(record, dict) and record.get("kind") == KIND


def bundle_at(workspace: Workspace, name: str) -> Path | None:
    """The bundle that a name means: a directory that is one, unless a run of the workspace has that name."""
    return Path(name) if name not in workspace.runs() and is_bundle(name) else None


def find_source(workspace: Workspace, name: str) -> Run:
    """The run of a name in the workspace, or that of a bundle's directory, checked; raises SlmError for neither."""
    if bundle := bundle_at(workspace, name):
        manifest = checked(bundle)
        return _run_of(bundle.absolute(), manifest)
    if os.sep in name and "@" not in name:
        raise SlmError(f"{name}: no model and no bundle is there (`mlx-slm export RUN --bundle DIR` writes one)")
    return find_run(workspace, name)


def install_bundle(workspace: Workspace, directory: Path, report: Report) -> None:
    """Put tokenizer, centroids, encoder and configuration of a bundle into a workspace that has none, after checking
    all of it; raises SlmError for a workspace that has others."""
    manifest = checked(directory)
    parts = _parts(directory, manifest)
    missing = []
    for name, kind in parts.items():
        there = workspace.root / name
        if not (there / MANIFEST).exists():
            missing.append(name)
        elif load_manifest(there, kind)["fingerprint"] != load_manifest(directory / name, kind)["fingerprint"]:
            raise SlmError(f"{there} is another than that of the bundle {directory}: use a new --workspace")
    if missing:
        verify(directory, manifest)
    for name in missing:
        copy_artifact(directory / name, workspace.root / name, parts[name])
        report.line(f"took {name} from {directory}")
    if not workspace.config_file.exists():
        write_text(workspace.config_file, dump_config(_config_of(directory)))


def checked(directory: Path) -> dict:
    """The manifest of a bundle whose files are regular, of known names, whole (but for weights, which are verified when
    they are installed or loaded), of known forms, and fit each other. Raises Damaged or SlmError."""
    directory = Path(directory)
    present = set(regular_files(directory, is_litter))
    manifest = load_manifest(directory, KIND)
    names = {MANIFEST, *manifest["files"]}
    if odd := next((name for name in sorted(names) if not NAMES.fullmatch(name)), None):
        raise Damaged(f"{directory / odd}: a bundle has no file of this name; get the bundle again")
    if not {MANIFEST, RECORD, CONFIG, f"{TOKENIZER_FOLDER}/{MANIFEST}"} <= names <= present:
        raise Damaged(f"{directory} lacks files that every bundle has; get the bundle again")
    verify(directory, manifest, [name for name in manifest["files"] if "/checkpoints/" not in f"/{name}"])
    run = _run_of(directory, manifest)
    for name in sorted(name for name in names if name.endswith(f"/{MANIFEST}")):
        _require_listed(directory, name, names)
    for name, kind in _parts(directory, manifest).items():
        load_manifest(directory / name, kind)
    tokenizer = open_tokenizer(directory / TOKENIZER_FOLDER)
    of_hub = load_tokenizer_json(directory / TOKENIZER_FOLDER / JSON_FILE)
    if of_hub.get_vocab_size(with_added_tokens=True) != tokenizer.vocab_size:
        raise Damaged(f"{directory / TOKENIZER_FOLDER / JSON_FILE}: not the tokenizer beside it; get the bundle again")
    if f"{TOKENIZER_FOLDER}/{CONFIG_FILE}" in names:
        read_json(directory / TOKENIZER_FOLDER / CONFIG_FILE, TokenizerSettings)
    if tokenizer.fingerprint != run.record["inputs"]["tokenizer"] or tokenizer.vocab_size > run.shape.vocab_size:
        raise Damaged(f"{directory}: its tokenizer is not the one that its run was trained with; get the bundle again")
    clusters = directory / f"clusters/{manifest['info']['k']}"
    centroids = load_manifest(clusters, CLUSTERS)
    dims = read_levels(clusters, centroids)[-1].shape[1]
    if centroids["fingerprint"] != run.record["inputs"]["clusters"]:
        raise Damaged(f"{directory}: its centroids are not those that its run was trained with; get the bundle again")
    facts = {name: value for name, value in centroids["inputs"]["embeddings"].items() if name != "store"}
    if facts["encoder"] not in (*FITTED, DEFAULT_ENCODER) and not isinstance(facts.get("files"), str):
        raise Damaged(f"{directory}: it does not say which files its encoder has; get the bundle again")
    if key := _encoder_key(manifest):
        if facts["encoder"] not in FITTED or key != key_of(facts):
            raise Damaged(f"{directory}: its encoder is not the one of its clusters; get the bundle again")
        if open_fitted(directory / "encoder" / key, facts).dims != dims:
            raise Damaged(f"{directory}: its centroids have other dimensions than its encoder; get the bundle again")
    if _config_of(directory).data.context_length != run.shape.context_length:
        raise Damaged(f"{directory}: its configuration and its record have different contexts; get the bundle again")
    _require_shapes(directory, run, names)
    return manifest


def copy_artifact(source: Path, path: Path, kind: str) -> None:
    """Copy an artifact, and of its directory nothing else, whole or not at all."""
    manifest = load_manifest(source, kind)
    verify(source, manifest)
    temporary = path.with_name(f".{path.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in (*manifest["files"], MANIFEST):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(source / name, links=False) as original, open(temporary / name, "wb") as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
    replace_directory(temporary, path)


def _require_listed(directory: Path, name: str, names: set[str]) -> None:
    """Raise Damaged where a manifest within a bundle lists what the bundle does not, or has another fingerprint."""
    folder = name.removesuffix(MANIFEST)
    manifest = read_json(directory / name, Manifest)
    if not {f"{folder}{file}" for file in manifest["files"]} <= names:
        raise Damaged(f"{directory / name} lists files that the bundle does not; get the bundle again")
    if manifest["fingerprint"] != fingerprint([manifest["kind"], manifest["files"]]):
        raise Damaged(f"{directory / name} has another fingerprint than its files; get the bundle again")


def _run_of(directory: Path, manifest: dict) -> Run:
    """The run of a bundle, of what its record says only what a run to start from needs."""
    record = read_run(directory)
    inputs, info = record["inputs"], manifest["info"]
    run = Run(directory, {key: value for key, value in record.items() if key in RunForm.model_fields})
    if not _is_pretraining(run) or "expert" in inputs or "name" not in record or not has_experts(run):
        raise Damaged(f"{directory / RECORD}: not the record of a network or a mixture to hand over")
    plain_name(record["name"])
    if (record["method"], inputs["k"]) != (info["method"], info["k"]):
        raise Damaged(f"{directory}: its manifest and its record speak of different runs; get the bundle again")
    return run


def _is_pretraining(run: Run) -> bool:
    """Whether a run is a finished pretraining from random weights, whose last step counts."""
    elsewhere = {"from", "importance", "lora", "teacher"} & set(run.record["inputs"])
    return run.finished and run.record["select"] == "last" and not elsewhere


def _parts(directory: Path, manifest: dict) -> dict[str, str]:
    """What is taken into a workspace: {folder: kind}."""
    parts = {TOKENIZER_FOLDER: TOKENIZER, f"clusters/{manifest['info']['k']}": CLUSTERS}
    if key := _encoder_key(manifest):
        parts[f"encoder/{key}"] = ENCODER
    return parts


def _encoder_key(manifest: dict) -> str | None:
    return next((match["key"] for name in manifest["files"] if (match := NAMES.fullmatch(name)) and match["key"]), None)


def _config_of(directory: Path) -> Config:
    """The configuration of a bundle without paths of the machine that it comes from: it must not name files here."""
    try:
        config = load_config(directory / CONFIG)
    except SlmError as error:
        raise Damaged(" ".join(str(error).split())[:400]) from error
    made = load_manifest(directory / TOKENIZER_FOLDER, TOKENIZER)["inputs"]["settings"]
    encoder = config.clusters.encoder
    changes = {
        "data": config.data.model_copy(update={"sets": {}}),
        "tokenizer": TokenizerConfig(**made | {"path": None}),
        "clusters": config.clusters.model_copy(update={"encoder": encoder if encoder in FITTED else DEFAULT_ENCODER}),
    }
    plain_name(config.data.generic)
    return config.model_copy(update=changes)


def _require_shapes(directory: Path, run: Run, names: set[str]) -> None:
    """Raise Damaged where a bundle's weights are missing or not of the shapes that its record says."""
    inputs = run.record["inputs"]
    if run.is_network:
        projected = ProjectedShape.of(ProjectionConfig(**inputs["projection"]), run.shape)
        models = {run.path: network_shapes(projected)} if projected.k == inputs["k"] else {}
    else:
        trained = {name.split("/")[0] for name in names if name.startswith(EXPERT)}
        models = {directory / name: parameter_shapes(run.shape) for name in trained}
    for path, shapes in models.items():
        own = Run(path, read_run(path))
        if not _is_pretraining(own) or own.record["method"] != run.record["method"]:
            raise Damaged(f"{path / RECORD}: not the record of a network or an expert to hand over")
        weights = checkpoint_path(path, own.record["step"]) / WEIGHTS
        if weights.relative_to(directory).as_posix() not in names or own.shape != run.shape:
            raise Damaged(f"{path} lacks its weights, or is of another shape; get the bundle again")
        load_manifest(weights.parent, CHECKPOINT)
        actual = {name: value.shape for name, value in read_safetensors(weights).items() if value.dtype == mx.float32}
        if actual != shapes:
            name = min(set(actual.items()) ^ set(shapes.items()))[0]
            raise Damaged(f"{weights}: {name} is missing, or not of the shape that its record says")
    if not models:
        raise Damaged(f"{directory}: no weights that fit its record; get the bundle again")
