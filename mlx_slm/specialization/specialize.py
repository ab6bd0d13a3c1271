"""Specialisation: fine-tune a pretrained model on a domain, or train one on the domain alone (SLM-nopt).

The first `tokens` tokens of the domain's documents in a seeded order are the domain set; evaluation on the domain's
validation set decides when to stop, and the best checkpoint is exported. What is trained: all weights, those of a
chosen expert, LoRA adapters alone, or a student that also learns from a fine-tuned teacher (SLM-d).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mlx_slm.config.schema import Config
from mlx_slm.errors import Busy, Interrupted, SlmError
from mlx_slm.experts.bundle import find_source
from mlx_slm.experts.experts import FINETUNED, FREQUENT, HISTOGRAM, PRETRAINED, Experts, has_experts
from mlx_slm.export.model import export_run, lora_of, weights_of
from mlx_slm.fields import format_size
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.report import Report
from mlx_slm.specialization.finetune import Finetuning, choose_recipe, finetune_all, plan_of
from mlx_slm.specialization.selection import chosen, describe, select_expert
from mlx_slm.storage.locks import in_use
from mlx_slm.storage.records import fingerprint
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.prepare import STREAMED_TOKENS, ensure_set, prepare, sources_of, text_needed
from mlx_slm.text.rows import Sampler, Stream
from mlx_slm.text.store import Store, first_windows
from mlx_slm.training.distillation import Distillation
from mlx_slm.training.optimizer import OPTIMIZER_FIELDS
from mlx_slm.training.runs import EXPERT, Run, alone_in, default_run, open_run
from mlx_slm.training.scoring import validation_windows

FROM_NONE = "none"


@dataclass(frozen=True)
class Domain:
    """A domain set, and what decides when to stop."""

    name: str
    tokens: int | None
    store: Store
    windows: np.ndarray
    valid: Store
    valid_windows: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Stored tokens of the domain set."""
        return int(self.store.lengths(self.windows).sum())

    @property
    def valid_tokens(self) -> int:
        """Tokens that an evaluation reads."""
        return int(self.valid.lengths(self.valid_windows).sum())

    def inputs(self) -> dict:
        """What tells it from another, for a record."""
        return {
            "domain": self.name,
            "tokens": self.tokens,
            "windows": fingerprint([self.windows.tolist(), self.valid_windows.tolist()]),
            "data": self.store.fingerprint,
            "valid": self.valid.fingerprint,
        }


def specialize(
    workspace: Workspace,
    config: Config,
    domain: str,
    report: Report,
    from_run: str | None = None,
    tokens: int | None = None,
    name: str | None = None,
    fresh: bool = False,
    select: str | None = None,
    sources: list[str] | None = None,
    lora: int | None = None,
    teacher: str | None = None,
    fuse: bool = False,
) -> Run:
    """Train on `tokens` tokens of `domain` (None: all of its train split) and export the best to `models/<name>`.

    `from_run`: the pretrained run (default: that of method slm), a bundle's directory, or 'none' for SLM-nopt;
    `select`: how an expert is chosen (default: a network's by histogram, a mixture's frequent); `sources`: the domain's
    text, if it is not prepared or known; `lora`: train adapters of this rank instead, written to `adapters/<name>`, and
    with `fuse` also as a model; `teacher`: a pretrained run that is fine-tuned on the domain first, and that the model
    then learns from too. Returns the finished run.
    """
    if domain == config.data.generic:
        raise SlmError(f"--domain {domain}: that is the generic set; specialise to another one")
    source = None if from_run == FROM_NONE else find_source(workspace, from_run or default_run(workspace))
    experts, select = _experts(workspace, source, select)
    _check_kind(source, experts, lora, teacher)
    named = sources_of(domain, sources or [], workspace, config)
    if source:
        tokens = _sampled_tokens(source, domain, tokens, report)
    of_domain = _prepared(workspace, config, domain, tokens, named if sources else [], report)
    tokenizer = open_tokenizer(workspace.tokenizer)
    for pretrained in filter(None, (source, find_source(workspace, teacher) if teacher else None)):
        _require_fit(pretrained, domain, of_domain.store, tokenizer, report)
    tutor = _tuned_teacher(workspace, config, domain, report, teacher, tokens, source) if teacher else None
    if source:
        shape, origin = source.shape, {"run": source.name, "step": source.weights_step(), "is": source.identity}
    else:
        shape, origin = Shape.of(config.model, tokenizer.vocab_size, of_domain.store.context_length), FROM_NONE
    method = "lora" if lora else "d" if teacher else source.record["method"] if source else "nopt"
    finetuning, count = config.finetuning, of_domain.num_tokens
    recipe = choose_recipe(finetuning, tokens or count, source is None)
    rate = finetuning.learning_rate or config.training.learning_rate * recipe.rate
    rate *= config.lora.rate if lora else 1.0
    inputs = {
        "method": method,
        "from": origin,
        "optimizer": config.training.model_dump(mode="json", include=set(OPTIMIZER_FIELDS)),
        "shape": shape.to_dict(),
        "finetuning": finetuning.model_dump(mode="json", exclude={"recipes", "select_tokens"}),
        "recipe": recipe.model_dump(mode="json") | {"learning_rate": rate},
        "tokenizer": tokenizer.fingerprint,
        **of_domain.inputs(),
        **_inputs_of_way(config, experts, select, lora, tutor),
    }
    label = f"{method}-{select}" if select else method
    path = workspace.run(name or f"{domain}-{label}-{_size(tokens)}")
    stream = Stream.of(of_domain.store, of_domain.windows)
    if finetuning.batch_rows > max(8, stream.num_rows):
        report.warn(
            f"finetuning.batch_rows {finetuning.batch_rows:,} is more than the domain set's {stream.num_rows:,} rows: "
            "each step reads all of them, some again"
        )
    sampler = Sampler([stream], np.ones(1), finetuning.batch_rows, finetuning.seed)
    per_pass = sampler.num_rows / finetuning.batch_rows
    per_evaluation = of_domain.valid_tokens / (finetuning.batch_rows * sampler.row_length)
    plan = plan_of(config, recipe, rate, per_pass, per_evaluation)
    flops, valid = shape.flops_per_token, (of_domain.valid, of_domain.valid_windows)
    job = Finetuning(config, shape, sampler, plan, *valid, report, flops)

    def announce() -> None:
        what = f"fine-tuning {source.name}" if source else "training from scratch"
        how = f" with LoRA of rank {lora}" if lora else f" with the teacher {tutor.name}" if tutor else ""
        report.line(
            f"{what}{how} on {count:,} tokens of {domain} ({per_pass:.0f} steps a pass), rate {rate:.1e}, "
            f"at most {plan.steps:,} steps"
        )

    with alone_in(path):
        run = open_run(workspace, path, method, inputs, config, fresh, select="best", announce=announce)
        if run.finished:
            report.line(f"run {run.name} is finished ({run.record['step']:,} steps); --fresh trains it anew")
        else:
            with in_use(workspace, domain):
                _train(workspace, run, job, source, experts, tutor, of_domain)
        for candidate in run.path.glob(f"{EXPERT}*"):
            shutil.rmtree(candidate)
        export_run(workspace, run, fuse)
    return run


