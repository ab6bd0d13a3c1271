"""Text -> tokenizer and token stores: what must be made, what is there already, what changed."""

from __future__ import annotations

import glob
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mlx_slm.config.files import dump_config, known_domains
from mlx_slm.config.schema import Config, TokenizerConfig
from mlx_slm.errors import Interrupted, SlmError, nearest
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import MANIFEST, file_fingerprint, is_made, load_manifest
from mlx_slm.storage.locks import alone, unused
from mlx_slm.storage.records import fingerprint, write_text
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.compare import compare, tell
from mlx_slm.text.documents import Counts, Documents
from mlx_slm.text.fidelity import lost, why_lost
from mlx_slm.text.hub_tokenizer import JSON_FILE, import_tokenizer, open_tokenizer, require_tokenizer_json, same_ids
from mlx_slm.text.readers import Reading
from mlx_slm.text.shards import merge_shards, start_shards, tokenise
from mlx_slm.text.sources import SPLITS, Source
from mlx_slm.text.store import KIND
from mlx_slm.text.tokenizer import KIND as TOKENIZER
from mlx_slm.text.tokenizer import Tokenizer, sample_documents, train_tokenizer

READ_WITH = ("field", "limit", "valid_fraction", "test_fraction", "max_document_bytes")
"""Settings of the reading, beside the tokenizer's and the context."""
BYTES_PER_TOKEN = 4.7
"""Of English text at 32k pieces (4.3), with room to spare: how much text this many tokens need."""
STREAMED_TOKENS = 8_000_000
"""Tokens of a domain that are streamed from the Hub where `--tokens` does not say."""


def sources_of(name: str, given: list[str], workspace: Workspace, config: Config) -> list[str]:
    """The sources of a set: as given, recorded, configured, or shipped, in this order; raises SlmError for none."""
    if given:
        return given
    domains = known_domains()
    if (workspace.data(name, "train") / MANIFEST).exists():
        return load_manifest(workspace.data(name, "train"), KIND, any_format=True)["inputs"]["sources"]
    if name in config.data.sets:
        return config.data.sets[name]
    if name in domains:
        return domains[name]
    prepared, known = workspace.sets(), sorted({*config.data.sets, *domains})
    raise SlmError(
        f"unknown set {name!r}{nearest(name, [*prepared, *known])}; prepared: {', '.join(prepared) or 'none'}; "
        f"known by their sources: {', '.join(known) or 'none'}; name its text: mlx-slm prepare {name} SOURCE..."
    )


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


def ensure_set(project: Project, name: str, limit: int | None = None) -> None:
    """Prepare a set that a command needs and that is missing, announced in one line; check one whose files are named.

    What was read from the Hub or from installed packages, or from files that are gone, stays as it was prepared.
    `limit`: bytes of text to stream from the Hub where the configuration sets no limit.
    """
    workspace, config, report = project.workspace, project.config, project.report
    exists = all((workspace.data(name, split) / MANIFEST).exists() for split in SPLITS)
    if exists:
        _tell_what_is_kept(project, name)
        sources = config.data.sets.get(name, [])
        if sources and all(_on_disk(source) for source in sources):
            prepare(_as_prepared(project, name), Preparation(name, sources))
        return
    sources = sources_of(name, [], workspace, config)
    if name != config.data.generic and not (workspace.tokenizer / MANIFEST).exists():
        ensure_set(project, config.data.generic)
    report.line(f"set {name!r} is not prepared yet: preparing it from {', '.join(sources)}")
    streamed = config.data.limit is None and any(source.startswith("hf:") for source in sources)
    if streamed and limit is None:
        raise SlmError(
            f"{', '.join(sources)}: how much of it? set data.limit (such as --set data.limit=5G), or prepare it first: "
            f"mlx-slm prepare {name} --limit 5G"
        )
    if streamed and limit:
        report.line(f"streaming {limit / 1e9:.2g} GB of text")
        if limit > 1e9 and not report.confirm("start the download?"):
            raise Interrupted("not started; nothing was downloaded")
    prepare(project, Preparation(name, sources, limit=limit if streamed else None))


