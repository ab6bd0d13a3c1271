"""Sizes that the benchmarks are run at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Of models, batches and data."""

    name: str
    matmul: int
    """Side of the square product that is taken as the peak."""
    family: str
    num_layers: int
    dims: int
    num_heads: int
    vocab_size: int
    context: int
    rows: int
    h: int
    groups: int
    pn_rows: int
    """Rows of a step of the projected network, in `groups` groups."""
    points: int
    """Windows to cluster and to draw rows from."""
    clusters: int
    embedding: int
    """Numbers in an embedding."""
    texts: int
    prompt: int
    answer: int
    text: int
    """Bytes to tokenise and to prepare."""
    windows: int
    """Windows of a store to open."""

    @property
    def shape(self):
        """Of the small model."""
        from mlx_slm.config.schema import ModelConfig
        from mlx_slm.models.shape import Shape

        config = ModelConfig(family=self.family, num_layers=self.num_layers, dims=self.dims, num_heads=self.num_heads)
        return Shape.of(config, self.vocab_size, self.context)


TINY = Size(
    name="tiny",
    matmul=64,
    family="llama",
    num_layers=1,
    dims=32,
    num_heads=2,
    vocab_size=256,
    context=32,
    rows=4,
    h=2,
    groups=2,
    pn_rows=4,
    points=512,
    clusters=8,
    embedding=16,
    texts=4,
    prompt=8,
    answer=4,
    text=100_000,
    windows=1000,
)
LAPTOP = Size(
    name="laptop",
    matmul=1024,
    family="llama",
    num_layers=4,
    dims=256,
    num_heads=4,
    vocab_size=8192,
    context=256,
    rows=16,
    h=32,
    groups=4,
    pn_rows=64,
    points=50_000,
    clusters=256,
    embedding=384,
    texts=64,
    prompt=128,
    answer=64,
    text=4_000_000,
    windows=10**7,
)
PAPER = Size(
    name="paper",
    matmul=4096,
    family="gpt2",
    num_layers=7,
    dims=1024,
    num_heads=8,
    vocab_size=32_000,
    context=1024,
    rows=16,
    h=32,
    groups=4,
    pn_rows=16,
    points=50_000,
    clusters=1024,
    embedding=384,
    texts=256,
    prompt=512,
    answer=128,
    text=4_000_000,
    windows=10**7,
)
SIZES = {size.name: size for size in (TINY, LAPTOP, PAPER)}
"""`tiny` shows that everything runs; `laptop` is what README reports; `paper` has the paper's small model."""
