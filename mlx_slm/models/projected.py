"""The projected network (section 2.5): k experts whose MLPs are linear combinations of h shared tensors.

    W^(l,i)[a, b] = sum_q sum_r  E[i, q] * M^(l)[q, r] * T^(l)[r, a, b]

E is [k, m] (one row per expert, shared by all projected matrices), M^(l) is [m, h], and T^(l) is [h, d_out, d_in] and
holds nearly all parameters. Everything else is shared by all experts. `expert` gives the parameters of a plain
transformer: an expert costs no more at inference than the small model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_slm.errors import SlmError
from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise, parameter_shapes


class NetworkSettings(Protocol):
    """The section of a configuration that a network is made of."""

    @property
    def k(self) -> int: ...
    @property
    def h(self) -> int | None: ...
    @property
    def m(self) -> int | None: ...
    @property
    def layers(self) -> list[int] | None: ...
    @property
    def init(self) -> str: ...
    @property
    def spread(self) -> float: ...


@dataclass(frozen=True)
class ProjectedShape:
    """Everything that decides a projected network's tensors; h, k and m as in the paper."""

    base: Shape
    h: int
    k: int
    m: int
    layers: tuple[int, ...]

    @classmethod
    def of(cls, settings: NetworkSettings, base: Shape) -> ProjectedShape:
        layers = range(base.num_layers) if settings.layers is None else settings.layers
        wrong = [layer for layer in layers if not 0 <= layer < base.num_layers]
        if wrong:
            raise SlmError(f"projection.layers: there is no layer {wrong[0]} among 0 to {base.num_layers - 1}")
        h = settings.h or settings.k
        return cls(base, h, settings.k, settings.m or h, tuple(layers))

    @property
    def matrices(self) -> list[str]:
        """Names of the projected matrices among a plain transformer's parameters."""
        return [
            f"{name.format(layer)}.weight" for layer in self.layers for name in FAMILIES[self.base.family].projected
        ]

    @property
    def projected_parameters(self) -> int:
        """P: numbers of an expert's projected matrices."""
        return len(self.matrices) * self.base.dims * self.base.hidden_dims

    @property
    def num_parameters(self) -> int:
        """The exact count, without making the network."""
        small = len(self.matrices) * self.m * self.h + self.k * self.m
        return self.base.num_parameters + self.projected_parameters * (self.h - 1) + small

    def flops_per_token(self, tokens_per_group: float) -> float:
        """Training FLOPs of a token: those of an expert, and 6 h P a group for projecting there and back."""
        return self.base.flops_per_token + 6 * self.h * self.projected_parameters / tokens_per_group

    def to_dict(self) -> dict:
        return asdict(self) | {"base": self.base.to_dict(), "layers": list(self.layers)}


def initialise_network(shape: ProjectedShape, settings: NetworkSettings, seed: int, start: dict | None = None) -> dict:
    """fp32 parameters: `{"shared": {...}, "E": [k, m], "M": {name: [m, h]}, "T": {name: [h, out, in]}}`.

    `start` are those of the plain small model to begin with, by default fresh ones.

    `anchored`: every expert has coefficient 1 on T[0], which is the plain small model, and small random ones on T[1..],
    which are zero: at step 0 every expert is the small model, and training pulls them apart. An expert alone sees few
    tokens, so experts that begin far apart learn less than one model would. `random`: E and T as a linear layer
    would have them, with W_i of the usual scale.
    """
    plain = flat(start or initialise(shape.base, seed))
    keys = mx.random.split(mx.random.key(seed + 1), 1 + len(shape.matrices))
    h, k, m = shape.h, shape.k, shape.m
    noise = mx.random.normal((k, m), key=keys[0])
    anchored = settings.init == "anchored"
    E = mx.concatenate([mx.ones((k, 1)), settings.spread * noise[:, 1:]], axis=1) if anchored else noise * m**-0.5
    M, T = {}, {}
    for name, key in zip(shape.matrices, keys[1:], strict=True):
        first = plain.pop(name)
        M[name] = mx.eye(m, h)
        if m < h:  # the tensors beyond m get a part in the coefficients of every number but the first
            M[name][1:, m:] = mx.random.normal((m - 1, h - m), key=key) * max(1, m - 1) ** -0.5
        rest = (h - 1, *first.shape)
        scale = 0.0 if anchored else float(np.std(np.array(first), dtype=np.float64))
        T[name] = mx.concatenate([first[None], scale * mx.random.normal(rest, key=key)])
    return {"shared": nested(plain), "E": E, "M": M, "T": T}


