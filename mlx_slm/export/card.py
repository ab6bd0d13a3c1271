"""The card of a model: what the Hub reads of it, what it is and costs, and the commands that work with it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.files import JSON_BYTES, load_tokenizer_json, read_text
from mlx_slm.models.shape import Shape
from mlx_slm.storage.artifacts import EDITABLE as CARD
from mlx_slm.storage.forms import LICENSE
from mlx_slm.storage.records import read_json_lines, write_text
from mlx_slm.storage.workspace import EVALUATIONS, Workspace
from mlx_slm.text.hub_tokenizer import chat_template_of, end_of_text
from mlx_slm.text.tokenizer import CHAT_TEMPLATE

QUANTIZED = "quantized"
"""In the inputs of a manifest: the bits of a model that was quantised."""
MARK = "\n<!-- written by mlx-slm "
"""In front of the SHA-256 of what stands above: a card that was changed by hand does not fit it."""


IDENTIFIER = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*\+*")
LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class About:
    """What only the author knows of a model; None and () where it was not said."""

    license: str | None = None
    """An identifier of the Hub, such as apache-2.0; `other` for one with a name of its own."""
    languages: tuple[str, ...] = ()
    """Codes such as en."""
    datasets: tuple[str, ...] = ()
    """On the Hub."""
    base_model: str | None = None
    """On the Hub."""
    license_name: str | None = None
    license_link: str | None = None

    def over(self, other: About | None) -> About:
        """This, and what it does not say from another."""
        if other is None:
            return self
        said = {key: value for key, value in vars(self).items() if value}
        if self.license and self.license != other.license:
            said |= {key: getattr(self, key) for key in LICENSE}
        return replace(other, **said)


def require_known_form(about: About) -> None:
    """Raise SlmError for what the Hub would not take: said by hand, or in a script."""
    named = {
        "--license": (IDENTIFIER, "an identifier of the Hub, such as apache-2.0", (about.license,)),
        "--language": (LANGUAGE, "a code, such as en or pt-BR", about.languages),
        "--dataset": (REPOSITORY, "OWNER/DATASET or DATASET on the Hub", about.datasets),
        "--base-model": (REPOSITORY, "OWNER/MODEL on the Hub", (about.base_model,)),
    }
    for option, (form, wanted, values) in named.items():
        for value in values:
            if value and not form.fullmatch(value):
                raise SlmError(f"{option} {value}: give {wanted}")


def about_of(directory: Path) -> About | None:
    """What the card of a model directory says that only its author knew; None without one."""
    from huggingface_hub import ModelCard

    if not (directory / CARD).is_file():
        return None
    try:
        data = ModelCard(read_text(directory / CARD, JSON_BYTES), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever stands there by hand
        return None
    listed = lambda value: (value,) if isinstance(value, str) else _names(value)  # noqa: E731
    text = {key: value for key in (*LICENSE, "base_model") if isinstance(value := data.get(key), str)}
    if several := _names(data.get("license")):
        text |= {"license": "other", "license_name": ", ".join(several)}
    if "base_model" in text and not REPOSITORY.fullmatch(text["base_model"]):
        del text["base_model"]
    if text.get("license") == "other" and "license_name" not in text:
        del text["license"]
    return About(languages=listed(data.get("language")), datasets=listed(data.get("datasets")), **text)


def _names(value) -> tuple[str, ...]:
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()


def _inherited(published: dict) -> About:
    """What holds for a model because it holds for the published one that it comes from."""
    license, name, link = (published.get(key) for key in LICENSE)
    return About(license, base_model=published.get("base_model"), license_name=name, license_link=link)


def published_in(manifest: dict) -> dict | None:
    """What the manifest of a model says of the published one that it goes back to."""
    info = manifest["info"]
    origin = info.get("from")
    before = origin if isinstance(origin, dict) and "model" in origin else None  # as it stood there first
    return info.get("published") or before


def said_of(directory: Path, manifest: dict | None) -> About | None:
    """What the card of an exported model says that only its author knew, and not because of what it comes from."""
    about = about_of(directory)
    if about is None or manifest is None or not (published := published_in(manifest)):
        return about
    inherited = _inherited(published)
    own = [None if getattr(about, key) == getattr(inherited, key) else getattr(about, key) for key in LICENSE]
    base = None if about.base_model == inherited.base_model else about.base_model
    return About(own[0], about.languages, about.datasets, base, own[1], own[2])


def is_own_card(directory: Path) -> bool:
    """Whether the card of a model directory is missing, or as it was written here."""
    if not (directory / CARD).exists():
        return True
    text, mark, digest = read_text(directory / CARD, JSON_BYTES).rpartition(MARK)
    return bool(mark) and digest == _ending(text)


def write_card(
    directory: Path, name: str, manifest: dict, about: About | None = None, results: Sequence[dict] = ()
) -> None:
    """Write README.md of a model directory from its manifest's `inputs` and `info`, and rows of `evaluate`."""
    from huggingface_hub import EvalResult, ModelCardData

    published = published_in(manifest)
    about = (about or About()).over(_inherited(published) if published else None)
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
        license=about.license or "other",
        license_name=about.license_name,
        license_link=about.license_link,
        language=list(about.languages) or None,
        library_name="mlx",
        tags=["mlx", "mlx-slm"],
        base_model=about.base_model,
        datasets=list(about.datasets) or None,
        pipeline_tag="text-generation",
        model_name=name,
        eval_results=measures or None,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_text(directory, name, manifest, results)}"
    write_text(directory / CARD, f"{text}{MARK}{_ending(text)}")


