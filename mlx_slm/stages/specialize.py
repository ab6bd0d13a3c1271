"""Specialisation: fine-tune a pretrained model on a domain, or train one on the domain alone (section 3).

Resolve what it starts from (`methods.starts`), prepare the domain set, train until its validation set says so, export
the best. What is trained follows from the start: all weights, those of a chosen expert, LoRA adapters alone, or a
student that also learns from a fine-tuned teacher.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial

from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import DataConfig, Recipe
from mlx_slm.errors import Busy, Interrupted, SlmError
from mlx_slm.experts.bundle import find_source
from mlx_slm.export.model import export_run, rests_on
from mlx_slm.export.start import Pretrained
from mlx_slm.fields import format_size
from mlx_slm.finetuning.domain import DomainSet, domain_set
from mlx_slm.finetuning.finetune import Finetuning, choose_recipe, schedule_of
from mlx_slm.finetuning.rows import finetuning_rows, require_replay
from mlx_slm.machine.ranks import ranks
from mlx_slm.methods import METHODS, find_method
from mlx_slm.methods.plain import Small
from mlx_slm.methods.requests import SCRATCH, Specialisation
from mlx_slm.methods.scratch import Scratch
from mlx_slm.methods.starts import Start, find_published
from mlx_slm.models.shape import Shape
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.storage.artifacts import MANIFEST
from mlx_slm.storage.copies import copy_from
from mlx_slm.storage.locks import in_use
from mlx_slm.storage.records import write_text
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.prepare import sources_of
from mlx_slm.text.workspace_tokenizer import adopt_tokenizer
from mlx_slm.training.find import default_run, find_run
from mlx_slm.training.optimizer import OPTIMIZER_FIELDS
from mlx_slm.training.runs import EXPERT, RECORD, Run, RunRequest, alone_in, open_together

UNRECORDED = {"recipes", "select_tokens", "published_rate", "replay"}
"""Settings of fine-tuning that change nothing, or that a record has in another place."""
HELD_OUT = 0.1
"""Share of the documents for validation, and as many for testing, where there is a domain alone and nothing is said."""


def specialize(project: Project, request: Specialisation) -> Run:
    """Train on a domain and export the best to `models/<name>` (with `lora`: to `adapters/<name>`).

    Returns the finished run; raises SlmError, or Interrupted after saving.
    """
    workspace, config, report, name = project.workspace, project.config, project.report, request.domain
    if name == config.data.generic:
        raise SlmError(f"--domain {name}: that is the generic set; specialise to another one")
    require_replay(project)
    _bring_round(workspace, lambda: [request.source or default_run(workspace, Small.name), request.teacher])
    model, teacher = (
        find_published(project, *given) for given in ((request.source, "--from"), (request.teacher, "--teacher"))
    )
    with _unbound_where_it_fails(workspace):
        for published in filter(None, (model, teacher)):
            project = ranks().in_turn(partial(_as_it_reads, project, published))
        config = project.config
        start, tokens = _resolved(project, request, model)
        named = sources_of(name, list(request.sources), workspace, config)
        domain = domain_set(project, name, tokens, named if request.sources else [])
    for pretrained in start.runs():
        _require_fit(pretrained, domain, report)
    tokenizer = open_tokenizer(workspace.tokenizer)
    shape = start.shape(config, tokenizer.vocab_size, domain.store.context_length)
    start = start.ready(lambda teacher, run: _tuned_teacher(project, domain, teacher, run))
    recipe = choose_recipe(config.finetuning, tokens or domain.num_tokens, start.is_from_scratch)
    rate = start.rate(config, recipe)
    job, announcement, replayed = _job(project, domain, shape, recipe, rate)
    inputs = {
        "method": start.method,
        "from": start.origin,
        "optimizer": config.training.model_dump(mode="json", include=set(OPTIMIZER_FIELDS)),
        "shape": shape.to_dict(),
        "finetuning": config.finetuning.model_dump(mode="json", exclude=UNRECORDED),
        "recipe": recipe.model_dump(mode="json") | {"learning_rate": rate},
        "tokenizer": tokenizer.fingerprint,
        **domain.inputs(),
        **start.inputs(config),
        **replayed,
    }
    path = workspace.run(request.name or f"{name}-{start.label}-{_size(tokens)}")
    if request.fresh and path.name in {rest for one in start.runs() for rest in rests_on(workspace, one)}:
        raise SlmError(
            f"run {path.name} is what this model starts from, and --fresh would remove it: give another --name"
        )
    with alone_in(path):
        asked = RunRequest(path, start.method, inputs, config, request.fresh, "best", published=start.published)
        run = open_together(workspace, asked, lambda: report.line(f"{start.what} on {announcement}"))
        if run.finished:
            report.line(run.already_finished)
        else:
            with in_use(workspace, name, *([config.data.generic] if replayed else [])):
                start.train(project, run, job, domain)
        if ranks().is_first:
            for candidate in run.path.glob(f"{EXPERT}*"):
                shutil.rmtree(candidate)
            export_run(workspace, run, report, request.fuse)
    return run


def _bring_round(workspace: Workspace, names: Callable[[], list[str | None]]) -> None:
    """Where several ranks share no files: copy runs of the first, RUN or RUN@TOKENS, to those that have none of the
    name."""
    together = ranks()

    def known() -> list[str]:
        return [run for name in names() if name and (run := name.partition("@")[0]) in workspace.runs()]

    for name in together.by_first(known) if together.size > 1 else ():
        copy_from(0, workspace.run(name), wanted=partial(_lacks, workspace, name))


def _lacks(workspace: Workspace, run: str) -> bool:
    return run not in workspace.runs()


@contextlib.contextmanager
def _unbound_where_it_fails(workspace: Workspace) -> Iterator[None]:
    """Take a tokenizer and a configuration away again that a start which failed brought into an empty workspace, so
    that another model can be taken there."""
    is_new, configured = not (workspace.tokenizer / MANIFEST).exists(), workspace.config_file.exists()
    try:
        yield
    except SlmError:
        if is_new and not workspace.sets():
            shutil.rmtree(workspace.tokenizer, ignore_errors=True)
            if not configured:
                workspace.config_file.unlink(missing_ok=True)
        raise


def _as_it_reads(project: Project, model: Pretrained) -> Project:
    """The project with the model's tokenizer, taken into a workspace that has none, and with windows that it reads;
    these become the workspace's settings where it has none.

    A workspace without a generic set is for the few texts of one user, of which a fiftieth may be none at all.
    """
    data, report = project.config.data, project.report
    changes: dict = {}
    if data.context_length > model.shape.context_length:
        report.line(f"data.context_length={model.shape.context_length}: {model.name} reads no more at once")
        changes["context_length"] = model.shape.context_length
    if data.generic not in project.workspace.sets():
        for key in ("valid_fraction", "test_fraction"):
            if getattr(data, key) == DataConfig.model_fields[key].default:
                changes[key] = HELD_OUT
    project = project.having(data=data.model_copy(update=changes))
    project = adopt_tokenizer(project, model.directory, model.called)
    if not project.workspace.config_file.exists():
        write_text(project.workspace.config_file, dump_config(project.config))
    return project


def _resolved(project: Project, request: Specialisation, model: Pretrained | None) -> tuple[Start, int | None]:
    """(what it starts from, the size of the domain set)."""
    workspace = project.workspace
    claiming = next((method for method in reversed(METHODS) if method.claims(request)), None)
    if model:
        return (claiming or find_method(Small.name)).start(project, request, model), request.tokens
    if request.source == SCRATCH:
        return (claiming or find_method(Scratch.name)).start(project, request, None), request.tokens
    source = find_source(workspace, request.source or default_run(workspace, Small.name))
    start = (claiming or find_method(source.record["method"])).start(project, request, source)
    return start, _sampled_tokens(source, request, project.report)


def _job(
    project: Project, domain: DomainSet, shape: Shape, recipe: Recipe, rate: float
) -> tuple[Finetuning, str, dict]:
    """(the fine-tuning, what it is in words, what a record says of its rows beyond the domain set)."""
    config, report = project.config, project.report
    finetuning = config.finetuning
    sampler, per_pass, replayed = finetuning_rows(project, domain, finetuning.max_steps or recipe.steps)
    rows = sampler.streams[0].num_rows
    if finetuning.batch_rows > max(8, rows):
        report.warn(
            f"finetuning.batch_rows {finetuning.batch_rows:,} is more than the domain set's {rows:,} rows: "
            "each step reads all of them, some again"
        )
    per_evaluation = domain.valid_tokens / (finetuning.batch_rows * sampler.row_length)
    schedule = schedule_of(config, recipe, rate, per_pass, per_evaluation)
    job = Finetuning(
        config, shape, sampler, schedule, domain.valid, domain.valid_windows, report, shape.flops_per_token
    )
    return (
        job,
        (
            f"{domain.num_tokens:,} tokens of {domain.name} ({per_pass:.0f} steps a pass), rate {rate:.1e}, at most "
            f"{schedule.steps:,} steps"
        ),
        replayed,
    )


def _tuned_teacher(project: Project, domain: DomainSet, teacher: str, run: Run | Pretrained) -> Run:
    """The teacher fine-tuned on the domain set, made where that was not done."""
    name = name_of_teacher(run, domain.name, domain.tokens)
    if isinstance(run, Pretrained) and (project.workspace.run(name) / RECORD).exists():
        of = find_run(project.workspace, name).record["inputs"].get("from")
        name = name if of == run.identity else f"{name}-{run.fingerprint[:6]}"
    name = ranks().from_first(name)
    known = project.workspace.run(name) / RECORD
    try:
        tuned = specialize(project, Specialisation(domain.name, teacher, domain.tokens, name))
        _bring_round(project.workspace, lambda: [name])
        return tuned
    except (Busy, Interrupted):
        raise
    except SlmError as error:
        if not known.exists():
            raise
        size = f" --tokens {format_size(domain.tokens)}" if domain.tokens else ""
        raise SlmError(
            f"the fine-tuned teacher: {error}; to rebuild it: mlx-slm specialize --domain {domain.name} --from "
            f"{teacher}{size} --name {name} --fresh"
        ) from error


def name_of_teacher(run: Run | Pretrained, domain: str, tokens: int | None) -> str:
    """The name of a pretrained run that is fine-tuned to teach: one that is there is used again."""
    return f"{domain}-{run.label}-{_size(tokens)}"


def _size(tokens: int | None) -> str:
    return format_size(tokens) if tokens else "all"


def _sampled_tokens(source: Run, request: Specialisation, report: Report) -> int | None:
    """The domain set's size: by default the one that the source was sampled for, so that both are the same subset."""
    sampled, tokens, domain = source.record["inputs"].get("importance"), request.tokens, request.domain
    if sampled is None:
        return tokens
    if sampled["domain"] != domain:
        report.warn(f"run {source.name} was sampled for {sampled['domain'] or 'given weights'}, not for {domain}")
        return tokens
    if tokens is None and sampled["tokens"]:
        report.line(f"--tokens {format_size(sampled['tokens'])}, those that {source.name} was sampled for")
        return sampled["tokens"]
    if tokens != sampled["tokens"]:
        size = format_size(sampled["tokens"]) if sampled["tokens"] else "all"
        report.warn(f"run {source.name} was sampled for {size} tokens of {domain}, not for those asked for")
    return tokens


def _require_fit(source: Run, domain: DomainSet, report: Report) -> None:
    """Raise SlmError if a pretrained run cannot read the domain's windows; warn if it is not finished."""
    domain.store.require_fit(f"run {source.name}", source.shape.context_length, source.record["inputs"]["tokenizer"])
    if not source.finished:
        step = source.weights_step()
        report.warn(
            f"run {source.name} is not finished; specialising "
            + ("the experts it has" if step is None else f"its step {step:,}")
        )
