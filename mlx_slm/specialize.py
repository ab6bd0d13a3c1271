"""Specialisation: fine-tune a pretrained small model on a domain, or train one on the domain alone (SLM-nopt).

The first `tokens` tokens of the domain's documents in a seeded order are the domain set; evaluation on the domain's
validation set decides when to stop, and the best checkpoint is exported.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from mlx_slm.clustering.sampler import Sampler, Stream
from mlx_slm.config import Config, FinetuningConfig, Recipe, format_size
from mlx_slm.errors import SlmError
from mlx_slm.evaluate import validation_loss, validation_windows
from mlx_slm.export import export_run
from mlx_slm.models.transformer import Shape, Transformer, initialise
from mlx_slm.report import Report
from mlx_slm.text.huggingface import open_tokenizer
from mlx_slm.text.prepare import STREAMED_TOKENS, ensure_set, sources_of, text_needed
from mlx_slm.text.store import Store, first_windows
from mlx_slm.training.optimizer import OPTIMIZER_FIELDS, AdamW
from mlx_slm.training.runs import Run, alone_in, default_run, find_run, open_run
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
) -> Run:
    """Train on `tokens` tokens of `domain` (None: all of its train split) and export the best to `models/<name>`.

    `from_run`: the pretrained run (default: that of method slm), or 'none' for SLM-nopt. Returns the finished run.
    """
    if domain == config.data.generic:
        raise SlmError(f"--domain {domain}: that is the generic set; specialise to another one")
    sources_of(domain, [], workspace, config)
    source = None if from_run == FROM_NONE else find_run(workspace, from_run or default_run(workspace))
    if source:
        tokens = _sampled_tokens(source, domain, tokens, report)
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
        "finetuning": finetuning.model_dump(mode="json", exclude={"recipes"}),
        "recipe": recipe.model_dump(mode="json") | {"learning_rate": rate},
        "tokenizer": tokenizer.fingerprint,
        "data": store.fingerprint,
        "valid": valid.fingerprint,
    }
    path = workspace.run(name or f"{domain}-{method}-{format_size(tokens) if tokens else 'all'}")
    per_pass = sampler.num_rows / finetuning.batch_rows
    plan = _plan(config, recipe, rate, per_pass)
    what = f"fine-tuning {source.name}" if source else "training from scratch"
    announcement = (
        f"{what} on {count:,} tokens of {domain} ({per_pass:.0f} steps a pass), rate {rate:.1e}, "
        f"at most {plan.steps:,} steps"
    )
    with alone_in(path):
        announce = lambda: report.line(announcement)  # noqa: E731
        run = open_run(workspace, path, method, inputs, config, fresh, select="best", announce=announce)
        if run.finished:
            report.line(f"run {run.name} is finished ({run.record['step']:,} steps); --fresh trains it anew")
        else:
            model = Transformer(shape)
            parameters = source.weights() if source else initialise(shape, finetuning.seed)
            micro_rows = finetuning.micro_rows or rows_that_fit(shape, finetuning.batch_rows)
            start = partial(TrainingStep, model, AdamW.of(config.training), micro_rows)
            evaluate = validation_loss(model, valid, valid_windows)
            trainer = Trainer(start, parameters, sampler, plan, run.path, evaluate, report, shape.flops_per_token)
            state = trainer.run()
            run.finish(state)
            report.line(f"best at step {state.best_step:,}: validation perplexity {math.exp(state.best_nll):.2f}")
        export_run(workspace, run)
    return run


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
        report.warn(f"run {source.name} is not finished; specialising its step {source.weights_step():,}")


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
