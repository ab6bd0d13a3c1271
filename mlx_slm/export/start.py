"""A model directory of a known family, in the layout of mlx-lm or of the Hub: to start from, or to evaluate."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlx_slm.errors import SlmError
from mlx_slm.export.card import About, about_of
from mlx_slm.export.published import revision_of
from mlx_slm.files import read_json, require_form
from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer
from mlx_slm.storage.arrays import read_safetensors
from mlx_slm.storage.artifacts import is_litter, sha256
from mlx_slm.storage.forms import LICENSE, ConfigForm
from mlx_slm.storage.records import fingerprint


def text_config(config: dict) -> dict:
    """What config.json says of the part of a model that reads text, where it has several."""
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


def longest_context(config: dict) -> int | None:
    """Tokens that a model reads at once, by its config.json; None where it does not say."""
    text = text_config(config)
    return text.get("n_positions") or text.get("max_position_embeddings")


class Pretrained:
    """A model directory: `shape` for windows of `context_length` tokens (None: its own), `parameters()` in fp32,
    `fingerprint`. `option` is what named it; quantised weights are for evaluation alone, without one."""

    def __init__(self, directory: Path, context_length: int | None, option: str | None = "--init-from"):
        self.directory, self._option = Path(directory), option
        self.name = str(directory) if revision_of(self.directory) is None else _repository(self.directory)
        """As a user would give it."""
        self.called = f"{option} {self.name}" if option else self.name
        if not (self.directory / "config.json").exists():
            raise SlmError(f"{self.called}: no config.json there; name a model directory")
        self.config = read_json(self.directory / "config.json", ConfigForm)
        self._files = sorted(p for p in self.directory.glob("*.safetensors") if not is_litter(p))
        if not self._files:
            raise SlmError(f"{self.called}: {no_weights(self.directory)}")
        self.quantization = self.config.get("quantization") or self.config.get("quantization_config")
        if self.quantization and not isinstance(self.quantization, dict):
            raise SlmError(f"{self.called}: config.json: quantization is {self.quantization!r}, no settings of one")
        if self.quantization and "quant_method" in self.quantization:
            raise SlmError(
                f"{self.called}: its weights are of the kind {self.quantization['quant_method']}, which is not read "
                "here: name the model that it was made of"
            )
        if self.quantization and option:
            raise SlmError(
                f"{self.called}: its weights are quantised; dequantise them first: "
                f"mlx_lm.convert --hf-path {self.directory} --mlx-path NEW -d"
            )
        self.shape = _shape(self.config, self.called, self.directory, context_length)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([sha256(path) for path in self._files])

    @property
    def label(self) -> str:
        """In the names of runs."""
        return re.sub(r"[^\w.+-]+", "-", self.name.rstrip("/").rpartition("/")[2]).strip("-.") or "model"

    @property
    def identity(self) -> dict:
        """What of it decides the outcome of a training, for a record."""
        return {"weights": self.fingerprint}

    @property
    def facts(self) -> dict:
        """Where it lies and what its author says of it, for a record: these may change and the model stay."""
        revision, about = revision_of(self.directory), about_of(self.directory) or About()
        said = {key: getattr(about, key) for key in LICENSE if getattr(about, key)}
        where = {"model": self.name if revision else str(self.directory.resolve()), "revision": revision}
        reads = {"context_length": longest_context(self.config)}
        return where | reads | said | {"base_model": self.name if revision else about.base_model}

    def fitted(self, context_length: int) -> Pretrained:
        """The same for windows of another length; raises SlmError for longer ones than it reads."""
        return Pretrained(self.directory, context_length, self._option)

    def parameters(self) -> dict:
        """Parameters for a `Transformer(shape)`; raises SlmError naming what is missing or has another shape."""
        weights: dict[str, mx.array] = {}
        for path in self._files:
            weights |= read_safetensors(path)
        if self.quantization:
            weights = self._dequantized(weights)
        family = FAMILIES[self.shape.family]
        wanted = {name: value.shape for name, value in flat(Transformer(self.shape).parameters()).items()}
        named = flat(family.from_hub(family.cut(weights, self.shape.context_length)))
        wrong = [
            f"{name} {named[name].shape if name in named else 'is missing'}, expected {shape}"
            for name, shape in wanted.items()
            if name not in named or named[name].shape != shape
        ]
        if wrong:
            raise SlmError(f"{self.called}: weights do not fit config.json: {'; '.join(wrong[:3])}")
        if packed := next((n for n in wanted if not mx.issubdtype(named[n].dtype, mx.floating)), None):
            raise SlmError(
                f"{self.called}: {packed} holds {named[packed].dtype}, no numbers that a model multiplies with"
            )
        kept = {name: mx.contiguous(named[name].astype(mx.float32)) for name in wanted}
        return nested(kept)

    def _dequantized(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The numbers that mlx-lm multiplies with, of matrices stored as `weight`, `scales` and `biases`."""
        plain = {}
        for name, value in weights.items():
            module, _, part = name.rpartition(".")
            scales = weights.get(f"{module}.scales")
            if scales is None or part not in ("weight", "scales", "biases"):
                plain[name] = value
            elif part == "weight":
                own = self.quantization.get(module)
                how = own if isinstance(own, dict) else self.quantization
                settings = {key: how[key] for key in ("group_size", "bits", "mode") if key in how}
                plain[name] = mx.dequantize(value, scales, weights.get(f"{module}.biases"), **settings)
        return plain


def no_weights(directory: Path) -> str:
    """Why a directory without safetensors is of no use."""
    pickled = any(directory.glob(f"*.{kind}") for kind in ("bin", "pt", "pth", "ckpt"))
    return "its weights are pickles, which are never opened: take a version in safetensors" * pickled or (
        "no safetensors weights there"
    )


def _repository(directory: Path) -> str:
    """owner/model of a directory in the Hub's cache."""
    return directory.parent.parent.name.removeprefix("models--").replace("--", "/")


def _shape(config: dict, called: str, directory: Path, context_length: int | None) -> Shape:
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise SlmError(f"{called}: a model of type {config['model_type']!r}; supported: {', '.join(FAMILIES)}")
    require_form(config, family.form, directory / "config.json")
    refused = [f"{key} is {config[key]}" for key, value in family.computes.items() if config.get(key, value) != value]
    refused += family.refused(config)
    longest = longest_context(config) or 0
    shape = Shape(family.name, context_length=context_length or longest, **family.from_hub_config(config))
    try:
        family.check(shape)
    except ValueError as error:
        raise SlmError(f"{called}: config.json: {error}") from error
    if refused:
        raise SlmError(f"{called}: not supported: {', '.join(refused)}")
    if not longest:
        raise SlmError(f"{called}: config.json does not say how long a text it reads (max_position_embeddings)")
    if longest < (context_length or 1):
        raise SlmError(
            f"{called}: it reads {longest} tokens, data.context_length is {context_length}: "
            f"set data.context_length={longest} and prepare the text again"
        )
    return shape
