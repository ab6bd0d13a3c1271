"""Sizes that the benchmarks are run at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Of models, batches and data. `family` and on: the small model; `h` and `groups`: the projected network."""

    name: str
    matmul: int
    family: str
    num_layers: int
    dims: int
    num_heads: int
    vocab_size: int
    context: int
    rows: int
    h: int
    groups: int
    points: int
    clusters: int
    embedding: int
    texts: int
    prompt: int
    answer: int

    @property
    def shape(self):
        """Of the small model."""
        from mlx_slm.config import ModelConfig
        from mlx_slm.models.transformer import Shape

        config = ModelConfig(family=self.family, num_layers=self.num_layers, dims=self.dims, num_heads=self.num_heads)
        return Shape.of(config, self.vocab_size, self.context)


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 64, "llama", 1, 32, 2, 256, 32, 4, 2, 2, 512, 8, 16, 4, 8, 4),
        Size("laptop", 1024, "llama", 4, 256, 4, 8192, 256, 16, 32, 4, 50_000, 256, 384, 64, 128, 64),
        Size("paper", 4096, "gpt2", 7, 1024, 8, 32_000, 1024, 16, 32, 4, 262_144, 1024, 384, 256, 512, 128),
    )
}
"""`tiny` shows that everything runs; `laptop` is what README reports; `paper` has the paper's small model."""
