"""`quickstart`, `pretrain` and `specialize`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click

from mlx_slm.cli.common import HOURS, METHOD, NUMBERS, PLACE, SHARE, SIZE, MethodOption, Session, common
from mlx_slm.errors import SlmError


@click.command()
@click.option("--fresh", is_flag=True, help="Start over instead of going on from an earlier quickstart.")
@common
def quickstart(session: Session, fresh) -> None:
    """The whole path on text that every machine has, in minutes on two CPU cores.

    Trains a tokenizer and a small model on docstrings of the installed packages, specialises it to those of the
    standard library, of which it knows a little, and shows what each method gains.
    """
    from mlx_slm.quickstart import run_quickstart
    from mlx_slm.storage.workspace import Workspace

    session.config_name = session.config_name or "quickstart"
    session.workspace = Workspace(session.workspace_path or "quickstart")
    session.start_computing()
    result = run_quickstart(session.project, fresh)

    def text() -> None:
        rows = [
            [
                f"{row['method']}, {row['stage']}" + (f", {row['select']}" if "select" in row else ""),
                f"{row['perplexity']:.1f}",
                f"{row['tokens']:,}",
                f"{row['seconds']:.0f}",
            ]
            for row in result["results"]
        ]
        title = f"Perplexity of {result['domain']} (test), {result['seconds']:.0f} s in all on {result['device']}"
        session.report.table(title, ["model", "perplexity", "training tokens", "seconds"], rows)
        session.report.line(
            f"\nThe model: {result['model']}\nIt continues {result['prompt']!r}:\n\n{result['sample']}\n"
        )
        here = "mlx-slm" if shutil.which("mlx-slm") else os.path.relpath(Path(sys.executable).with_name("mlx-slm"))
        session.report.line(f"Ask it yourself: {here} generate {result['model']} --prompt 'Return the'")

    session.show(result, text)


@click.command()
@click.option(
    "--method",
    cls=MethodOption,
    type=METHOD,
    default="slm",
    show_default=True,
)
@click.option("--domain", help="With --method is, cis: the set that the generic set is resampled to look like.")
@click.option("--domain-tokens", type=SIZE, help="Use this many tokens of the domain, such as 1M. [default: all]")
@click.option(
    "--domain-share",
    type=SHARE,
    help="With --method is, cis: share of the rows that are the domain's own text, such as 0.1. [default: "
    "clusters.domain_share]",
)
@click.option(
    "--weights",
    type=PLACE,
    help="With --method is, cis: weights of the clusters (YAML or JSON) in place of a domain.",
)
@click.option(
    "--k",
    type=click.IntRange(1),
    help="With --method is, cis, pn, mix: the number of clusters. [default: its section's k]",
)
@click.option("--experts", type=NUMBERS, help="With --method mix: train only these experts, such as 0-15 or 3,7.")
@click.option(
    "--init-from",
    type=PLACE,
    metavar="MODEL",
    help="Start from a published model (a directory, or OWNER/MODEL on the Hub), or from a run or a model of the "
    "workspace; RUN@5M for a milestone. [default for --method cis: the run of method slm]",
)
@click.option("--tokens", type=SIZE, help="Train on this many tokens (replaces the configured horizon).")
@click.option("--hours", type=HOURS, help="Train for about this many hours on this machine.")
@click.option("--name", help="Name of the run. [default: the method, with the domain and its tokens for is and cis]")
@click.option("--fresh", is_flag=True, help="Start over, throwing an earlier run of this name away.")
@common
def pretrain(session: Session, method, domain, weights, k, **given) -> None:
    """Pretrain a model on the generic set. The same command again resumes.

    Prepares the generic set first where that was not done. The methods is, cis, pn and mix cluster it: is draws the
    clusters as often as the domain has them, cis too, going on from a generic model; pn trains an expert per cluster
    from shared tensors, mix a model per cluster.
    """
    from mlx_slm.clustering.target import SamplingTarget
    from mlx_slm.export.model import require_model
    from mlx_slm.methods import METHODS, find_method
    from mlx_slm.methods.base import Rows
    from mlx_slm.methods.requests import Pretraining
    from mlx_slm.stages.pretrain import pretrain as work
    from mlx_slm.training.find import default_run

    def those(which: Callable) -> str:
        *others, last = [each.name for each in METHODS if which(each)]
        return f"the methods {', '.join(others)} and {last}" if others else f"--method {last}"

    of = find_method(method)
    tokens, hours, domain_tokens = (given.pop(option) for option in ("tokens", "hours", "domain_tokens"))
    sampled = of.rows is Rows.DOMAIN
    if tokens and hours:
        raise click.UsageError("give --tokens or --hours, not both")
    if sampled and bool(domain) == bool(weights):
        raise click.UsageError(f"--method {method} needs what to sample for: give --domain NAME or --weights FILE")
    if not sampled and (domain or weights):
        raise click.UsageError(f"--domain and --weights are for {those(lambda each: each.rows is Rows.DOMAIN)}")
    if not of.section and k:
        raise click.UsageError(f"--k is for {those(lambda each: each.section)}")
    if not of.takes_experts and given["experts"]:
        raise click.UsageError(f"--experts is for {those(lambda each: each.takes_experts)}")
    share = given.pop("domain_share")
    if share is not None and not domain:
        raise click.UsageError("--domain-share needs --domain")
    if domain_tokens and not domain:
        raise click.UsageError("--domain-tokens needs --domain")
    changes = {"training.tokens": tokens, "training.hours": hours, f"{of.section}.k": k}
    changes["clusters.domain_share"] = None if share is None else str(share)
    if of.takes_experts and tokens:
        changes[f"{of.section}.tokens"] = "null"
    session.overrides = (*session.overrides, *(f"{key}={value}" for key, value in changes.items() if value))
    project = session.project
    session.start_computing()
    target = SamplingTarget(domain, domain_tokens, Path(weights) if weights else None) if sampled else None
    if of.continues and not given["init_from"]:
        given["init_from"] = default_run(session.workspace, of.continues, "--init-from")
        if given["init_from"] not in session.workspace.runs():
            raise SlmError(
                f"--method {method} goes on from a run of method {of.continues}, and there is none: `mlx-slm pretrain` "
                "makes it, or name a model with --init-from"
            )
    if given["init_from"]:
        given["init_from"] = require_model(session.workspace, given["init_from"])
    run = work(project, Pretraining(method, target=target, **given))
    _show_run(session, run)


@click.command()
@click.option("--domain", required=True, help="The prepared (or known) set to specialise to.")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--from",
    "source",
    type=PLACE,
    metavar="RUN_OR_MODEL",
    help="A pretrained run, RUN@5M for one of its milestones, a published model (a directory, or on the Hub "
    "OWNER/MODEL[@REVISION]), a bundle's directory, or none to train from scratch. [default: slm]",
)
@click.option(
    "--select",
    type=click.Choice(["frequent", "pretrained", "finetuned", "histogram"]),
    help="How the expert of a projected network or a mixture is chosen: that of the domain's most frequent cluster, "
    "the best before or after fine-tuning, or all combined by the domain's histogram. [default: histogram; for a "
    "mixture frequent]",
)
@click.option(
    "--lora",
    metavar="RANK",
    type=click.IntRange(1),
    help="Train LoRA adapters of the query and value projections alone; paper: 64. Written to adapters/ as mlx-lm's.",
)
@click.option("--fuse", is_flag=True, help="With --lora: write the model with its adapters applied to models/ as well.")
@click.option(
    "--teacher",
    type=PLACE,
    metavar="RUN",
    help="Distil (SLM-d): fine-tune this pretrained run on the domain first, then learn from it too.",
)
@click.option(
    "--replay",
    type=SHARE,
    help="Share of the rows that are generic ones, resampled to the domain, such as 0.25; it needs the generic set, "
    "and clusters it. [default: finetuning.replay]",
)
@click.option("--tokens", type=SIZE, help="Use this many tokens of the domain, such as 1M. [default: all]")
@click.option("--name", help="Name of the run and the model. [default: <domain>-<method>[-<select>]-<tokens>]")
@click.option("--fresh", is_flag=True, help="Start over, throwing an earlier run of this name away.")
@common
def specialize(session: Session, replay, **given) -> None:
    """Fine-tune a pretrained model on a domain and write it as an mlx-lm model directory (or adapter, with --lora).

    A SOURCE is the domain's text, as for prepare, where the set is not prepared yet.
    """
    from mlx_slm.experts.bundle import bundle_at, install_bundle
    from mlx_slm.methods.requests import Specialisation
    from mlx_slm.stages.specialize import specialize as work

    request = Specialisation(**given)
    if request.fuse and not request.lora:
        raise click.UsageError("--fuse is for --lora")
    if replay is not None:
        session.overrides = (*session.overrides, f"finetuning.replay={replay}")
    if request.source and (bundle := bundle_at(session.workspace, request.source)):
        if replay and not session.workspace.sets():
            raise SlmError(
                f"--replay {replay:g}: a bundle brings no generic text to draw rows of; prepare the set in "
                f"{session.workspace.root} first, or leave --replay out"
            )
        install_bundle(session.workspace, bundle, session.report)
    project = session.project
    session.start_computing()
    run = work(project, request)
    _show_run(session, run)


def _how_to_use(session: Session, run, adapter: Path) -> str:
    """How to run an adapter: with its base where that is exported at the same step, else fused."""
    from mlx_slm.files import read_json
    from mlx_slm.storage.artifacts import MANIFEST

    base = run.record["inputs"]["from"]
    if "weights" in base:
        return f"mlx_lm.generate --model {run.published['model']} --adapter-path {adapter} --prompt TEXT"
    model = session.workspace.model(base["run"])
    exported = read_json(model / MANIFEST)["inputs"] if (model / MANIFEST).exists() else {}
    if exported.get("step") == base["step"]:
        return f"mlx_lm.generate --model {model} --adapter-path {adapter} --prompt TEXT"
    return f"the same command with --fuse (step {base['step']:,} of {base['run']} is not among the models)"


def _show_run(session: Session, run) -> None:
    from mlx_slm.experts.experts import has_experts
    from mlx_slm.machine.ranks import ranks
    from mlx_slm.report import perplexity

    if not ranks().is_first:
        return
    record = run.record
    path, adapter = session.workspace.model(run.name), session.workspace.adapter(run.name)
    model = str(path) if path.exists() and not has_experts(run) else None
    result = {"run": run.name, "method": record["method"], "model": model}
    if "lora" in record["inputs"]:
        result["adapter"] = str(adapter)
    result |= {key: record[key] for key in ("step", "tokens", "seconds")}
    if not has_experts(run):
        result["step"] = run.weights_step()
    if "valid_nll" in record:
        result |= {"valid_nll": record["valid_nll"], "valid_perplexity": perplexity(record["valid_nll"])}
    if "importance" in record["inputs"]:
        result["importance"] = run.importance()
    for key in ("selection", "experts"):
        if key in record:
            result[key] = record[key]
    if model:
        text = f"model: {model}\nnext: mlx-slm evaluate {run.name}"
    elif "adapter" in result:
        text = f"adapter: {adapter}\nnext: " + _how_to_use(session, run, adapter)
    elif run.finished:
        text = f"run {run.name} has its experts\nnext: mlx-slm specialize --domain NAME --from {run.name}"
    else:
        text = (
            f"run {run.name} has the experts {', '.join(map(str, record['experts']))}; the others are not trained yet"
        )
    session.show(result, lambda: session.report.line(text))


COMMANDS = (quickstart, pretrain, specialize)