def _tell_what_is_kept(project: Project, name: str) -> None:
    """Say which settings of a set and of its tokenizer are others than the configuration's."""
    workspace, config, report = project.workspace, project.config, project.report
    made = load_manifest(workspace.tokenizer, TOKENIZER)["inputs"]["settings"]
    kept = _other({key: value for key, value in made.items() if key != "path"}, config.tokenizer.model_dump())
    context = load_manifest(workspace.data(name, "train"), KIND)["inputs"]["context_length"]
    if context != config.data.context_length:
        kept.append(f"data.context_length={context}")
    if kept:
        report.warn(f"set {name!r} was prepared with {', '.join(kept)}, which stay: a new --workspace takes others")


def _other(made: dict, settings: dict) -> list[str]:
    """Settings that a tokenizer was made with and that are others now."""
    return [f"tokenizer.{key}={value}" for key, value in made.items() if settings.get(key) != value]


def _as_prepared(project: Project, name: str) -> Project:
    """The same with the settings that a set was read with: it is used as it was prepared."""
    config, report = project.config, project.report
    recorded = load_manifest(project.workspace.data(name, "train"), KIND)["inputs"]["reading"]
    changed = {key: value for key, value in recorded.items() if getattr(config.data, key) != value}
    if changed:
        told = ", ".join(f"data.{key}={value}" for key, value in changed.items())
        report.line(f"set {name!r} is used as it was prepared, with {told}")
    return project.having(data=config.data.model_copy(update=changed))


def adopt_tokenizer(project: Project, model: Path, called: str) -> Project:
    """Take the tokenizer of a model directory into a workspace that has none; returns the project with its settings.

    Raises SlmError if the workspace has another one.
    """
    require_tokenizer_json(model)
    directory, config = project.workspace.tokenizer, project.config
    with _alone_preparing(project):
        if not (directory / MANIFEST).exists():
            project.report.line(f"taking the tokenizer of {model}")
            settings = config.tokenizer.model_copy(update={"path": str(model.absolute())})
            inputs = {"settings": settings.model_dump(exclude_none=True), "text": file_fingerprint(model / JSON_FILE)}
            _tell_what_is_lost(import_tokenizer(model, directory, inputs), model, project.report)
    tokenizer = open_tokenizer(directory)
    if not same_ids(model, directory):
        raise SlmError(
            f"{called}: it has another tokenizer than this workspace: use a new --workspace, whose text is then "
            "prepared with the model's tokenizer"
        )
    return project.having(tokenizer=TokenizerConfig(**tokenizer.manifest["inputs"]["settings"]))


def _tell_what_is_lost(tokenizer: Tokenizer, model: Path, report: Report) -> None:
    if kinds := lost(tokenizer):
        report.warn(
            f"the tokenizer of {model} ({why_lost(tokenizer)}) changes text, which is learnt and scored as changed: it "
            f"does not keep {', '.join(kinds)}"
        )


def text_needed(tokens: int) -> int:
    """Bytes of training text that hold this many tokens, with room to spare."""
    return int(tokens * BYTES_PER_TOKEN)


def _on_disk(source: str) -> bool:
    parsed = Source.parse(source)
    return not parsed.remote and bool(glob.glob(str(Path(parsed.text).expanduser()), recursive=True))


def prepare(project: Project, request: Preparation) -> bool:
    """Make `data/<name>/{train,valid,test}` (and, for the generic set, the tokenizer first).

    The generic set's configuration becomes the workspace's. Returns False if all is there already and nothing changed;
    raises SlmError if the inputs changed, unless `fresh`.
    """
    with _alone_preparing(project):
        return _prepare(project, request)


def _alone_preparing(project: Project) -> AbstractContextManager[None]:
    root, report = project.workspace.root, project.report
    busy = f"another process is preparing text in {root}: waiting for it"
    return alone(root / ".prepare.lock", busy, waiting=lambda: report.line(busy))


