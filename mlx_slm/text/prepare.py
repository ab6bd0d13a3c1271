"""Text -> tokenizer and token stores: what must be made, what is there already, what changed."""

from __future__ import annotations

import contextlib
import glob
import shutil
from pathlib import Path

from mlx_slm.config.files import dump_config, known_sets
from mlx_slm.config.schema import Config
from mlx_slm.errors import Interrupted, SlmError, nearest
from mlx_slm.machine.ranks import ranks
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import MANIFEST, load_manifest
from mlx_slm.storage.locks import unused
from mlx_slm.storage.records import fingerprint, write_text
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.compare import compare, tell
from mlx_slm.text.documents import Counts, Documents
from mlx_slm.text.readers import Reading
from mlx_slm.text.shards import merge_shards, start_shards, tokenise
from mlx_slm.text.sources import SPLITS, Preparation, Source
from mlx_slm.text.store import KIND
from mlx_slm.text.tokenizer import KIND as TOKENIZER
from mlx_slm.text.tokenizer import Tokenizer
from mlx_slm.text.workspace_tokenizer import (
    alone_preparing,
    ensure_tokenizer,
    no_text,
    other_settings,
    reading_of,
    streams_of,
)

READ_WITH = ("field", "limit", "valid_fraction", "test_fraction", "max_document_bytes")
"""Settings of the reading, beside the tokenizer's and the context."""
BYTES_PER_TOKEN = 5.5
"""Of English text at 32k pieces (2.9 to 4.9, by domain), with room to spare: how much text this many tokens need."""
STREAMED_TOKENS = 8_000_000
"""Tokens of a domain that are streamed from the Hub where `--tokens` does not say."""


def sources_of(name: str, given: list[str], workspace: Workspace, config: Config) -> list[str]:
    """The sources of a set: as given, recorded, configured, or shipped, in this order; raises SlmError for none."""
    if given:
        return given
    known_by_name = known_sets()
    if (workspace.data(name, "train") / MANIFEST).exists():
        return load_manifest(workspace.data(name, "train"), KIND, any_format=True)["inputs"]["sources"]
    if name in config.data.sets:
        return config.data.sets[name]
    if name in known_by_name:
        shipped = known_by_name[name]
        if shipped.opt_in:
            raise SlmError(
                f"{name}: {shipped.opt_in}, so it is read only where you name its source: mlx-slm prepare {name} "
                f"{' '.join(shipped.sources)}"
            )
        return shipped.sources
    prepared, known = workspace.sets(), sorted({*config.data.sets, *known_by_name})
    raise SlmError(
        f"unknown set {name!r}{nearest(name, [*prepared, *known])}; prepared: {', '.join(prepared) or 'none'}; "
        f"known by their sources: {', '.join(known) or 'none'}; name its text: mlx-slm prepare {name} SOURCE..."
    )


def ensure_set(project: Project, name: str, limit: int | None = None) -> None:
    """Prepare a set that a command needs and that is missing, announced in one line; check one whose files are named.

    What was read from the Hub or from installed packages, or from files that are gone, stays as it was prepared.
    `limit`: bytes of text to stream from the Hub where the configuration sets no limit.
    """
    workspace, config, report = project.workspace, project.config, project.report
    exists = all((workspace.data(name, split) / MANIFEST).exists() for split in SPLITS)
    sources = config.data.sets.get(name, [])
    named = bool(sources) and all(_on_disk(source) for source in sources)
    together, tokenised = ranks(), (workspace.tokenizer / MANIFEST).exists()
    if len(set(together.of_all(f"{exists} {named} {tokenised}"))) > 1:
        return together.in_turn(lambda: ensure_set(project, name, limit))
    if exists:
        _tell_what_is_kept(project, name)
        if named:
            prepare(_as_prepared(project, name), Preparation(name, sources))
        return
    sources = sources_of(name, [], workspace, config)
    if name != config.data.generic and not tokenised:
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
    kept = other_settings({key: value for key, value in made.items() if key != "path"}, config.tokenizer.model_dump())
    context = load_manifest(workspace.data(name, "train"), KIND)["inputs"]["context_length"]
    if context != config.data.context_length:
        kept.append(f"data.context_length={context}")
    if kept:
        report.warn(f"set {name!r} was prepared with {', '.join(kept)}, which stay: a new --workspace takes others")


def _as_prepared(project: Project, name: str) -> Project:
    """The same with the settings that a set was read with: it is used as it was prepared."""
    config, report = project.config, project.report
    recorded = load_manifest(project.workspace.data(name, "train"), KIND)["inputs"]["reading"]
    changed = {key: value for key, value in recorded.items() if getattr(config.data, key) != value}
    if changed:
        told = ", ".join(f"data.{key}={value}" for key, value in changed.items())
        report.line(f"set {name!r} is used as it was prepared, with {told}")
    return project.having(data=config.data.model_copy(update=changed))


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
    with alone_preparing(project):
        together = ranks()
        if _can_share_out(project, request):
            return _prepare(project, request)
        alone = together.made_by_first(
            lambda: _prepare(project, request), lambda: _stored(project.workspace, request.name)
        )
        return bool(alone)


