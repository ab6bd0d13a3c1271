"""The parts that a training step, clustering and encoding are made of, one at a time, on MLX's default device."""

from __future__ import annotations

from benchmarks.case import Case, named, random
from benchmarks.sizes import Size


def matmul(size: Size) -> Case:
    """A square product: the peak that the others are measured against."""
    import mlx.core as mx

    n = size.matmul
    a, b = random(n, n), random(n, n, seed=1)
    return Case(lambda: mx.eval(a @ b), 1, "products/s", 2 * n**3, 3 * n * n * a.itemsize)


def read(size: Size) -> Case:
    """A large matrix times a vector: the bandwidth that the others are measured against."""
    import mlx.core as mx

    x, v = random(32 * size.matmul, size.matmul), random(size.matmul, 1, seed=1)
    return Case(lambda: mx.eval(x @ v), x.size, "numbers/s", 2 * x.size, x.nbytes)


def elementwise(size: Size) -> Case:
    """x + 1 over a large array."""
    import mlx.core as mx

    x = random(16 * size.matmul, size.matmul)
    return Case(lambda: mx.eval(x + 1), x.size, "numbers/s", x.size, 2 * x.nbytes)


def _attention(size: Size):
    from mlx_slm.models.ops import causal_attention

    head = size.dims // size.num_heads
    q, k, v = (random(size.rows, size.num_heads, size.context, head, seed=seed) for seed in range(3))
    pairs = size.rows * size.num_heads * size.context * (size.context + 1) / 2
    return (lambda q, k, v: causal_attention(q, k, v, head**-0.5)), (q, k, v), 4 * pairs * head


def attention(size: Size) -> Case:
    """Causal attention of one layer, forward. FLOPs count the visible pairs alone."""
    import mlx.core as mx

    function, arrays, flops = _attention(size)
    compiled = mx.compile(function)
    return Case(lambda: mx.eval(compiled(*arrays)), size.rows * size.context, "tokens/s", flops)


def attention_backward(size: Size) -> Case:
    """The same, forward and backward."""
    import mlx.core as mx

    function, arrays, flops = _attention(size)
    compiled = mx.compile(mx.value_and_grad(lambda *x: function(*x).astype(mx.float32).sum(), argnums=(0, 1, 2)))
    return Case(lambda: mx.eval(compiled(*arrays)), size.rows * size.context, "tokens/s", 3 * flops)


def cross_entropy(size: Size) -> Case:
    """The loss of hidden states and a head, in chunks, with its gradients."""
    import mlx.core as mx
    import numpy as np

    from mlx_slm.training.loss import linear_cross_entropy

    tokens = size.rows * size.context
    hidden, head = random(tokens, size.dims), random(size.vocab_size, size.dims, seed=1)
    targets = mx.array(np.random.default_rng(0).integers(0, size.vocab_size, tokens).astype(np.int32))
    weights = mx.ones(tokens)
    compiled = mx.compile(mx.value_and_grad(lambda h, w: linear_cross_entropy(h, w, targets, weights), argnums=(0, 1)))
    return Case(lambda: mx.eval(compiled(hidden, head)), tokens, "tokens/s", 6 * tokens * size.vocab_size * size.dims)


def _tensor(size: Size):
    return random(size.h, size.shape.hidden_dims, size.dims), random(size.groups, size.h, seed=1)


def projection(size: Size) -> Case:
    """The weights of a step's experts from the shared tensor of one matrix: C @ T."""
    import mlx.core as mx

    from mlx_slm.models.projected import combined

    tensor, c = _tensor(size)
    compiled = mx.compile(combined)
    moved = tensor.nbytes + tensor.nbytes // size.h * size.groups
    return Case(lambda: mx.eval(compiled(tensor, c)), 1, "matrices/s", 2 * size.groups * tensor.size, moved)


def tensor_update(size: Size) -> Case:
    """Adam's update of the shared tensor of one matrix from the gradients of a step's experts, as the step does it."""
    import mlx.core as mx

    from mlx_slm.training.optimizer import AdamW

    tensor, c = (array.astype(mx.float32) for array in _tensor(size))
    gradients = random(size.groups, *tensor.shape[1:], seed=2).astype(mx.float32)
    optimizer, one = AdamW(), mx.array(1.0)
    begun = optimizer.init({"T": tensor})
    state = [tensor, begun["m"]["T"], begun["v"]["T"]]

    @mx.compile
    def update(tensor, m, v):
        now = optimizer.now(begun, one, one, one, mx.array(1e-4))
        gradient = (c.T @ gradients.reshape(len(c), -1)).reshape(tensor.shape)
        return optimizer.moved(tensor, m, v, gradient, now)

    def work():
        state[:] = update(*state)
        mx.eval(state)

    return Case(work, tensor.size, "numbers/s", (2 * size.groups + 10) * tensor.size, 6 * 4 * tensor.size)


def kmeans_assignment(size: Size) -> Case:
    """The nearest centroid of each point."""
    import mlx.core as mx
    import numpy as np

    from mlx_slm.clustering.kmeans import nearest

    rng = np.random.default_rng(0)
    points = mx.array(rng.standard_normal((size.points, size.embedding), np.float32))
    centroids = rng.standard_normal((size.clusters, size.embedding), np.float32)
    mx.eval(points)
    flops = 2 * size.points * size.clusters * size.embedding
    return Case(lambda: nearest(points, centroids, False), size.points, "points/s", flops)


MICRO = named(
    matmul,
    read,
    elementwise,
    attention,
    attention_backward,
    cross_entropy,
    projection,
    tensor_update,
    kmeans_assignment,
)