def _train(
    workspace: Workspace,
    run: Run,
    job: Finetuning,
    source: Run | None,
    experts: Experts | None,
    tutor: Run | None,
    domain: Domain,
) -> None:
    """Fine-tune from where the run's inputs say, or go on with it."""
    config, inputs = job.config, run.record["inputs"]
    if experts and inputs["select"] == FINETUNED:
        finetune_all(workspace, run, experts, job)
    elif experts:
        if "selection" not in run.record:
            of_domain = (domain.name, domain.store, domain.windows)
            run.record["selection"] = select_expert(experts, inputs["select"], config, *of_domain, job.report)
            run.save()
        job.report.line(f"starting from {describe(run.record['selection'])}")
        job.work(run, chosen(experts, run.record["selection"]))
    elif lora := lora_of(run):
        plain = partial(lora.applied, weights_of(workspace, source))
        changes = {"plain": plain, "flops_per_token": lora.flops_per_token, "extra_bytes": -lora.bytes_spared}
        replace(job, **changes).work(run, lora.initialise(config.finetuning.seed))
    else:
        if tutor and config.distillation.a < 1:
            job = _with_teacher(workspace, job, tutor)
        job.work(run, weights_of(workspace, source) if source else initialise(job.shape, config.finetuning.seed))


def _inputs_of_way(
    config: Config, experts: Experts | None, select: str | None, lora: int | None, tutor: Run | None
) -> dict:
    """What tells one way of specialising from another, for a record."""
    found = {}
    if experts:
        found = {"select": select, "clusters": experts.clusters.fingerprint}
    if select == PRETRAINED:
        found["select_tokens"] = config.finetuning.select_tokens
    if select in (PRETRAINED, FINETUNED):
        found["experts"] = experts.require_trained()
    if lora:
        found["lora"] = {"rank": lora, "scale": config.lora.scale}
    if tutor:
        found["teacher"] = {"run": tutor.name, "step": tutor.weights_step(), "is": tutor.identity}
        found["distillation"] = config.distillation.model_dump(mode="json")
    return found


