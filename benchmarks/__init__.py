"""Benchmarks on each device that MLX has and against peers; they are run from a checkout, not installed."""

import os

ENVIRONMENT = dict(os.environ)
"""As it was before `mlx_slm` set anything."""
