"""An existing gpt2- or llama-family directory, in the layout of mlx-lm or of the Hub, as the start of a pretraining."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slm.errors import SlmError
from mlx_slm.export import from_huggingface, to_huggingface
from mlx_slm.files import read_json, require_form
from mlx_slm.forms import ConfigForm, Gpt2Form, LlamaForm
from mlx_slm.models.transformer import Shape, Transformer
from mlx_slm.records import fingerprint
from mlx_slm.training.checkpoint import read_safetensors
from mlx_slm.workspace import is_litter, sha256

GPT2 = {"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}
LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""What this code computes; a configuration that says otherwise is refused."""


class Pretrained:
    """A model directory: `shape` for windows of `context_length` tokens, `parameters()` in fp32, `fingerprint`."""

    def __init__(self, directory: Path, context_length: int):
        self.directory = Path(directory)
        if not (self.directory / "config.json").exists():
            raise SlmError(f"--init-from {directory}: no config.json there; name a model directory")
        self.config = read_json(self.directory / "config.json", ConfigForm)
        self._files = sorted(p for p in self.directory.glob("*.safetensors") if not is_litter(p))
        if not self._files:
            raise SlmError(f"--init-from {directory}: no safetensors weights there")
        if "quantization" in self.config or "quantization_config" in self.config:
            raise SlmError(
                f"--init-from {directory}: its weights are quantised; dequantise them first: "
                f"mlx_lm.convert --hf-path {directory} --mlx-path NEW -d"
            )
        self.shape = _shape(self.config, self.directory, context_length)

    @property
    def fingerprint(self) -> str:
        return fingerprint([sha256(path) for path in self._files])

    def parameters(self) -> dict:
        """Parameters for a `Transformer(shape)`; raises SlmError naming what is missing or has another shape."""
        weights: dict[str, mx.array] = {}
        for path in self._files:
            weights |= read_safetensors(path)
        found = _gpt2_weights(weights) if self.shape.family == "gpt2" else dict(weights)
        if self.shape.family == "gpt2" and "wpe.weight" in found:
            found["wpe.weight"] = found["wpe.weight"][: self.shape.context_length]
        wanted = {name: value.shape for name, value in tree_flatten(Transformer(self.shape).parameters())}
        named = dict(tree_flatten(from_huggingface(found, self.shape.family)))
        wrong = [
            f"{name} {named[name].shape if name in named else 'is missing'}, expected {shape}"
            for name, shape in wanted.items()
            if name not in named or named[name].shape != shape
        ]
        if wrong:
            raise SlmError(f"--init-from {self.directory}: weights do not fit config.json: {'; '.join(wrong[:3])}")
        kept = {name: mx.contiguous(named[name].astype(mx.float32)) for name in wanted}
        return tree_unflatten(list(kept.items()))


def _gpt2_weights(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The Hub's unprefixed names and layout, from its own files, from transformers' or from mlx-lm's."""
    if any(name.startswith("model.") for name in weights):
        return to_huggingface({name: value for name, value in weights.items() if name.startswith("model.")}, "gpt2")
    return {name.removeprefix("transformer."): value for name, value in weights.items()}


def _shape(config: dict, directory: Path, context_length: int) -> Shape:
    family = config.get("model_type")
    if family not in ("gpt2", "llama"):
        raise SlmError(f"--init-from {directory}: a model of type {family!r}; supported: gpt2, llama")
    require_form(config, Gpt2Form if family == "gpt2" else LlamaForm, directory / "config.json")
    expected = GPT2 if family == "gpt2" else LLAMA
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    refused = [f"{key} is {config[key]}" for key, value in expected.items() if config.get(key, value) != value]
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        refused.append(f"rope_scaling is {rope}")
    dims = config["n_embd" if family == "gpt2" else "hidden_size"]
    heads = config["n_head" if family == "gpt2" else "num_attention_heads"]
    if (
        dims % heads
        or heads % (config.get("num_key_value_heads") or heads)
        or (family == "llama" and dims // heads % 2)
    ):
        raise SlmError(f"--init-from {directory}: config.json: {heads} heads do not divide {dims} dimensions evenly")
    if (config.get("head_dim") or dims // heads) * heads != dims:
        refused.append(f"head_dim is {config['head_dim']}")
    if family == "gpt2" and config.get("n_inner") not in (None, 4 * dims):
        refused.append(f"n_inner is {config['n_inner']}, mlx-lm reads 4 * n_embd only")
    if family == "gpt2" and not config.get("tie_word_embeddings", True):
        refused.append("tie_word_embeddings is False")
    if refused:
        raise SlmError(f"--init-from {directory}: not supported: {', '.join(refused)}")
    longest = config.get("n_positions") or config.get("max_position_embeddings") or 0
    if longest < context_length:
        raise SlmError(
            f"--init-from {directory}: it reads {longest} tokens, data.context_length is {context_length}: "
            f"set data.context_length={longest} and prepare the text anew"
        )
    if family == "gpt2":
        return Shape(
            "gpt2",
            config["n_layer"],
            dims,
            4 * dims,
            heads,
            heads,
            config["vocab_size"],
            context_length,
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
        )
    return Shape(
        "llama",
        config["num_hidden_layers"],
        dims,
        config["intermediate_size"],
        heads,
        config.get("num_key_value_heads") or heads,
        config["vocab_size"],
        context_length,
        rope.get("rope_theta") or config.get("rope_theta", 10_000.0),
        config.get("rms_norm_eps", 1e-6),
        config.get("tie_word_embeddings", False),
    )
