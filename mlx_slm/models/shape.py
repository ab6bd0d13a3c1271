"""The shape of a transformer: everything that decides its tensors, and what follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Protocol

from pydantic import AfterValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

from mlx_slm.fields import MAX_DIMENSION, MAX_LAYERS, Form, StrictDimension, StrictNormEps, StrictRopeTheta
from mlx_slm.models.families import FAMILIES, known_family
from mlx_slm.models.rope import RopeScaling, RopeScalingForm


class Heads(Protocol):
    """What has dimensions and heads: a Shape, a section of a configuration, a record."""

    @property
    def dims(self) -> int: ...
    @property
    def hidden_dims(self) -> int | None: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int | None: ...
    @property
    def head_dims(self) -> int | None: ...


class BodySettings(Heads, Protocol):
    """The section of a configuration that a Shape is made of."""

    @property
    def family(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...


@dataclass(frozen=True)
class Shape:
    """Everything that decides a model's tensors."""

    family: str
    num_layers: int
    dims: int
    hidden_dims: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    """Whether the output matrix is that of the input embeddings."""
    head_dims: int = 0
    """Size of a head; 0 becomes dims / num_heads."""
    attention_bias: bool = False
    """Whether queries, keys, values and the output of attention have biases (llama)."""
    rope_scaling: RopeScaling | None = None
    """Of a dict too, as records have it (llama)."""

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        object.__setattr__(self, "head_dims", self.head_dims or self.dims // self.num_heads)

    @classmethod
    def of(cls, settings: BodySettings, vocab_size: int, context_length: int) -> Shape:
        return cls(
            settings.family,
            settings.num_layers,
            settings.dims,
            settings.hidden_dims or FAMILIES[settings.family].default_hidden_dims(settings.dims),
            settings.num_heads,
            settings.num_kv_heads or settings.num_heads,
            vocab_size,
            context_length,
            settings.rope_theta,
            settings.norm_eps,
            head_dims=settings.head_dims or 0,
        )

    def falls_into(self, group: int) -> bool:
        """Whether the rows of every matrix are whole groups of weights, so that quantisation leaves none out."""
        return not any(size % group for size in (self.dims, self.hidden_dims, self.num_heads * self.head_dims))

    @property
    def num_parameters(self) -> int:
        """The exact count, without making the model."""
        family = FAMILIES[self.family]
        layer = family.layer_products(self) + family.layer_vectors(self)
        head = self.vocab_size * self.dims * (1 if self.tied else 2)
        return self.num_layers * layer + head + family.other_parameters(self)

    @property
    def product_parameters(self) -> int:
        """N: weights that a token is multiplied with. The input embedding and positions are looked up, not multiplied;
        biases and norms do not count."""
        return self.num_layers * FAMILIES[self.family].layer_products(self) + self.vocab_size * self.dims

    @property
    def forward_flops_per_token(self) -> int:
        """2 N for the products with weights and 4 L T d for attention over a full context (d: all heads together)."""
        attention = 4 * self.num_layers * self.context_length * self.num_heads * self.head_dims
        return 2 * self.product_parameters + attention

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs of a token, 6 N + 12 L T d: forward, and twice that backward."""
        return 3 * self.forward_flops_per_token

    def to_dict(self) -> dict:
        """For a record; what is as in every model of before there was another is left out."""
        sizes = asdict(self)
        usual = {
            "head_dims": self.head_dims * self.num_heads == self.dims,
            "attention_bias": not self.attention_bias,
            "rope_scaling": self.rope_scaling is None,
        }
        return {key: value for key, value in sizes.items() if not usual.get(key)}


class ShapeForm(Form):
    """A shape in a record or a manifest."""

    family: Annotated[StrictStr, AfterValidator(known_family)]
    num_layers: Annotated[StrictInt, Field(ge=1, le=MAX_LAYERS)]
    dims: StrictDimension
    hidden_dims: StrictDimension
    num_heads: StrictDimension
    num_kv_heads: StrictDimension
    vocab_size: StrictDimension
    context_length: Annotated[StrictInt, Field(ge=2, le=MAX_DIMENSION)]
    rope_theta: StrictRopeTheta = 10_000.0
    norm_eps: StrictNormEps = 1e-5
    tied: StrictBool = True
    head_dims: StrictDimension | None = None
    attention_bias: StrictBool = False
    rope_scaling: RopeScalingForm | None = None

    @model_validator(mode="after")
    def heads_fit(self) -> ShapeForm:
        FAMILIES[self.family].check(self)
        return self