def _prepare(project: Project, request: Preparation) -> bool:
    workspace, report = project.workspace, project.report
    name, sources, fresh = request.name, request.sources, request.fresh
    parsed, whole = [Source.parse(text) for text in sources], project.config
    changes = {"field": request.field or whole.data.field, "limit": request.limit or whole.data.limit}
    project = project.having(data=whole.data.model_copy(update=changes))
    config = project.config
    endless = [source.text for source in parsed if source.text.startswith("hf:")]
    if (
        endless
        and not config.data.limit
        and not report.confirm(f"stream all of {', '.join(endless)}? (--limit 1B stops)")
    ):
        raise Interrupted("not started; nothing was downloaded")
    reading = _reading(config, request.strict, _streams(workspace, name))
    origin = fingerprint([[s.split, s.fingerprint()] for s in parsed])
    tokenizer = ensure_tokenizer(project, request, parsed, origin)
    inputs: dict = {
        "sources": [_absolute(source) for source in sources],
        "text": origin,
        "tokenizer": tokenizer.fingerprint,
        "context_length": config.data.context_length,
        "reading": config.data.model_dump(mode="json", include=set(READ_WITH)),
    }
    if config.data.drop_near_duplicates:
        inputs["reading"]["drop_near_duplicates"] = True
    if not fresh and _up_to_date(workspace, name, inputs, request.strict):
        if name == config.data.generic and not workspace.config_file.exists():
            write_text(workspace.config_file, dump_config(whole))
        return False
    documents = Documents(parsed, config, reading)
    partial = workspace.root / "data" / name / ".partial"
    plan = {k: v for k, v in inputs.items() if k != "sources"}
    start_shards(partial, plan, report)
    shards = tokenise(documents, tokenizer, partial, report, f"tokenising {name}")
    if not documents.counts.documents:
        raise SlmError(_no_text(parsed))
    if not shards["train"]:
        documents = documents.with_training_text()
        start_shards(partial, plan | {"training": "the nearest"}, report)
        shards = tokenise(documents, tokenizer, partial, report, f"tokenising {name}")
    warn_about(documents.reading, documents.counts, report)
    with unused(workspace, name):
        facts, left_out = {"replaced": documents.reading.replaced}, None
        for split in ("test", "valid"):
            merge_shards(shards[split], workspace.data(name, split), tokenizer, inputs, facts)
        if config.data.drop_near_duplicates:
            merge_shards(shards["train"], partial / "all", tokenizer, inputs, facts)
            near = compare(project, name, partial / "all")
            left_out = near["marked"] if not near["marked"].all() else None
        merge_shards(shards["train"], workspace.data(name, "train"), tokenizer, inputs, facts, left_out)
        if not config.data.drop_near_duplicates:
            near = compare(project, name, workspace.data(name, "train"))
    tell(project, name, near)
    shutil.rmtree(partial)
    shutil.rmtree(_streams(workspace, name), ignore_errors=True)
    if name == config.data.generic:
        write_text(workspace.config_file, dump_config(whole))
    return True


