"""The three encoders on the same windows of a workspace: windows per second, and how far their clusterings agree.

    python -m benchmarks.encoders WORKSPACE [--windows 5000] [--k 16 --k 64] [--json FILE]

Agreement is the adjusted Rand index (0: chance, 1: the same clusters), between encoders and, as a yardstick, between
two seeds of k-means on the same embeddings. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import itertools
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace")
    parser.add_argument("--windows", type=int, default=5000)
    parser.add_argument("--k", type=int, action="append")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    import mlx_slm  # noqa: F401  isort: skip
    import mlx.core as mx
    import numpy as np
    from sklearn.metrics import adjusted_rand_score

    from benchmarks.run import print_machine, write
    from mlx_slm.clustering.kmeans import Lloyd, kmeans, nearest
    from mlx_slm.config.schema import DEFAULT_ENCODER, ClustersConfig
    from mlx_slm.embedding.encoder import choose_encoder, window_texts
    from mlx_slm.report import Report
    from mlx_slm.storage.workspace import Workspace
    from mlx_slm.text.hub_tokenizer import open_tokenizer
    from mlx_slm.text.store import Store

    print_machine()
    workspace = Workspace(options.workspace)
    tokenizer, store = open_tokenizer(workspace.tokenizer), Store(workspace.data("generic", "train"))
    windows = np.arange(min(options.windows, store.num_windows))
    texts = window_texts(store, tokenizer, windows)
    print(f"{len(texts):,} windows of {store.context_length} tokens")
    embeddings, rows = {}, []
    for name in (DEFAULT_ENCODER, "static", "lsi"):
        encoder = choose_encoder(workspace, ClustersConfig(encoder=name), store, tokenizer, Report()).open()
        encoder.encode(texts[:64])
        start = time.perf_counter()
        embeddings[name] = encoder.encode(texts)
        rate = len(texts) / (time.perf_counter() - start)
        print(f"{name:<42}{encoder.dims:>5} dims{rate:>10,.0f} windows/s")
        rows.append({"name": "encode", "encoder": name, "value": rate, "unit": "windows/s", "dims": encoder.dims})
    for k in options.k or [16, 64]:
        places = {}
        for name, seed in itertools.product(embeddings, (0, 1)):
            centroids, _ = kmeans(embeddings[name], k, lloyd=Lloyd(seed=seed, restarts=3))
            places[name, seed] = nearest(mx.array(embeddings[name]), centroids)[0]
        pairs = [((name, 0), (name, 1)) for name in embeddings]
        pairs += [((a, 0), (b, 0)) for a, b in itertools.combinations(embeddings, 2)]
        for a, b in pairs:
            score = adjusted_rand_score(places[a], places[b])
            what = f"{a[0]}, two seeds" if a[0] == b[0] else f"{a[0]} and {b[0]}"
            print(f"k = {k:<4} {what:<62} adjusted Rand index {score:.2f}")
            rows.append({"name": "agreement", "k": k, "encoders": [a[0], b[0]], "value": float(score)})
    write(options.json, rows)


if __name__ == "__main__":
    main()
