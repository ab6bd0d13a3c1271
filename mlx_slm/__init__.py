"""mlx-slm: small, specialised language models on MLX (arXiv 2402.01093).

Import this package before `mlx`: on Linux it loads a fast BLAS first, without which matrix products are 30x slower.
"""

from mlx_slm.machine import runtime

__version__ = "0.1.0"

runtime.prepare()
