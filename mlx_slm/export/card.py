"""The card of a model: what the Hub reads of it, what it is and costs, and the commands that work with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_slm.models.shape import Shape
from mlx_slm.storage.workspace import EVALUATIONS, Workspace

CARD = "README.md"


@dataclass(frozen=True)
class About:
    """What only the author knows of a model."""

    license: str = "other"
    """An identifier of the Hub, such as apache-2.0."""
    languages: tuple[str, ...] = ()
    """Codes such as en."""
    datasets: tuple[str, ...] = ()
    """On the Hub."""
    base_model: str | None = None
    """On the Hub."""


def write_card(
    directory: Path, name: str, manifest: dict, about: About | None = None, results: Sequence[dict] = ()
) -> None:
    """Write README.md of a model directory from its manifest's `inputs` and `info`, and rows of `evaluate`."""
    from huggingface_hub import EvalResult, ModelCardData

    about = about or About()
    measures = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=row["set"],
            dataset_name=f"{row['set']} ({row['split']})",
            metric_type=kind,
            metric_value=round(row[kind], 4),
        )
        for row in results
        for kind in ("perplexity", "bits_per_byte")
    ]
    data = ModelCardData(
        license=about.license,
        language=list(about.languages) or None,
        library_name="mlx",
        tags=["mlx", "mlx-slm"],
        base_model=about.base_model,
        datasets=list(about.datasets) or None,
        pipeline_tag="text-generation",
        model_name=name,
        eval_results=measures or None,
    )
    (directory / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{_text(name, manifest, results)}", encoding="utf-8")


def results_of(workspace: Workspace, name: str) -> list[dict]:
    """The last row of `evaluate` for each set and split of a model that was read as a whole."""
    file = workspace.results / EVALUATIONS
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    last = {(row["set"], row["split"]): row for row in rows if row["model"] == name and "routing" not in row}
    return list(last.values())


def _text(name: str, manifest: dict, results: Sequence[dict]) -> str:
    inputs, info = manifest["inputs"], manifest["info"]
    shape = Shape(**info["shape"])
    bits = inputs.get("quantized")
    made = f"quantised to {bits} bits ({info['bits_per_weight']:.2f} bits a weight), " if bits else ""
    rows = "".join(
        f"| {row['set']} | {row['split']} | {row['perplexity']:.2f} | {row['bits_per_byte']:.4f} |\n" for row in results
    )
    table = f"\n| set | split | perplexity | bits a byte |\n|---|---|---|---|\n{rows}" if rows else ""
    facts = {
        "method": inputs.get("method"),
        "run": inputs.get("run"),
        "training": f"{info['tokens']:,} tokens, {info['seconds']:,.0f} s on {info['device']}"
        if info.get("tokens") and info.get("seconds")
        else None,
    }
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items() if value)
    return f"""# {name}

A language model of {shape.num_parameters:,} parameters, {made}trained with mlx-slm: {shape.family}, vocabulary
{shape.vocab_size:,}, context {shape.context_length:,}.

{listed}
{table}
## Limits

It continues text of the kind that it was trained on, up to {shape.context_length:,} tokens; beyond them it was not
trained. It follows no instructions, and what it writes is not checked against anything. A text starts behind `</s>`:
the tokenizer puts it there. A chat is read as the contents of its messages, one after the other.

## Use

    mlx_lm.generate --model . --prompt "..."
    mlx_lm.lora --model . --train --data DIRECTORY --num-layers -1
    mlx_lm.convert --hf-path . --mlx-path 4bit -q
    mlx-slm export {name} --format gguf
"""