def _ending(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def results_of(workspace: Workspace, weights: str) -> list[dict]:
    """The last row of `evaluate` for each set and split of the weights of this fingerprint, read as a whole."""
    rows = read_json_lines(workspace.results / EVALUATIONS, keys=("set", "split", "perplexity", "bits_per_byte"))
    last = {(row["set"], row["split"]): row for row in rows if row.get("weights") == weights}
    return list(last.values())


def _text(directory: Path, name: str, manifest: dict, results: Sequence[dict]) -> str:
    inputs, info = manifest["inputs"], manifest["info"]
    shape = Shape(**info["shape"])
    bits = inputs.get(QUANTIZED)
    made = f"quantised to {bits} bits ({info['bits_per_weight']:.2f} bits a weight), " if bits else ""
    rows = "".join(
        f"| {row['set']} | {row['split']} | {row['perplexity']:.2f} | {row['bits_per_byte']:.4f} |\n" for row in results
    )
    table = f"\n| set | split | perplexity | bits a byte |\n|---|---|---|---|\n{rows}" if rows else ""
    facts = {
        "method": inputs.get("method"),
        "run": inputs.get("run"),
        "domain": info.get("domain"),
        "from": _named(info.get("from"), published_in(manifest)),
        "teacher": _taught(info.get("teacher")),
        "training": f"{info['tokens']:,} tokens, {info['seconds']:,.0f} s on {info['device']}"
        if info.get("tokens") and info.get("seconds")
        else None,
    }
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items() if value)
    end = load_tokenizer_json(directory / "tokenizer.json").id_to_token(end_of_text(directory))
    plain = chat_template_of(directory) == CHAT_TEMPLATE
    chat = " A chat is read as the contents of its\nmessages, one after the other." if plain else ""
    commands = "".join(f"    {line}\n" for line in _commands(name, shape, bits))
    return f"""# {name}

A language model of {shape.num_parameters:,} parameters, {made}trained with mlx-slm: {shape.family}, vocabulary
{shape.vocab_size:,}, context {shape.context_length:,}.

{listed}
{table}
## Limits

It continues text of the kind that it was trained on, up to {shape.context_length:,} tokens; beyond them it was not
trained. What it writes is not checked against anything. A text starts behind `{end}`: the tokenizer puts it
there.{chat}

## Use

{commands}"""


def _named(origin: dict | str | None, published: dict | None) -> str | None:
    """What a model comes from, in words."""
    parts = []
    if isinstance(origin, dict) and "run" in origin:
        step = f", step {origin['step']:,}" if origin.get("step") is not None else ""
        parts.append(f"run {origin['run']}{step}")
    if published:
        name, revision = published["model"], published["revision"]
        parts.append(f"{name}@{revision}" if revision else name)
    return ", of ".join(parts) or None


def _taught(teacher: dict | None) -> str | None:
    """What a model learnt from, in words, with the licence of that."""
    if teacher is None:
        return None
    published = teacher["published"]
    said = published and (published.get("license_name") or published.get("license"))
    return f"{_named(teacher, published)}{f' (licence: {said})' if said else ''}"


def _commands(name: str, shape: Shape, bits: int | None) -> list[str]:
    """What works with such a model."""
    every = [
        'mlx_lm.generate --model . --prompt "..."',
        "mlx_lm.lora --model . --train --data DIRECTORY --num-layers -1",
    ]
    if bits:
        return every
    group = next((size for size in (64, 32) if shape.falls_into(size)), None)
    option = "" if group == 64 else f" --q-group-size {group}"
    convert = [f"mlx_lm.convert --hf-path . --mlx-path 4bit -q{option}"] if group else []
    return [*every, *convert, f"mlx-slm export {name} --format gguf"]
