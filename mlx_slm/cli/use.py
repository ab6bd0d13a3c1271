"""`evaluate`, `generate`, `serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

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
    from mlx_slm.evaluation.evaluate import OWN
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
        if any(row.get("tokenizer") == OWN for row in result["results"]):
            session.report.line("models with tokenizers of their own are among them: only bits per byte compare")
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
@click.argument("name", type=PLACE, metavar="RUN_OR_MODEL")
@click.option("--quantize", type=click.Choice(["4", "8"]), help="Write models/NAME-4bit (or 8) by mlx-lm's conversion.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    help="Write models/NAME-bf16 (or fp16) with 16 bits a weight, as most published models have; training gives 32.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["mlx", "gguf"]),
    default="mlx",
    show_default=True,
    help="mlx: a directory for mlx-lm and transformers, with its card; gguf: a file for llama.cpp, in gguf/.",
)
@click.option(
    "--type", "kind", type=click.Choice(["f16", "q8_0", "f32"]), help="Of the matrices of a GGUF. [default: f16]"
)
@click.option("--fuse", is_flag=True, help="Of a run that trained adapters: the model with them applied.")
@click.option("--bundle", type=PLACE, metavar="DIR", help="A projected network or a mixture, to specialise elsewhere.")
@click.option("--license", help="For the card: the Hub's identifier, such as mit. [default: as before, or other]")
@click.option("--language", "languages", multiple=True, help="For the card, such as en; several times if wished.")
@click.option("--dataset", "datasets", multiple=True, help="For the card: a data set on the Hub.")
@click.option("--base-model", help="For the card: the model on the Hub that this one comes from.")
@click.option("--push-to-hub", "repo", metavar="REPO", help="Upload the directory to a repository of the Hub.")
@click.option("--private", is_flag=True, help="Of a repository that is made: only you see it.")
@common
def export(session: Session, name, form, kind, bundle, **how) -> None:
    """Write a run or a model in the form that another program takes.

    \b
    mlx-slm export notes-slm                          models/notes-slm, its card with its evaluations
    mlx-slm export notes-lora --fuse                  adapters, and the model with them applied
    mlx-slm export notes-slm --quantize 4             models/notes-slm-4bit
    mlx-slm export notes-slm --dtype bfloat16         models/notes-slm-bf16
    mlx-slm export notes-slm --format gguf            gguf/notes-slm-f16.gguf
    mlx-slm export pn --bundle pn-to-go               for `specialize --from pn-to-go` on another machine
    mlx-slm export notes-slm --license mit --push-to-hub me/notes
    """
    card = {key: how.pop(key) for key in ("license", "languages", "datasets", "base_model")}
    if kind and form != "gguf":
        raise click.UsageError("--type is for --format gguf")
    if how["quantize"] and how["dtype"]:
        raise click.UsageError("give --quantize or --dtype, not both")
    if form == "gguf" and (how["quantize"] or how["dtype"] or how["repo"] or bundle or any(card.values())):
        raise click.UsageError("--format gguf goes with --type and --fuse alone: --type q8_0 makes a small file")
    if bundle and (any(how.values()) or any(card.values())):
        raise click.UsageError("--bundle goes without other options")
    if how["private"] and not how["repo"]:
        raise click.UsageError("--private is for --push-to-hub")
    session.start_computing()
    if bundle:
        session.show(*_bundle(session, name, bundle))
        return
    from mlx_slm.export.card import About
    from mlx_slm.stages.export import Export
    from mlx_slm.stages.export import export as work

    about = About(**card) if any(card.values()) else None
    bits = int(how.pop("quantize") or 0) or None
    gguf = (kind or "f16") if form == "gguf" else None
    facts = work(session.project, Export(name, quantize=bits, gguf=gguf, about=about, **how))
    session.show(facts, lambda: session.report.line(_exported(facts)))


def _exported(facts: dict) -> str:
    text = facts["path"]
    if "bits_per_weight" in facts:
        text += f": {facts['bits_per_weight']:.2f} bits a weight"
    if "perplexity" in facts:
        before, after = facts["perplexity"]
        text += f"; perplexity on {facts['set']} {before:.2f} -> {after:.2f}"
    return text + (f"\n{facts['address']}" if "address" in facts else "")


def _bundle(session: Session, run: str, bundle: str) -> tuple[dict, Callable[[], None]]:
    from pathlib import Path

    from mlx_slm.experts.handover import export_bundle
    from mlx_slm.training.find import find_run

    facts = export_bundle(session.workspace, find_run(session.workspace, run), Path(bundle))
    text = f"bundle: {bundle}\nnext: mlx-slm specialize --domain NAME --from {bundle} SOURCE..."
    return {"run": run, "bundle": bundle, **facts}, lambda: session.report.line(text)


COMMANDS = (evaluate, generate, serve, export)
