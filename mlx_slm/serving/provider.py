"""The models that are served: by the names of the workspace alone, loaded on demand, the last few kept."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

from mlx_lm import server

from mlx_slm.errors import nearest
from mlx_slm.export.prompt import Prompts, not_loaded
from mlx_slm.machine import runtime
from mlx_slm.serving.requests import BadRequest
from mlx_slm.storage.artifacts import is_litter

SETTINGS: dict[str, Any] = {
    "model": None,
    "adapter_path": None,
    "draft_model": None,
    "num_draft_tokens": 3,
    "trust_remote_code": False,
    "chat_template": "",
    "use_default_chat_template": False,
    "chat_template_args": {},
    "pipeline": False,
    "temp": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "max_tokens": 512,
    "decode_concurrency": 32,
    "prefill_step_size": 2048,
    "prompt_cache_size": 10,
    "prompt_cache_bytes": 256 << 20,
    "kv_bits": None,
    "kv_group_size": 64,
    "quantized_kv_start": 0,
}
"""Of mlx-lm's server, as its own command line has them, but for a bound on the bytes of its prompt cache."""
PROMPTS_AT_ONCE = 8
"""Read padded to the longest; where positions are looked up, a shorter one's would lie outside of the table: one."""
LOADED = 4
"""Models that are kept, as far as they fit an eighth of the memory."""


class Provider(server.ModelProvider):
    """`places`: the directory of each name that a client may send."""

    model_key: Any

    def __init__(self, places: dict[str, Path], allowed_origins: list[str]):
        super().__init__(Namespace(**SETTINGS, allowed_origins=allowed_origins))
        self.places = places
        self.ids = list({path: name for name, path in reversed(places.items())}.values())[::-1]
        """One name for each directory."""
        self.prompts: dict[str, Prompts] = {}
        self._loaded: OrderedDict[str, tuple] = OrderedDict()
        self._bytes: dict[str, int] = {}
        self._loads = 0

    def resolve(self, name: str | None) -> str:
        """The name of a served model; raises BadRequest (404) with the known names."""
        if name in (None, "default_model"):
            if len(self.ids) == 1:
                return self.ids[0]
            raise BadRequest(f"model is missing: name one of {', '.join(self.ids)}", field="model")
        if name not in self.places:
            close = nearest(name, self.ids)
            raise BadRequest(f"no model {name[:200]!r} here{close}; served: {', '.join(self.ids)}", 404, "model")
        return name

    def load_default(self) -> None:
        """Nothing is loaded before it is asked for."""

    def load(self, model_path: str, adapter_path=None, draft_model_path=None):
        """The model of a name, from those that are kept or from its directory."""
        name = model_path
        if self.model_key is None or self.model_key[0] != name:
            if name not in self._loaded:
                self._make_room(name)
                try:
                    self._load(str(self.places[name]))
                    # Tools are refused: what a model writes of them is text.
                    setattr(self.tokenizer, "_tool_call_start", None)  # noqa: B010
                    self.prompts[name] = Prompts(self.places[name], self.tokenizer)
                except Exception as error:
                    self.reset()
                    raise RuntimeError(str(not_loaded(name, error))) from error
                self._loads += 1
                key = (name, self._loads, None)
                self._loaded[name] = (key, self.model, self.tokenizer, self.processor, self.is_batchable)
            self._loaded.move_to_end(name)
            self.model_key, self.model, self.tokenizer, self.processor, self.is_batchable = self._loaded[name]
            self.cli_args.prompt_concurrency = 1 if self.prompts[name].learned_positions else PROMPTS_AT_ONCE
        return self.model, self.tokenizer

    def _make_room(self, name: str) -> None:
        files = (file for file in self.places[name].glob("*.safetensors") if not is_litter(file))
        self._bytes[name] = sum(file.stat().st_size for file in files)
        limit = runtime.memory_bytes() // 8
        while self._loaded and (
            len(self._loaded) >= LOADED or sum(self._bytes[kept] for kept in [*self._loaded, name]) > limit
        ):
            dropped, _ = self._loaded.popitem(last=False)
            del self.prompts[dropped]
            self.reset()
