"""`evaluate`, `generate`, `serve`."""

from __future__ import annotations

import os
import sys

import click

from mlx_slm.cli.common import PLACE, SEED, SIZE, Number, Session, common

PROMPT_BYTES = 16 << 20
ROUTED = {
    "cluster": ", routed by cluster",
    "expert": ", expert {expert}",
    "frequent": ", expert {expert}",
    "histogram": ", by histogram",
}


@click.command()
@click.argument("models", nargs=-1, type=PLACE, metavar="[RUN_OR_MODEL]...")
@click.option(
    "--domain", "domains", multiple=True, help="A prepared set, several times if wished. [default: all domains]"
)
@click.option("--split", type=click.Choice(["valid", "test"]), default="test", show_default=True)
@click.option(
    "--expert",
    metavar="NUMBER|frequent|histogram",
    help="For projected networks and mixtures: one expert reads all. [default: each window that of its cluster]",
)
@click.option(
    "--domain-tokens",
    type=SIZE,
    help="--expert frequent and histogram look at this many tokens of a set. [default: all]",
)
@common
def evaluate(session: Session, models, domains, split, expert, domain_tokens) -> None:
    """Perplexity of models on held-out text of the domains, and the macro average over them.

    Without a name, every model of the workspace is evaluated. Results are added to results/evaluations.jsonl.
    """
    from mlx_slm.evaluation.evaluate import evaluate as work

    if domain_tokens and expert not in ("frequent", "histogram"):
        raise click.UsageError("--domain-tokens is for --expert frequent and --expert histogram")
    session.start_computing()
    result = work(session.project, models, domains, split, expert, domain_tokens)

    def text() -> None:
        rows = [
            [
                r["model"] + ROUTED.get(r.get("routing"), "").format(**r),
                r["set"],
                f"{r['tokens']:,}",
                f"{r['nll']:.4f} ± {r['stderr']:.4f}",
                f"{r['perplexity']:.2f}",
                f"{r['bits_per_byte']:.4f}",
            ]
            for r in result["results"]
        ]
        columns = ["model", "set", "tokens", "nats per token", "perplexity", "bits per byte"]
        session.report.table(f"{split} sets", columns, rows)
        if any(len(macro["sets"]) > 1 for macro in result["macro"]):
            rows = [[m["model"], str(len(m["sets"])), f"{m['perplexity']:.2f}"] for m in result["macro"]]
            session.report.table("macro average", ["model", "sets", "perplexity"], rows)

    session.show(result, text)


@click.command()
@click.argument("model", type=PLACE)
@click.option("--prompt", "-p", required=True, help="The text to continue; - reads it from stdin.")
@click.option("--max-tokens", "-m", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temp", type=Number(0), default=0.7, show_default=True, help="0: the likeliest token each time.")
@click.option("--top-p", type=Number(0, 1), default=0.95, show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@common
def generate(session: Session, model, prompt, **how) -> None:
    """Continue a text with a model, through mlx-lm. MODEL is a name in models/ or a directory."""
    from mlx_slm.export.generate import Sampling, read_prompt, stream
    from mlx_slm.export.model import require_model

    path = require_model(session.workspace, model)
    if prompt == "-":
        stdin = sys.stdin.buffer
        raw = stdin.read(PROMPT_BYTES + 1)
        if len(raw) > PROMPT_BYTES:
            raise click.UsageError(f"--prompt -: more than {PROMPT_BYTES:,} bytes came in")
        prompt = read_prompt(raw, "stdin", session.report)
    else:
        prompt = read_prompt(os.fsencode(prompt), "--prompt", session.report)
    session.start_computing()
    show = not session.as_json
    parts = []
    if show:
        click.echo(prompt, nl=False)
    for part in stream(path, prompt, Sampling(**how), session.report):
        parts.append(part.text)
        if show:
            click.echo(part.text, nl=False)
    if show:
        click.echo()
        if not session.quiet:
            click.echo(f"({part.generation_tokens} tokens, {part.generation_tps:.0f} tokens/s)", err=True)
    else:
        counts = {"tokens": part.generation_tokens, "tokens_per_second": round(part.generation_tps, 1)}
        session.show({"model": str(path), "prompt": prompt, "text": "".join(parts), **counts})


@click.command()
@click.argument("models", nargs=-1, type=PLACE, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Pages that may ask, such as http://localhost:3000; * for all, and for every Host. [default: none]",
)
@common
def serve(session: Session, models, host, port, origins) -> None:
    """Serve models to OpenAI's clients, on mlx-lm's server: those named, or all of the workspace.

    A client names one of them, as /v1/models lists them; nothing outside of them is looked up.
    """
    from mlx_slm.serving.serve import serve as work

    session.start_computing()
    work(session.project, models, host, port, origins)


@click.command()
@click.argument("run")
@click.option("--bundle", type=PLACE, required=True, help="The directory to write.")
@common
def export(session: Session, run, bundle) -> None:
    """Write a projected network or a mixture as one directory to hand over.

    `mlx-slm specialize --domain notes --from DIR notes/*.md` specialises it on a machine that has nothing else.
    """
    from pathlib import Path

    from mlx_slm.experts.handover import export_bundle
    from mlx_slm.training.runs import find_run

    session.start_computing()
    facts = export_bundle(session.workspace, find_run(session.workspace, run), Path(bundle))
    result = {"run": run, "bundle": bundle, **facts}
    text = f"bundle: {bundle}\nnext: mlx-slm specialize --domain NAME --from {bundle} SOURCE..."
    session.show(result, lambda: session.report.line(text))


COMMANDS = (evaluate, generate, serve, export)