def network_shapes(shape: ProjectedShape) -> dict[str, tuple[int, ...]]:
    """The shapes of `initialise_network`'s parameters, by their flat names."""
    plain = parameter_shapes(shape.base)
    shapes: dict[str, tuple[int, ...]] = {"E": (shape.k, shape.m)}
    for name in shape.matrices:
        shapes[f"M.{name}"] = (shape.m, shape.h)
        shapes[f"T.{name}"] = (shape.h, *plain.pop(name))
    return shapes | {f"shared.{name}": size for name, size in plain.items()}


def network_of(tree: dict) -> dict:
    """A network's parameters (or moments) as they are after loading, with the matrices of M and T by name again."""
    return tree | {part: flat(tree[part]) for part in "MT"}


def tensor_rate(parameters: dict) -> float:
    """1 / mean_i sum_r |c_ir|: Adam moves each number of T[r] by about the rate a step, and so those of W_i by
    rate * sum_r |c_ir|. With this factor on the rate of T, experts move as fast as a plain matrix does."""
    factors = coefficients(parameters, parameters["E"])
    sums = mx.stack([mx.abs(c).sum(axis=1).mean() for c in factors.values()])
    return 1 / float(np.array(sums.mean()))


def coefficients(parameters: dict, experts: mx.array) -> dict[str, mx.array]:
    """c = e M of each projected matrix, {name: [groups, h]}, for rows e of E: [groups, m]."""
    return {name: experts @ M for name, M in parameters["M"].items()}


def combined(tensors: mx.array, c: mx.array) -> mx.array:
    """sum_r c[:, r] T[r]: [groups, out, in] of T [h, out, in] and c [groups, h], in one product."""
    return (c @ tensors.reshape(len(tensors), -1)).reshape(-1, *tensors.shape[1:])


def stacked(parameters: dict, ids: mx.array) -> dict:
    """Parameters of a transformer whose projected matrices are stacks [groups, out, in], one per group of rows.

    ids: int [groups], the expert of each group. The rows of a batch are then the groups, one after the other.
    """
    factors = coefficients(parameters, parameters["E"][ids])
    weights = {name: combined(parameters["T"][name], c) for name, c in factors.items()}
    return nested(flat(parameters["shared"]) | weights)


def expert(parameters: dict, which: int | np.ndarray) -> dict:
    """Parameters of a plain transformer: expert i, or that of a histogram p over clusters, E_p = sum_i p_i E_i.

    Raises SlmError for an expert, or for mass of the histogram, that the network does not have.
    """
    E = parameters["E"]
    if isinstance(which, (int, np.integer)):
        if not 0 <= which < len(E):
            raise SlmError(f"there is no expert {which}: the network has the experts 0 to {len(E) - 1}")
        row = E[int(which)]
    else:
        row = mx.array(checked_histogram(which, len(E)).astype(np.float32)) @ E
    factors = coefficients(parameters, row[None])
    weights = {name: combined(parameters["T"][name], c)[0] for name, c in factors.items()}
    return nested(flat(parameters["shared"]) | weights)


def checked_histogram(histogram: np.ndarray, k: int) -> np.ndarray:
    """A histogram over k clusters, float64 [k], made to sum to 1; raises SlmError where it cannot be one."""
    shares = np.asarray(histogram, np.float64)
    if not np.isfinite(shares).all() or (shares < 0).any() or not shares.sum():
        raise SlmError("a histogram over clusters needs finite numbers of 0 or more that do not all vanish")
    missing = np.flatnonzero(shares[k:]) + k
    if len(missing):
        raise SlmError(
            f"the histogram has mass on cluster {missing[0]}, and the network has the clusters 0 to {k - 1}: "
            "make it from the clusters that the network was trained on"
        )
    padded = np.zeros(k)
    padded[: len(shares)] = shares[:k]
    return padded / padded.sum()
