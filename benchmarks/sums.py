"""Sums of 10^8 numbers and what else is added up, against float64: which call is how far off on this processor.
The error of several sums is that of their vector, |found - exact| / |exact|.

python -m benchmarks.sums [--numbers 100000000] [--json FILE]
"""

from __future__ import annotations

import argparse
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=10**8)
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    import mlx_slm  # noqa: F401  isort: skip
    import mlx.core as mx
    import numpy as np

    from benchmarks.run import print_machine, write
    from mlx_slm.machine import sums

    print_machine()
    n, records = options.numbers, []
    values = np.random.default_rng(0).standard_normal(n, np.float32)
    wide = float(np.square(values, dtype=np.float64).sum())
    squares = mx.square(mx.array(values))
    x = mx.array(values)
    ones = mx.ones(n)
    columns = mx.array(np.random.default_rng(1).random((32_000, 256), np.float32))
    of_columns = np.array(columns, np.float64).sum(axis=0)
    small = [np.random.default_rng(i).standard_normal((rows, 1 << 22), np.float32) for i, rows in ((2, 8), (3, 32))]
    gradient, tensor = map(mx.array, small)
    of_products = small[0].astype(np.float64) @ small[1].astype(np.float64).T
    mx.eval(squares, ones, columns, gradient, tensor)

    def measure(what: str, count: int, function, exact) -> None:
        start = time.perf_counter()
        found = np.array(function(), np.float64)
        seconds = time.perf_counter() - start
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        records.append({"what": what, "numbers": count, "error": error, "seconds": seconds})
        print(f"{what:<44}{count:>14,}{error:>12.1e}{1e3 * seconds:>10.0f} ms", flush=True)

    measure("mx.sum of squares", n, lambda: squares.sum(), wide)
    measure("mx.inner", n, lambda: (x[None] @ x[:, None])[0, 0], wide)
    measure("sums.total of squares", n, lambda: sums.total(squares), wide)
    measure("sums.dot", n, lambda: sums.dot(x, x), wide)
    measure("sums.sum_of_squares (the norm of gradients)", n, lambda: sums.sum_of_squares([x]), wide)
    measure("mx.sum of ones", n, lambda: ones.sum(), n)
    measure("sums.total of ones", n, lambda: sums.total(ones), n)
    measure("mx.sum over a vocabulary (axis 0)", 32_000, lambda: columns.sum(axis=0), of_columns)
    measure("sums.summed over a vocabulary", 32_000, lambda: sums.summed(columns), of_columns)
    measure("dW T^T of 8 clusters, h = 32", 1 << 22, lambda: gradient @ tensor.T, of_products)
    write(options.json, records)


if __name__ == "__main__":
    main()
