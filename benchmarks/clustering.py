"""The sentence encoder against sentence-transformers, k-means against faiss and scikit-learn, on the same real texts.

    python -m benchmarks.clustering [--only kmeans|encoder] [--rounds 7] [--json FILE] [--points 50000 --k 256]

Each side runs in a process of its own; they take turns. The points are embeddings of short real texts (paragraphs of
docstrings of the installed packages), made once with the default encoder and kept in ~/.cache/mlx-slm (`--cache` does
only that; the tests use them too). All start k-means from the same centroids and do the same number of iterations.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.harness import play, print_machine, records, show, write

CACHE = Path.home() / ".cache" / "mlx-slm"
POINTS, SHORT = 50_000, 120
TEXTS = 256


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["kmeans", "encoder"])
    parser.add_argument("--cache", action="store_true", help="only make the cached embeddings")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each side gets")
    parser.add_argument("--points", type=int, default=POINTS, help="at most 50,000")
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--json", help="write the results to this file")
    return parser.parse_args()


def short_texts(count: int) -> list[str]:
    """Distinct real short texts: paragraphs of docstrings."""
    from mlx_slm.text.docstrings import documents

    found: dict[str, None] = {}
    for text in documents("*"):
        for part in text.split("\n\n"):
            if len(part) > 60:
                found[" ".join(part.split())[:SHORT]] = None
        if len(found) >= count:
            break
    return list(found)[:count]


def cached_embeddings():
    """fp16 [50000, 384], computed at the first call."""
    import numpy as np

    path = CACHE / f"embeddings-{POINTS}.npy"
    if not path.exists():
        from mlx_slm.clustering.bert import SentenceEncoder
        from mlx_slm.clustering.encoder import find_directory
        from mlx_slm.config import DEFAULT_ENCODER

        texts = short_texts(POINTS)
        encoder = SentenceEncoder(find_directory(DEFAULT_ENCODER))
        parts, start = [], time.perf_counter()
        for first in range(0, len(texts), 2000):
            parts.append(encoder.encode(texts[first : first + 2000]).astype(np.float16))
            print(
                f"{first + len(parts[-1]):,} texts, {(first + 2000) / (time.perf_counter() - start):.0f}/s", flush=True
            )
        CACHE.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(parts))
    return np.load(path)


def points_and_start(options):
    import numpy as np

    points = cached_embeddings()[: options.points].astype(np.float32)
    chosen = np.random.default_rng(0).choice(len(points), options.k, replace=False)
    return points, points[chosen].copy()


def kmeans_ours(options, turn) -> None:
    import mlx.core as mx

    from mlx_slm.clustering.kmeans import State, kmeans

    points, start = points_and_start(options)

    def work():
        kmeans(points, options.k, iterations=options.iterations, tolerance=-1, state=State(centroids=start))

    turn.serve(work, peak=mx.get_peak_memory)


def kmeans_faiss(options, turn) -> None:
    import faiss

    points, start = points_and_start(options)

    def work():
        made = faiss.Clustering(points.shape[1], options.k)
        made.niter, made.max_points_per_centroid = options.iterations, len(points)
        faiss.copy_array_to_vector(start.ravel(), made.centroids)
        made.train(points, faiss.IndexFlatL2(points.shape[1]))

    turn.serve(work)


def kmeans_sklearn(options, turn) -> None:
    from sklearn.cluster import KMeans

    points, start = points_and_start(options)
    turn.serve(lambda: KMeans(options.k, init=start, n_init=1, max_iter=options.iterations, tol=0).fit(points))


def kmeans_products(options, turn) -> None:
    """The floor: the products of points and centroids alone, as many as there are iterations."""
    import mlx.core as mx

    points, start = (mx.array(values) for values in points_and_start(options))
    turned = mx.contiguous(start.T)
    mx.eval(points, turned)

    def work():
        for _ in range(options.iterations):
            mx.eval(points @ turned)

    turn.serve(work)


def windows() -> list[str]:
    """Texts of about the length of a window of 128 tokens: whole docstrings, cut at 600 characters."""
    from mlx_slm.text.docstrings import documents

    found = []
    for text in documents("stdlib"):
        found += [text[i : i + 600] for i in range(0, len(text) - 599, 600)]
        if len(found) >= TEXTS:
            break
    return found[:TEXTS]


def encoder_ours(options, turn) -> None:
    import mlx.core as mx

    from mlx_slm.clustering.bert import SentenceEncoder
    from mlx_slm.clustering.encoder import find_directory
    from mlx_slm.config import DEFAULT_ENCODER

    encoder = SentenceEncoder(find_directory(DEFAULT_ENCODER), "start")
    turn.serve(lambda: encoder.encode(options.texts), peak=mx.get_peak_memory)


def encoder_sentence_transformers(options, turn) -> None:
    from sentence_transformers import SentenceTransformer

    from mlx_slm.clustering.encoder import find_directory
    from mlx_slm.config import DEFAULT_ENCODER

    model = SentenceTransformer(str(find_directory(DEFAULT_ENCODER)), device="cpu")
    turn.serve(lambda: model.encode(options.texts, show_progress_bar=False))


KMEANS = {
    "mlx-slm": kmeans_ours,
    "faiss": kmeans_faiss,
    "scikit-learn": kmeans_sklearn,
    "bare products (floor)": kmeans_products,
}
ENCODERS = {"mlx-slm": encoder_ours, "sentence-transformers": encoder_sentence_transformers}


def main() -> None:
    options = parse_arguments()
    import mlx_slm  # noqa: F401

    if options.cache:
        cached_embeddings()
        return
    print_machine()
    rows: list[dict] = []
    if options.only != "encoder":
        cached_embeddings()
        size = f"{options.points:,} x 384, k = {options.k}, {options.iterations} iterations"
        found = play(KMEANS, options, options.rounds)
        rows += records("kmeans", size, found, "mlx-slm", options.points * options.iterations / 1e6, "M points/s")
        show(rows, "mlx-slm")
    if options.only != "kmeans":
        options.texts = windows()
        found = play(ENCODERS, options, options.rounds)
        made = records("encoder", f"{TEXTS} texts of 600 characters", found, "mlx-slm", TEXTS, "texts/s")
        show(made, "mlx-slm")
        rows += made
    write(options.json, rows)


if __name__ == "__main__":
    main()
