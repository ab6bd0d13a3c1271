"""The forms of every JSON file that is read: what else stands in one is refused or not looked at.

A form checks; the values that are used are those of the file. Bounds are wide, but a number beyond them would make a
tensor, a loop or a file name of somebody else's choice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from mlx_slm.config.schema import ClustersConfig, MixtureConfig, ProjectionConfig, TokenizerConfig
from mlx_slm.fields import MAX_CLUSTERS, MAX_DIMENSION, MAX_LAYERS, Form, StrictDimension, StrictNormEps
from mlx_slm.files import is_plain
from mlx_slm.models.shape import ShapeForm

Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
Number = Annotated[StrictFloat | StrictInt, Field(allow_inf_nan=False)]
Digest = Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
Clusters = Annotated[StrictInt, Field(ge=1, le=MAX_CLUSTERS)]


def _plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError("not a plain relative path")
    return name


def _word(name: str) -> str:
    if "/" in _plain(name) or not name.strip():
        raise ValueError("not a plain name")
    return name


PlainPath = Annotated[StrictStr, AfterValidator(_plain)]
Word = Annotated[StrictStr, Field(max_length=200), AfterValidator(_word)]


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bytes: Count
    sha256: Digest | None = None
    crc32: list[Annotated[StrictInt, Field(ge=0, lt=2**32)]] | None = None
    block: Annotated[StrictInt, Field(ge=1 << 12, le=1 << 30)] | None = None

    @model_validator(mode="after")
    def one_checksum(self) -> FileEntry:
        if (self.sha256 is None) == (self.crc32 is None) or (self.crc32 is None) != (self.block is None):
            raise ValueError("a file has a sha256, or a crc32 for each block")
        if self.crc32 is not None and self.block and len(self.crc32) != -(-self.bytes // self.block):
            raise ValueError("the number of checksums is not that of the blocks")
        return self


class StoreInfo(Form):
    tokens: Count
    documents: Count
    bytes: Count
    dtype: Literal["<u2", "<u4"]
    context_length: StrictDimension
    eos_id: Count
    replaced: Count


class TokenizerInfo(Form):
    eos_id: Count | None = None


class TokenizerInputs(Form):
    settings: dict[str, Any]
    text: StrictStr

    @model_validator(mode="after")
    def known_settings(self) -> TokenizerInputs:
        TokenizerConfig.model_validate(self.settings)
        return self


class ClustersInfo(Form):
    k: Clusters
    dims: StrictDimension
    settings: dict[str, Any]
    levels: list[Clusters] | None = None

    @model_validator(mode="after")
    def known_settings(self) -> ClustersInfo:
        ClustersConfig.model_validate(self.settings)
        return self

    @model_validator(mode="after")
    def nested_levels(self) -> ClustersInfo:
        levels = [self.k] if self.levels is None else self.levels
        if not levels or levels[-1] != self.k or any(below % above for above, below in pairwise(levels)):
            raise ValueError(f"levels {levels} are not those of a tree of {self.k} clusters")
        return self


class EncoderFacts(Form):
    encoder: Annotated[StrictStr, Field(max_length=500)]
    long_windows: Literal["mean", "start"]


class ClustersInputs(Form):
    embeddings: EncoderFacts
    kmeans: dict[str, Any]


class EmbeddingsInfo(Form):
    dims: StrictDimension
    windows: Count


class BundleInfo(Form):
    k: Clusters
    method: Word
    encoder: EncoderFacts


class ModelInfo(Form):
    shape: ShapeForm


class ModelInputs(Form):
    tokenizer: StrictStr


class Manifest(Form):
    kind: StrictStr
    inputs: dict[str, Any]
    info: dict[str, Any]
    files: dict[PlainPath, FileEntry]
    fingerprint: StrictStr
    checksum: Digest


INFO = {
    "token store": StoreInfo,
    "tokenizer": TokenizerInfo,
    "clusters": ClustersInfo,
    "embeddings": EmbeddingsInfo,
    "bundle": BundleInfo,
    "model": ModelInfo,
}
INPUTS = {"tokenizer": TokenizerInputs, "clusters": ClustersInputs, "encoder": EncoderFacts, "model": ModelInputs}
"""Of the manifests of a kind."""


class TrainingForm(Form):
    batch_rows: StrictDimension


class Inputs(Form):
    """What a run was made from."""

    method: Word
    shape: ShapeForm
    tokenizer: StrictStr
    training: TrainingForm | None = None
    k: Clusters | None = None
    clusters: StrictStr | None = None
    generic: list[Count] | None = None
    expert: Count | None = None
    projection: ProjectionConfig | None = None
    mixture: MixtureConfig | None = None


LICENSE = ("license", "license_name", "license_link")
"""Fields of a card that go together."""


class PublishedForm(Form):
    """What a record says of a published model."""

    model: StrictStr
    revision: StrictStr | None = None
    context_length: Count | None = None
    license: StrictStr | None = None
    license_name: StrictStr | None = None
    license_link: StrictStr | None = None
    base_model: StrictStr | None = None


class RunForm(Form):
    """run.json"""

    method: Word
    inputs: Inputs
    status: Literal["running", "finished"]
    select: Literal["last", "best"]
    started: Number
    step: Count | None = None
    best_step: Count | None = None
    tokens: Count | None = None
    seconds: Annotated[StrictFloat | StrictInt, Field(ge=0, allow_inf_nan=False)] | None = None
    name: PlainPath | None = None
    published: PublishedForm | None = None

    @model_validator(mode="after")
    def experts_are_known(self) -> RunForm:
        inputs = self.inputs
        has_experts = any((inputs.k, inputs.clusters, inputs.generic, inputs.projection, inputs.mixture))
        if has_experts and "from" not in (inputs.model_extra or {}):
            if inputs.k is None or inputs.clusters is None or inputs.generic is None or len(inputs.generic) != inputs.k:
                raise ValueError("a run with experts says its k, its clusters and the tokens of each")
            if not sum(inputs.generic):
                raise ValueError("no cluster has any text")
            if (inputs.projection is None) == (inputs.mixture is None):
                raise ValueError("a run with experts says its projection or its mixture")
        if self.status == "finished" and (self.step is None or self.tokens is None or self.seconds is None):
            raise ValueError("a finished run says its step, tokens and seconds")
        return self


class CountsForm(Form):
    """counts.json of assignments."""

    windows: list[Count]
    tokens: list[Count]
    nearest: list[list[Count]]
    distances: Annotated[list[Number], Field(min_length=101, max_length=101)]


class StateForm(Form):
    """state.json of a checkpoint."""

    step: Count
    tokens: Count
    seconds: Number
    window: dict[str, Number]
    fall: tuple[Count, Count] | None = None


class ConfigForm(Form):
    """config.json of any model."""

    model_type: Word
    eos_token_id: Count | list[Count] | None = None


class BertForm(Form):
    """config.json of a sentence encoder."""

    model_type: Word
    hidden_size: StrictDimension
    num_attention_heads: StrictDimension
    num_hidden_layers: Annotated[StrictInt, Field(ge=1, le=MAX_LAYERS)]
    intermediate_size: StrictDimension
    vocab_size: StrictDimension
    max_position_embeddings: StrictDimension
    type_vocab_size: StrictDimension
    layer_norm_eps: StrictNormEps
    hidden_act: StrictStr
    pad_token_id: Annotated[StrictInt, Field(ge=0, le=MAX_DIMENSION)] = 0
    position_embedding_type: StrictStr = "absolute"

    @model_validator(mode="after")
    def heads_fit(self) -> BertForm:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size is no multiple of num_attention_heads")
        return self


class ModuleForm(Form):
    type: StrictStr
    path: StrictStr = ""

    @model_validator(mode="after")
    def inside(self) -> ModuleForm:
        if self.path and not is_plain(self.path):
            raise ValueError("its path is not a plain relative one")
        return self


class StaticForm(Form):
    """config.json of a model2vec directory."""

    normalize: StrictBool = True


class TokenizerSettings(Form):
    """tokenizer_config.json"""

    tokenizer_class: StrictStr | None = None
    eos_token: StrictStr | dict[str, Any] | None = None