def _stored(workspace: Workspace, name: str) -> list[str | None]:
    """The fingerprint of each split of a set; None for one that is not there, or damaged."""
    found: list[str | None] = []
    for split in SPLITS:
        try:
            found.append(load_manifest(workspace.data(name, split), KIND)["fingerprint"])
        except SlmError:
            found.append(None)
    return found


def _can_share_out(project: Project, request: Preparation) -> bool:
    """Whether all of several ranks have the text of a set on their disks; raises SlmError where it, or how it is to be
    read, is not the same on all."""
    together = ranks()
    if together.size == 1:
        return True
    text, parsed = None, [Source.parse(source) for source in request.sources]
    with contextlib.suppress(SlmError):
        if not any(source.remote for source in parsed):
            text = _origin(parsed)
    if not together.agree(text is not None):
        return False
    config = project.config
    settings = {
        f"{section}.{key}": value
        for section, chosen in (("data", config.data), ("tokenizer", config.tokenizer))
        for key, value in chosen.model_dump(mode="json", exclude={"sets", "path"}).items()  # places on a host
    }
    asked = {f"--{key}": getattr(request, key) for key in ("field", "limit", "strict", "fresh")}
    together.require_same({"set": request.name, f"text of {request.name}": text} | asked | settings)
    return True


def _origin(sources: list[Source]) -> str:
    return fingerprint([[source.split, source.fingerprint()] for source in sources])


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
    shipped = known_sets().get(name)
    if shipped and shipped.sources == sources:
        report.line(f"{name}: licence: {shipped.license}; about {shipped.cost:g} MB of text for a million tokens")
    reading = reading_of(config, request.strict, streams_of(workspace, name))
    origin, together = _origin(parsed), ranks()
    tokenizer = together.in_turn(lambda: ensure_tokenizer(project, request, parsed, origin))
    together.require_same({"tokenizer": tokenizer.fingerprint})
    inputs: dict = {
        "sources": [_absolute(source) for source in sources],
        "text": origin,
        "tokenizer": tokenizer.fingerprint,
        "context_length": config.data.context_length,
        "reading": config.data.model_dump(mode="json", include=set(READ_WITH)),
    }
    if config.data.drop_near_duplicates:
        inputs["reading"]["drop_near_duplicates"] = True
    done = together.of_all(not fresh and _up_to_date(workspace, name, inputs, request.strict))

    def configure() -> None:
        if name == config.data.generic and not workspace.config_file.exists():
            write_text(workspace.config_file, dump_config(whole))

    if all(done):
        together.in_turn(configure)
        return False
    if any(done):
        return together.in_turn(lambda: _prepare(project, request))
    documents = Documents(parsed, config, reading)
    partial = workspace.root / "data" / name / ".partial"
    plan = {k: v for k, v in inputs.items() if k != "sources"}

    def tokenised(documents: Documents, plan: dict) -> dict[str, list[Path]]:
        together.in_turn(lambda: start_shards(partial, plan, report))
        return tokenise(documents, tokenizer, partial, report, f"tokenising {name}")

    shards = tokenised(documents, plan)
    if not documents.counts.documents:
        raise SlmError(no_text(parsed))
    for _ in SPLITS:
        if (filled := documents.in_every_split()) is documents:
            break
        documents = filled
        placed = {digest.hex(): split for digest, split in documents.placed.items()}
        shards = tokenised(documents, plan | {"placed": placed})
    warn_about(documents.reading, documents.counts, report)
    facts: dict = {"replaced": documents.reading.replaced}
    if reading.revisions:
        facts["revisions"] = reading.revisions

    def join() -> None:
        with unused(workspace, name):
            near = _join(project, name, shards, tokenizer, inputs, facts)
        tell(project, name, near)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(streams_of(workspace, name), ignore_errors=True)
        if name == config.data.generic:
            write_text(workspace.config_file, dump_config(whole))

    together.made_by_first(join, lambda: _stored(workspace, name))
    return True


def _join(
    project: Project, name: str, shards: dict[str, list[Path]], tokenizer: Tokenizer, inputs: dict, facts: dict
) -> dict:
    """Make the stores of a set from its shards; returns what `compare` found."""
    workspace, drop = project.workspace, project.config.data.drop_near_duplicates
    for split in ("test", "valid"):
        merge_shards(shards[split], workspace.data(name, split), tokenizer, inputs, facts)
    train, left_out = workspace.data(name, "train"), None
    if drop:
        every = shards["train"][0].parent / "all"
        merge_shards(shards["train"], every, tokenizer, inputs, facts)
        near = compare(project, name, every)
        left_out = near["marked"] if not near["marked"].all() else None
    merge_shards(shards["train"], train, tokenizer, inputs, facts, left_out)
    return near if drop else compare(project, name, train)


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


def _absolute(source: str) -> str:
    parsed = Source.parse(source)
    if parsed.remote:
        return source
    path = str(Path(parsed.text).expanduser().absolute())
    return f"{parsed.split}={path}" if parsed.split else path