def ensure_tokenizer(project: Project, request: Preparation, sources: list[Source], origin: str) -> Tokenizer:
    """Load the tokenizer, or train it if this is the generic set; raises SlmError for a domain that comes before.

    `origin`: the fingerprint of the sources.
    """
    workspace, config, report = project.workspace, project.config, project.report
    name, fresh = request.name, request.fresh
    settings = config.tokenizer.model_dump(exclude_none=True)
    remake = fresh and name == config.data.generic and not is_made(workspace.tokenizer, TOKENIZER)
    if (workspace.tokenizer / MANIFEST).exists() and not remake:
        tokenizer = open_tokenizer(workspace.tokenizer)
        made = tokenizer.manifest["inputs"]
        recorded = {key: value for key, value in made["settings"].items() if key != "path" or "path" in settings}
        if recorded != settings and not (fresh and name == config.data.generic):
            raise SlmError(
                f"{workspace.tokenizer} was made with other settings ({', '.join(_other(recorded, settings))}): "
                f"put these back in {workspace.config_file} or with --set, or rebuild with "
                f"`mlx-slm prepare {config.data.generic} --fresh` and then every set"
            )
        # A changed generic set keeps its tokenizer once there are models that rest on it.
        stale = fresh and name == config.data.generic and made["text"] != origin
        if recorded == settings and (not stale or workspace.runs()):
            if stale:
                report.line(f"{workspace.tokenizer} is kept, though trained on other text: runs rest on it")
            return tokenizer
    if name != config.data.generic:
        raise SlmError(
            f"no tokenizer yet: it is trained on the generic set, so prepare that first: "
            f"mlx-slm prepare {config.data.generic} SOURCE..."
        )
    if config.tokenizer.path:
        report.line(f"taking the tokenizer of {config.tokenizer.path}")
        taken = Path(config.tokenizer.path).expanduser()
        tokenizer = import_tokenizer(taken, workspace.tokenizer, {"settings": settings, "text": origin})
        _tell_what_is_lost(tokenizer, taken, report)
        return tokenizer
    documents = Documents(sources, config, _reading(config, request.strict, _streams(workspace, name)))
    with report.progress("reading a sample for the tokenizer", None, "B") as advance:

        def training_text(documents: Documents):
            for digest, text, split in documents:
                advance(len(text), documents.expected_bytes())
                if split == "train":
                    yield digest, text

        texts = sample_documents(training_text(documents), config.tokenizer)
        if not documents.counts.documents:
            raise SlmError(_no_text(sources))
        texts = texts or sample_documents(training_text(documents.with_training_text()), config.tokenizer)
    size = sum(map(len, texts))
    report.line(f"training a tokenizer of {config.tokenizer.vocab_size:,} pieces on {size / 1e6:.1f} MB of text")
    return train_tokenizer(workspace.tokenizer, texts, config.tokenizer, {"settings": settings, "text": origin})


def _reading(config: Config, strict: bool, streams: Path) -> Reading:
    return Reading(config.data.field, strict, config.data.max_document_bytes, streams=streams)


def _streams(workspace: Workspace, name: str) -> Path:
    return workspace.root / "data" / name / ".streams"


def _up_to_date(workspace: Workspace, name: str, inputs: dict, strict: bool) -> bool:
    paths = [workspace.data(name, split) for split in SPLITS]
    if not all((path / MANIFEST).exists() for path in paths):
        return False
    for path in paths:
        manifest = load_manifest(path, KIND)
        made, replaced = manifest["inputs"], manifest["info"]["replaced"]
        changed = [key for key in inputs if key not in ("sources", "reading") and made.get(key) != inputs[key]]
        before, now = made["reading"], inputs["reading"]
        changed += [f"data.{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        if strict and replaced:
            raise SlmError(
                f"{path} holds {replaced:,} documents in which invalid UTF-8 was replaced: mend the text first"
            )
        if changed:
            raise SlmError(
                f"{path} was made from other inputs (changed: {', '.join(changed)}): "
                f"run `mlx-slm prepare {name} SOURCE... --fresh` to make it again"
            )
    return True


def warn_about(reading: Reading, counts: Counts, report: Report) -> None:
    """One line per kind of thing that was mended or left out."""
    if counts.duplicates:
        report.line(f"left out {counts.duplicates:,} duplicates (white space does not count)")
    if reading.left_out:
        told = " and ".join(f"{count:,} {why}" for why, count in sorted(reading.left_out.items()))
        report.line(f"left out files of directories: {told}")
    if reading.replaced:
        report.warn(f"replaced invalid UTF-8 in {reading.replaced:,} documents (--strict fails instead)")
    if reading.empty_files:
        report.warn(f"no text in {', '.join(reading.empty_files[:5])}{' ...' if len(reading.empty_files) > 5 else ''}")


def _no_text(sources: list[Source]) -> str:
    named = ", ".join(source.text for source in sources)
    return f"no text in {named}: every file is empty or only white space; check the path and --field"


def _absolute(source: str) -> str:
    parsed = Source.parse(source)
    if parsed.remote:
        return source
    path = str(Path(parsed.text).expanduser().absolute())
    return f"{parsed.split}={path}" if parsed.split else path
