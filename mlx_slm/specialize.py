"""Specialisation: fine-tune a pretrained small model on a domain, or train one on the domain alone (SLM-nopt).

The first `tokens` tokens of the domain's documents in a seeded order are the domain set; evaluation on the domain's
validation set decides when to stop, and the best checkpoint is exported.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from functools import partial

import numpy as np

from mlx_slm.bundle import find_source
from mlx_slm.clustering.sampler import Sampler, Stream
from mlx_slm.config import Config, FinetuningConfig, Recipe, format_size
from mlx_slm.errors import SlmError
from mlx_slm.experts import FINETUNED, FREQUENT, HISTOGRAM, PRETRAINED, Experts, has_experts
from mlx_slm.export import export_run
from mlx_slm.models.transformer import Shape, Transformer, initialise
from mlx_slm.report import Report
from mlx_slm.scoring import validation_loss, validation_windows
from mlx_slm.selection import chosen, describe, select_expert
from mlx_slm.text.huggingface import open_tokenizer
from mlx_slm.text.prepare import STREAMED_TOKENS, ensure_set, prepare, sources_of, text_needed
from mlx_slm.text.store import Store, first_windows
from mlx_slm.training.optimizer import OPTIMIZER_FIELDS, AdamW
from mlx_slm.training.runs import EXPERT, Run, alone_in, default_run, expert_path, open_run
from mlx_slm.training.step import TrainingStep, rows_that_fit
from mlx_slm.training.trainer import Plan, Trainer
from mlx_slm.workspace import Workspace, fingerprint

FROM_NONE = "none"


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
) -> Run:
    """Train on `tokens` tokens of `domain` (None: all of its train split) and export the best to `models/<name>`.

    `from_run`: the pretrained run (default: that of method slm), a bundle's directory, or 'none' for SLM-nopt;
    `select`: how an expert of a projected network or a mixture is chosen (default: frequent); `sources`: the domain's
    text, if it is not prepared or known. Returns the finished run.
    """
    if domain == config.data.generic:
        raise SlmError(f"--domain {domain}: that is the generic set; specialise to another one")
    source = None if from_run == FROM_NONE else find_source(workspace, from_run or default_run(workspace))
    experts, select = _experts(workspace, source, select)
    named = sources_of(domain, sources or [], workspace, config)
    if source:
        tokens = _sampled_tokens(source, domain, tokens, report)
    if sources:
        prepare(workspace, domain, named, config, report)
    else:
        ensure_set(workspace, domain, config, report, limit=text_needed(tokens or STREAMED_TOKENS))
    tokenizer = open_tokenizer(workspace.tokenizer)
    store, valid = (Store(workspace.require_set(domain, split)) for split in ("train", "valid"))
    store.require_tokenizer(tokenizer)
    windows = first_windows(store, tokens, config.data.seed)
    finetuning = config.finetuning
    valid_windows = validation_windows(valid, finetuning.eval_tokens, config.data.seed)
    if source:
        _require_fit(source, domain, store, tokenizer, report)
        shape, origin = source.shape, {"run": source.name, "step": source.weights_step(), "is": source.identity}
    else:
        shape, origin = Shape.of(config.model, tokenizer.vocab_size, store.context_length), FROM_NONE
    method = source.record["method"] if source else "nopt"
    count = int(store.windows[:]["length"][windows].astype(np.int64).sum())
    recipe = choose_recipe(finetuning, tokens or count, source is None)
    rate = finetuning.learning_rate or config.training.learning_rate * recipe.rate
    sampler = Sampler([Stream.of(store, windows)], np.ones(1), finetuning.batch_rows, finetuning.seed)
    inputs = {
        "method": method,
        "from": origin,
        "domain": domain,
        "tokens": tokens,
        "windows": fingerprint([windows.tolist(), valid_windows.tolist()]),
        "optimizer": config.training.model_dump(mode="json", include=set(OPTIMIZER_FIELDS)),
        "shape": shape.to_dict(),
        "finetuning": finetuning.model_dump(mode="json", exclude={"recipes", "select_tokens"}),
        "recipe": recipe.model_dump(mode="json") | {"learning_rate": rate},
        "tokenizer": tokenizer.fingerprint,
        "data": store.fingerprint,
        "valid": valid.fingerprint,
    }
    if experts:
        inputs |= {"select": select, "clusters": experts.clusters.fingerprint}
    if select == PRETRAINED:
        inputs["select_tokens"] = finetuning.select_tokens
    if select in (PRETRAINED, FINETUNED):
        inputs["experts"] = experts.require_trained()
    label = f"{method}-{select}" if select else method
    path = workspace.run(name or f"{domain}-{label}-{format_size(tokens) if tokens else 'all'}")
    plan = _plan(config, recipe, rate, sampler.num_rows / finetuning.batch_rows)
    what = f"fine-tuning {source.name}" if source else "training from scratch"
    job = _Job(config, shape, sampler, plan, valid, valid_windows, report)

    def announce() -> None:
        per_pass = sampler.num_rows / finetuning.batch_rows
        report.line(
            f"{what} on {count:,} tokens of {domain} ({per_pass:.0f} steps a pass), rate {rate:.1e}, "
            f"at most {plan.steps:,} steps"
        )

    with alone_in(path):
        run = open_run(workspace, path, method, inputs, config, fresh, select="best", announce=announce)
        if run.finished:
            report.line(f"run {run.name} is finished ({run.record['step']:,} steps); --fresh trains it anew")
        elif select == FINETUNED:
            _finetune_all(workspace, run, experts, job, config)
        else:
            if experts and "selection" not in run.record:
                run.record["selection"] = select_expert(experts, select, config, domain, store, windows, report)
                run.save()
            if experts:
                selection = run.record["selection"]
                report.line(f"starting from {describe(selection)}")
                parameters = chosen(experts, selection)
            else:
                parameters = source.weights() if source else initialise(shape, finetuning.seed)
            job.work(run, parameters)
        for candidate in run.path.glob(f"{EXPERT}*"):
            shutil.rmtree(candidate)
        export_run(workspace, run)
    return run


@dataclass(frozen=True)
class _Job:
    """A fine-tuning, whatever it starts from."""

    config: Config
    shape: Shape
    sampler: Sampler
    plan: Plan
    valid: Store
    valid_windows: np.ndarray
    report: Report

    def work(self, run: Run, parameters: dict) -> None:
        """Fine-tune in the directory of `run`, and record the outcome."""
        finetuning = self.config.finetuning
        model = Transformer(self.shape)
        micro_rows = finetuning.micro_rows or rows_that_fit(self.shape, finetuning.batch_rows)
        start = partial(TrainingStep, model, AdamW.of(self.config.training), micro_rows)
        evaluate = validation_loss(model, self.valid, self.valid_windows)
        flops = self.shape.flops_per_token
        state = Trainer(start, parameters, self.sampler, self.plan, run.path, evaluate, self.report, flops).run()
        run.finish(state)
        best = math.exp(state.best_nll)
        self.report.line(f"best at step {state.best_step:,}: validation perplexity {best:.2f}")


def _finetune_all(workspace: Workspace, run: Run, experts: Experts, job: _Job, config: Config) -> None:
    """Fine-tune every expert in a folder of its own, and let the best become the run; goes on where it stopped.

    Of the others only the records stay until the end, so that disk is needed for two.
    """
    tuned: dict[int, Run] = {}
    for number in experts.trained:
        job.report.line(f"fine-tuning expert {number} of 0 to {experts.k - 1}")
        inputs = run.record["inputs"] | {"expert": number}
        path = expert_path(run.path, number)
        tuned[number] = open_run(workspace, path, run.record["method"], inputs, config, False, select="best")
        if not tuned[number].finished:
            job.work(tuned[number], experts.parameters(number))
        scores = {done: one.record["valid_nll"] for done, one in tuned.items()}
        best = min(scores, key=scores.get)
        for beaten in set(tuned) - {best}:
            shutil.rmtree(tuned[beaten].path / "checkpoints", ignore_errors=True)
    records = [one.record for one in tuned.values()]
    cost = {key: round(sum(record[key] for record in records), 2) for key in ("tokens", "seconds")}
    for part in ("checkpoints", "metrics.jsonl"):
        if (tuned[best].path / part).exists():
            os.replace(tuned[best].path / part, run.path / part)
    outcome = {key: value for key, value in tuned[best].record.items() if key not in ("inputs", "started")}
    selection = {"select": FINETUNED, "expert": best, "histogram": None, "share": None, "scores": scores, "cost": cost}
    run.record |= outcome | {"selection": selection}
    run.save()
    job.report.line(f"the best is expert {best}: validation perplexity {math.exp(scores[best]):.2f}")


def _experts(workspace: Workspace, source: Run | None, select: str | None) -> tuple[Experts | None, str | None]:
    """(the experts of a run that has some, how to choose); raises SlmError for a choice where there is none."""
    if source is None or not has_experts(source):
        if select:
            what = f"run {source.name}" if source else "training from scratch"
            raise SlmError(f"--select {select}: {what} has no experts to choose from; it is for methods pn and mix")
        return None, None
    experts, select = Experts(workspace, source), select or FREQUENT
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


def _plan(config: Config, recipe: Recipe, rate: float, per_pass: float) -> Plan:
    finetuning = config.finetuning
    cadence = max(1, round(per_pass / finetuning.evaluations_per_pass))
    return Plan(
        steps=finetuning.max_steps or recipe.steps,
        learning_rate=rate,
        warmup_steps=finetuning.warmup_steps,
        batch_rows=finetuning.batch_rows,
        eval_every=cadence,
        report_every=cadence,
        checkpoint_every=4 * cadence,
        patience=finetuning.patience,
    )


def choose_recipe(finetuning: FinetuningConfig, tokens: int, scratch: bool) -> Recipe:
    """The paper's recipe for a domain set of so many tokens; from scratch the rate is the pretraining rate."""
    recipes = sorted(finetuning.recipes, key=lambda recipe: recipe.tokens)
    recipe = next((r for r in recipes if tokens <= r.tokens), recipes[-1])
    return recipe.model_copy(update={"rate": 1.0}) if scratch else recipe