def _tuned_teacher(
    workspace: Workspace,
    config: Config,
    domain: str,
    report: Report,
    teacher: str,
    tokens: int | None,
    student: Run | None,
) -> Run:
    """The teacher fine-tuned on the domain set, made where that was not done."""
    run = find_source(workspace, teacher)
    if student and run.shape.vocab_size != student.shape.vocab_size:
        raise SlmError(
            f"--teacher {teacher}: its embedding has {run.shape.vocab_size:,} rows, that of {student.name} "
            f"{student.shape.vocab_size:,}: they must share a vocabulary"
        )
    name = name_of_teacher(run, domain, tokens)
    known = workspace.run(name) / "run.json"
    try:
        return specialize(workspace, config, domain, report, teacher, tokens, name)
    except (Busy, Interrupted):
        raise
    except SlmError as error:
        if not known.exists():
            raise
        size = f" --tokens {format_size(tokens)}" if tokens else ""
        raise SlmError(
            f"the fine-tuned teacher: {error}; to make it anew: mlx-slm specialize --domain {domain} --from {teacher}"
            f"{size} --name {name} --fresh"
        ) from error


def name_of_teacher(run: Run, domain: str, tokens: int | None) -> str:
    """The name of a pretrained run that is fine-tuned to teach: what is there under it is reused."""
    return f"{domain}-{run.label}-{_size(tokens)}"


def _size(tokens: int | None) -> str:
    return format_size(tokens) if tokens else "all"


def _prepared(
    workspace: Workspace, config: Config, name: str, tokens: int | None, sources: list[str], report: Report
) -> Domain:
    """The domain set, prepared from `sources` where they are given, or where it was not."""
    if sources:
        prepare(workspace, name, sources, config, report)
    else:
        ensure_set(workspace, name, config, report, limit=text_needed(tokens or STREAMED_TOKENS))
    store, valid = (Store(workspace.require_set(name, split)) for split in ("train", "valid"))
    store.require_tokenizer(open_tokenizer(workspace.tokenizer))
    windows = first_windows(store, tokens, config.data.seed)
    valid_windows = validation_windows(valid, config.finetuning.eval_tokens, config.data.seed)
    return Domain(name, tokens, store, windows, valid, valid_windows)


def _with_teacher(workspace: Workspace, job: Finetuning, tutor: Run) -> Finetuning:
    """The same fine-tuning, learning from the teacher's distributions as well (SLM-d)."""
    settings, shape = job.config.distillation, tutor.shape
    model = Transformer(shape)
    model.update(weights_of(workspace, tutor))
    return replace(
        job,
        loss=Distillation(model, settings.a, settings.tau),
        flops_per_token=job.flops_per_token + shape.forward_flops_per_token,
        extra_bytes=4 * shape.num_parameters,
    )


def _check_kind(source: Run | None, experts: Experts | None, lora: int | None, teacher: str | None) -> None:
    """Raise SlmError for ways of training that do not go together."""
    if lora and teacher:
        raise SlmError("--lora and --teacher: a student is fine-tuned as a whole; give one of the two")
    if lora and (source is None or experts):
        what = f"run {source.name} has experts" if source else "there is none"
        raise SlmError(f"--lora adapts one pretrained model, and {what}: name another run with --from")
    if lora and not source.finished and source.milestone is None:
        raise SlmError(
            f"--lora: run {source.name} is not finished, and an adapter needs a base that stays: train it on"
        )
    if lora and lora > source.shape.dims:
        raise SlmError(f"--lora {lora}: the matrices of run {source.name} have rank {source.shape.dims} at the most")
    if teacher and experts:
        raise SlmError("--teacher and an expert of a network do not go together: give --from a run of a single model")


def _experts(workspace: Workspace, source: Run | None, select: str | None) -> tuple[Experts | None, str | None]:
    """(the experts of a run that has some, how to choose); raises SlmError for a choice where there is none."""
    if source is None or not has_experts(source):
        if select:
            what = f"run {source.name}" if source else "training from scratch"
            raise SlmError(f"--select {select}: {what} has no experts to choose from; it is for methods pn and mix")
        return None, None
    experts = Experts(workspace, source)
    select = select or (HISTOGRAM if experts.is_network else FREQUENT)
    if select == HISTOGRAM and not experts.is_network:
        raise SlmError(f"--select histogram needs a projected network, and run {source.name} is a mixture")
    return experts, select


def _sampled_tokens(source: Run, domain: str, tokens: int | None, report: Report) -> int | None:
    """The domain set's size: by default the one that the source was sampled for, so that both are the same subset."""
    sampled = source.record["inputs"].get("importance")
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


def _require_fit(source: Run, domain: str, store: Store, tokenizer, report: Report) -> None:
    """Raise SlmError if a pretrained run cannot read the domain's windows; warn if it is not finished."""
    if source.shape.context_length != store.context_length:
        raise SlmError(
            f"run {source.name} has a context of {source.shape.context_length} tokens, data/{domain} windows of "
            f"{store.context_length}: run `mlx-slm prepare {domain} --fresh` with the run's data.context_length"
        )
    if source.record["inputs"]["tokenizer"] != tokenizer.fingerprint:
        raise SlmError(f"run {source.name} was trained with another tokenizer than the workspace's: pretrain it anew")
    if not source.finished:
        step = source.weights_step()
        report.warn(
            f"run {source.name} is not finished; specialising "
            + ("the experts it has" if step is None else f"its step {step:,}")
        )
