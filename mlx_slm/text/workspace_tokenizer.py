"""The tokenizer of a workspace: trained on its generic set, or taken from a model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mlx_slm.config.schema import Config, TokenizerConfig
from mlx_slm.errors import SlmError
from mlx_slm.machine.ranks import ranks
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import MANIFEST, file_fingerprint, is_made
from mlx_slm.storage.locks import alone
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.documents import Documents
from mlx_slm.text.fidelity import lost, why_lost
from mlx_slm.text.hub_tokenizer import JSON_FILE, import_tokenizer, open_tokenizer, require_tokenizer_json, same_ids
from mlx_slm.text.readers import Reading
from mlx_slm.text.sources import Preparation, Source
from mlx_slm.text.tokenizer import KIND, Tokenizer, sample_documents, train_tokenizer


def adopt_tokenizer(project: Project, model: Path, called: str) -> Project:
    """Take the tokenizer of a model directory into a workspace that has none; returns the project with its settings.

    Raises SlmError if the workspace has another one.
    """
    require_tokenizer_json(model)
    directory, config = project.workspace.tokenizer, project.config
    with alone_preparing(project):
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


def ensure_tokenizer(project: Project, request: Preparation, sources: list[Source], origin: str) -> Tokenizer:
    """Load the tokenizer, or train it if this is the generic set; raises SlmError for a domain that comes before.

    `origin`: the fingerprint of the sources.
    """
    workspace, config, report = project.workspace, project.config, project.report
    name, fresh = request.name, request.fresh
    settings = config.tokenizer.model_dump(exclude_none=True)
    remake = fresh and name == config.data.generic and not is_made(workspace.tokenizer, KIND)
    if (workspace.tokenizer / MANIFEST).exists() and not remake:
        tokenizer = open_tokenizer(workspace.tokenizer)
        made = tokenizer.manifest["inputs"]
        recorded = {key: value for key, value in made["settings"].items() if key != "path" or "path" in settings}
        if recorded != settings and not (fresh and name == config.data.generic):
            others = ", ".join(other_settings(recorded, settings))
            raise SlmError(
                f"{workspace.tokenizer} was made with other settings ({others}): put these back in "
                f"{workspace.config_file} or with --set, or rebuild with "
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
    documents = Documents(sources, config, reading_of(config, request.strict, streams_of(workspace, name)))
    with report.progress("reading a sample for the tokenizer", None, "B") as advance:

        def training_text(documents: Documents):
            for digest, text, split in documents:
                advance(len(text), documents.expected_bytes())
                if split == "train":
                    yield digest, text

        texts = sample_documents(training_text(documents), config.tokenizer)
        if not documents.counts.documents:
            raise SlmError(no_text(sources))
        texts = texts or sample_documents(training_text(documents.in_every_split()), config.tokenizer)
    size = sum(map(len, texts))
    report.line(f"training a tokenizer of {config.tokenizer.vocab_size:,} pieces on {size / 1e6:.1f} MB of text")
    return train_tokenizer(workspace.tokenizer, texts, config.tokenizer, {"settings": settings, "text": origin})


def _tell_what_is_lost(tokenizer: Tokenizer, model: Path, report: Report) -> None:
    if kinds := lost(tokenizer):
        report.warn(
            f"the tokenizer of {model} ({why_lost(tokenizer)}) changes text, which is learnt and scored as changed: it "
            f"does not keep {', '.join(kinds)}"
        )


def other_settings(made: dict, settings: dict) -> list[str]:
    """Settings that a tokenizer was made with and that are others now."""
    return [f"tokenizer.{key}={value}" for key, value in made.items() if settings.get(key) != value]


def alone_preparing(project: Project) -> AbstractContextManager[None]:
    """Hold the lock of preparing text; of several ranks the first does."""
    if not ranks().is_first:
        return nullcontext()
    root, report = project.workspace.root, project.report
    busy = f"another process is preparing text in {root}: waiting for it"
    return alone(root / ".prepare.lock", busy, waiting=lambda: report.line(busy))


def reading_of(config: Config, strict: bool, streams: Path) -> Reading:
    return Reading(config.data.field, strict, config.data.max_document_bytes, streams=streams)


def streams_of(workspace: Workspace, name: str) -> Path:
    return workspace.root / "data" / name / ".streams"


def no_text(sources: list[Source]) -> str:
    named = ", ".join(source.text for source in sources)
    return f"no text in {named}: every file is empty or only white space; check the path and --field"
