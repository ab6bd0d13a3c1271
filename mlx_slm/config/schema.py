"""The whole YAML schema. One file describes a workspace; unknown keys are refused and all problems reported at once.

What the paper does not specify is an explicit field whose docstring says so. Sizes may be written `1M`, `32k`, `2.5B`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mlx_slm.fields import (
    Branches,
    Clusters,
    Dimension,
    DimensionOrAuto,
    Fraction,
    Hours,
    Layers,
    Multiple,
    NormEps,
    PositiveSize,
    Rate,
    Real,
    RopeTheta,
    Rounds,
    Seed,
    Share,
    Size,
    Steps,
)
from mlx_slm.models.families import FAMILIES, known_family

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
    came_later: ClassVar[tuple[str, ...]] = ()

    def recorded(self, exclude: Collection[str] = ()) -> dict:
        """What the record of a run says of this section. Keys that `came_later` are left out at their default, so that
        runs from before them are still of this configuration."""
        unset = {key for key in self.came_later if getattr(self, key) == type(self).model_fields[key].default}
        return self.model_dump(mode="json", exclude={*exclude, *unset})


class DataConfig(Section):
    """The sets of text and how they are cut."""

    generic: str = "generic"
    """The name of the generic set; every other set is a domain."""
    sets: dict[str, list[str]] = {}
    """Sources per set: files, globs, `hf:OWNER/DATASET[@REVISION][:CONFIG][?split=SPLIT&files=PATTERN&FIELD=VALUE]`,
    `docs:<packages>`; `train=` and so on in front."""
    field: str = "text"
    """The field (column, key) that holds the text in jsonl, csv, parquet and Hugging Face sources."""
    context_length: Dimension = Field(1024, ge=2)
    """Tokens per window (section 2.3) and per training row. Paper: 1,024."""
    valid_fraction: Share = 0.02
    """Share of documents held out for validation where a source names no split. Not specified by the paper."""
    test_fraction: Share = 0.02
    """Share of documents held out for testing where a source names no split. Not specified by the paper."""
    max_document_bytes: PositiveSize = 16 << 20
    """A longer document is an error: it would take some fifty times its size in memory."""
    limit: PositiveSize | None = None
    """Stop reading a set after this many bytes of training text. Not specified by the paper."""
    drop_near_duplicates: bool = False
    """Leave training documents out that resemble an earlier or a held-out one (`prepare --drop-near-duplicates`)."""
    seed: Seed = 0
    """Seed of the order of a domain's documents, of which `--tokens` takes the first."""

    @model_validator(mode="after")
    def check_fractions(self) -> DataConfig:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("valid_fraction and test_fraction together leave no training text")
        return self


class TokenizerConfig(Section):
    """sentencepiece BPE with byte fallback, lossless, trained on the generic set."""

    path: str | None = None
    """Take the tokenizer of this model directory instead (`pretrain --init-from` sets it in a new workspace)."""
    vocab_size: Dimension = 32_000
    """Paper: 32,000."""
    sample_bytes: PositiveSize = 50_000_000
    """Bytes of generic text that the tokenizer is trained on, a seeded sample. Not specified by the paper."""
    scan_bytes: PositiveSize = 1_000_000_000
    """Bytes of generic text that the sample is drawn from. Not specified by the paper."""
    seed: Seed = 0


class ClustersConfig(Section):
    """Clusters of the generic set's windows (section 2.3), and how a domain's histogram becomes a distribution."""

    came_later = ("domain_share", "cooldown_share", "domain_passes", "tree")
    k: Clusters = 1024
    """Clusters that importance sampling uses. Paper: 1,024 (16 to 1,024 are studied)."""
    tree: list[Branches] = []
    """Branches of each level of a tree of clusters, such as [32, 32], for a k of thousands: each cluster of a level is
    split into as many. 32 and 1024 are then its levels; another k is clustered flat, and so is any without a tree."""
    encoder: str = DEFAULT_ENCODER
    """A sentence-transformers or model2vec directory, or a repository on the Hub (paper: Sentence-BERT); or `static`,
    distilled from the default encoder, or `lsi`, which needs no download: both for CPUs."""
    dims: Dimension | None = None
    """Dimensions of `static` (default 256) and `lsi` (default 64). Not specified by the paper."""
    long_windows: Literal["mean", "start"] = "mean"
    """What represents a window longer than the encoder reads: the mean over its parts, or its start."""
    points_per_centroid: PositiveSize = 256
    """k-means learns from a sample of this many windows per cluster. Not specified by the paper."""
    iterations: Rounds = 50
    """At most this many iterations of Lloyd's algorithm. Not specified by the paper."""
    tolerance: Real = Field(1e-4, ge=0)
    """Stop when the inertia falls by less than this part of itself. Not specified by the paper."""
    restarts: Rounds = 1
    """Runs from other seeds, of which the best is kept. Not specified by the paper."""
    seed: Seed = 0
    smoothing: Size = 0
    """Tokens of the generic histogram that are added to the domain's: q = (n_c + a g_c) / (n + a). Paper: 0."""
    generic_fraction: Share = 0.0
    """Share of the rows that are drawn from the generic distribution instead. Paper: 0."""
    max_passes: Multiple | None = None
    """Expect no cluster to be drawn more often than this many passes; what is over goes to the generic distribution.
    Paper: no limit."""
    domain_share: Share = 0.0
    """Share of the rows of importance sampling that are the domain's own text (`pretrain --domain-share`). Paper: 0."""
    domain_passes: Multiple = 20
    """That share is lowered where the domain's text would be read more often than this."""
    cooldown_share: Share | None = None
    """That share while the rate falls (training.cooldown). Default: domain_share."""


class ModelConfig(Section):
    """A transformer: the shape of its body. Vocabulary and context come from the tokenizer and the data."""

    family: Annotated[str, AfterValidator(known_family)] = Field(
        "gpt2", description="; ".join(f"{family.name}: {family.summary}" for family in FAMILIES.values())
    )
    num_layers: Layers = 7
    dims: Dimension = 1024
    hidden_dims: Dimension | None = None
    """Inner size of the MLP. Default: 4 * dims for gpt2 (the paper's), 8/3 * dims rounded up to 64 for the others."""
    num_heads: Dimension = 8
    num_kv_heads: Dimension | None = None
    """Heads of keys and values (not of gpt2). Default: num_heads."""
    head_dims: Dimension | None = None
    """Size of a head (llama and qwen3). Default: dims / num_heads."""
    rope_theta: RopeTheta = 10_000.0
    norm_eps: NormEps = 1e-5

    @model_validator(mode="after")
    def check_heads(self) -> ModelConfig:
        FAMILIES[self.family].check(self)
        return self


class ProjectionConfig(Section):
    """The projected network (section 2.5), SLM-pn."""

    came_later = ("soup",)
    k: Clusters = 32
    """Experts, one per cluster. Paper: 32 (16 and 64 are studied)."""
    h: DimensionOrAuto = None
    """Capacity multiplier: tensors that the experts of a matrix are combined from. Default: k, as is inferred of the
    paper."""
    m: Dimension | None = None
    """Size of an expert's vector. Default: h. Not specified by the paper."""
    layers: list[int] | None = None
    """Layers whose MLPs are projected. Default: all. Paper: inferred the middle five of seven."""
    init: Literal["anchored", "random"] = "anchored"
    """Whether all experts begin as one model or far apart. Not specified by the paper."""
    spread: Real = Field(0.02, ge=0, le=10)
    """Standard deviation of the coefficients that pull anchored experts apart. Not specified by the paper."""
    clusters_per_step: DimensionOrAuto = None
    """Groups of rows in a step, each of one cluster: training.batch_rows / clusters_per_step rows. Default (`auto`): as
    many as fit the memory and cost a tenth of the step, at best one of each row. Not specified by the paper."""
    soup: Share = 0.0
    """Share of the groups of a step that train a combination of experts on rows of all their clusters. Paper: 0."""
    tensor_rate: Multiple | None = None
    """The rate of T as a multiple of the learning rate. Default: 1 / mean sum_r |c_ir| at the start, so that experts
    move as fast as a plain matrix. Not specified by the paper."""

    @model_validator(mode="after")
    def check_layers(self) -> ProjectionConfig:
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers {self.layers}: name at least one layer, and each once")
        return self


class MixtureConfig(Section):
    """The hard mixture (section 2.2), SLM-mix: independent small models, one per cluster."""

    k: Clusters = 16
    """Experts, one per cluster. Paper: 16 (4 to 256 are studied)."""
    tokens: PositiveSize | None = None
    """Tokens that each expert trains on. Default: an equal part of the training horizon."""


RENAMED = {"checkpoint_layers": "recompute_layers"}
"""Former names of keys of `training`."""
HORIZONS = ("steps", "tokens", "passes", "hours")
"""Keys of `training` of which one is given."""


class TrainingConfig(Section):
    """Pretraining. Exactly one of steps, tokens, passes and hours is the horizon."""

    came_later = ("cooldown", "gradient_dtype")
    steps: Steps | None = None
    tokens: PositiveSize | None = None
    passes: Multiple | None = None
    """Passes over the set."""
    hours: Hours | None = None
    """Hours on this machine, turned into tokens once by a one-minute calibration and recorded."""
    learning_rate: Rate = 1e-4
    """Paper: 1e-4."""
    warmup_steps: Size = 1000
    """Linear warm-up. Paper: 1,000."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up. Not specified by the paper; cosine falls to a tenth of the rate at the horizon."""
    cooldown: Share = 0.0
    """Last part of the horizon, in which a constant rate falls linearly to zero. Not in the paper."""
    clip_norm: Real = Field(5.0, gt=0)
    """Clip by global norm. Paper: 5.0."""
    weight_decay: Real = Field(0.0, ge=0, le=100)
    """Decoupled, on matrices only. Not specified by the paper (Adam: 0)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Not specified by the paper (Adam's own)."""
    eps: Real = Field(1e-8, ge=0, le=1)
    """Not specified by the paper (Adam's own)."""
    batch_rows: Dimension = 56
    """Rows of context_length tokens per step. Inferred from the paper: 57k tokens a step."""
    micro_rows: Dimension | None = None
    """Rows per forward and backward; the step accumulates gradients. Default: as many as fit the memory."""
    recompute_layers: bool | None = None
    """Recompute each layer in the backward pass: less memory, a fifth more time. Default: where a step would not fit
    the memory otherwise."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which several ranks send each other their gradients."""
    report_every: PositiveSize = 10
    """Steps between lines."""
    eval_every: PositiveSize = 500
    """Steps between evaluations on fixed validation rows."""
    eval_tokens: PositiveSize = 200_000
    """Tokens of the validation set that are read at each evaluation."""
    checkpoint_every: PositiveSize = 500
    """Steps between checkpoints."""
    checkpoint_minutes: Multiple = 10
    """Save at least so often, in both stages: a GPU's watchdog ends a process without a chance to save."""
    milestones: list[PositiveSize] = []
    """Tokens after which a checkpoint is kept for good: `specialize --from RUN@5M` starts from it."""
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def read_former_keys(cls, given: Any) -> Any:
        """Configurations that were written before a key was renamed hold."""
        former = {key: now for key, now in RENAMED.items() if isinstance(given, dict) and key in given}
        for key, now in former.items():
            if now in given:
                raise ValueError(f"{key} is the former name of {now}: give one of them")
        return {former.get(key, key): value for key, value in given.items()} if former else given

    @model_validator(mode="after")
    def check_horizon(self) -> TrainingConfig:
        given = [name for name in HORIZONS if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of steps, tokens, passes and hours ({named} given)")
        if self.cooldown and self.schedule != "constant":
            raise ValueError(f"cooldown is for schedule constant, and {self.schedule} falls by itself: set one of them")
        return _check_rows(self)


def _check_rows(section):
    if section.micro_rows and section.batch_rows % section.micro_rows:
        raise ValueError(f"batch_rows {section.batch_rows} is not a multiple of micro_rows {section.micro_rows}")
    return section


class Recipe(Section):
    """A fine-tuning recipe of the paper (section 3), taken for domain sets of up to `tokens`."""

    tokens: PositiveSize
    rate: Multiple
    """The learning rate as a multiple of the pretraining rate."""
    steps: Steps
    """At most this many steps."""


class FinetuningConfig(Section):
    """Specialisation: a first try at a constant rate finds out how many steps the domain's text is worth, a second one
    from the start lets the rate fall to zero within about this many; the best evaluation of all is kept."""

    came_later = ("replay",)
    recipes: list[Recipe] = Field(
        [
            Recipe(tokens=1_000_000, rate=1 / 3, steps=2000),
            Recipe(tokens=8_000_000, rate=1.0, steps=4000),
            Recipe(tokens=64_000_000, rate=1.0, steps=30_000),
        ],
        min_length=1,
    )
    """Paper: 1M, 8M, 64M tokens. The first that is large enough is taken, the last for larger sets."""
    learning_rate: Rate | None = None
    """Set by hand, it replaces the recipe's."""
    published_rate: Rate = 1e-4
    """That of a published model (`specialize --from DIRECTORY` or a name of the Hub). Not specified by the paper; 3e-5
    did worse on one of 135M parameters in equal time."""
    max_steps: Steps | None = None
    """Set by hand, it replaces the recipe's. Both tries together."""
    warmup_steps: Size = 20
    """Not specified by the paper."""
    batch_rows: Dimension = 8
    """Inferred from the paper: about 8 windows a step."""
    micro_rows: Dimension | None = None
    evaluations_per_pass: PositiveSize = 2
    """Evaluations on the validation set in each pass over the domain set, fewer where they would read more tokens than
    the steps between them. Not specified by the paper."""
    eval_tokens: PositiveSize = 200_000
    patience: Multiple = 2
    """Passes over the domain set without a gain that end the first try. Not specified by the paper."""
    again: Multiple = 1
    """Steps of the second try, as a multiple of those of the first. Not specified by the paper."""
    replay: Share = 0.0
    """Share of the rows that are generic ones, resampled to the domain: it needs the generic set, and clusters. Not in
    the paper."""
    select_tokens: PositiveSize = 50_000
    """Tokens of the domain set on which `--select pretrained` scores every expert. Not specified by the paper."""
    seed: Seed = 0

    @model_validator(mode="after")
    def check_rows(self) -> FinetuningConfig:
        return _check_rows(self)


class LoraConfig(Section):
    """LoRA (appendix F): `specialize --lora RANK` trains adapters of the query and value projections alone."""

    scale: Multiple = 2.0
    """What the adapters add is multiplied by it. Not specified by the paper."""
    rate: Multiple = 3.0
    """The learning rate as a multiple of fine-tuning's. Not specified by the paper; 10 and 30 did worse in a sweep."""


class DistillationConfig(Section):
    """Distillation (SLM-d): `specialize --teacher RUN` minimises a * cross-entropy + (1 - a) * tau^2 * KL."""

    a: Real = Field(0.5, ge=0, le=1)
    """Weight of the next token against the teacher's distribution. Not specified by the paper."""
    tau: Real = Field(2.0, ge=0.01, le=1000)
    """Temperature of both distributions. Not specified by the paper; the best of a small sweep over both."""


DECIDED = {f"training.{key}" for key in ("seed", "milestones", *HORIZONS)} | {
    *("finetuning.seed", "clusters.k", "projection.k", "mixture.k", "mixture.tokens")
}
"""What the lists of a grid stand for."""


class Grid(Section):
    """Every combination of these lists is a cell of a study: one fine-tuned model."""

    methods: list[str] = Field(min_length=1)
    """Names of methods, such as slm, is and pn; an unknown one is refused with those that there are."""
    budgets: list[PositiveSize] = Field([1_000_000], min_length=1)
    """Pretraining tokens: milestones of one run, not many runs. Mixtures are trained for the largest alone."""
    domains: list[str] = Field(min_length=1)
    domain_tokens: list[PositiveSize] = Field([64_000], min_length=1)
    seeds: list[Seed] = Field([0], min_length=1)
    """Of initialisation and order of rows, in both stages."""
    clusters: list[Clusters] = []
    """Numbers of clusters for the methods is, pn (and h, where it is not set) and mix. Default: those of their
    sections."""
    selects: list[Literal["frequent", "pretrained", "finetuned", "histogram"]] = Field(["frequent"], min_length=1)
    """How experts are chosen; `histogram` is left out for mixtures."""
    teacher_budget: PositiveSize | None = None
    """Pretraining tokens of the teacher of SLM-d. Default: those of the student."""
    shared_budget: PositiveSize | None = None
    """Pretraining tokens of the small model that SLM-cis goes on from, one for all domains. Default: its own budget."""
    variant: str | None = None
    """What cells with `settings` are called."""
    settings: dict[str, Any] = {}
    """Settings of these cells in place of the study's, such as `clusters.domain_share: 0.1`: single values, of what the
    grid itself does not decide."""

    @model_validator(mode="after")
    def check_variant(self) -> Grid:
        if bool(self.variant) != bool(self.settings):
            raise ValueError("a grid with settings needs a variant, which names them, and a variant settings")
        for key, value in self.settings.items():
            if key in DECIDED or key.partition(".")[0] in ("data", "tokenizer", "study"):
                raise ValueError(
                    f"settings: {key} is no setting of a variant: the grid and the study decide it for all"
                )
            if not isinstance(value, bool | int | float | str):
                raise ValueError(f"settings: {key} is {value!r}: give a single value")
        return self


class StudyConfig(Section):
    """`mlx-slm study`: all cells of all grids, each once."""

    grids: list[Grid] = []
    lora_rank: PositiveSize = 64
    """Paper: 64."""
    test_tokens: PositiveSize | None = None
    """Score on this many tokens of a domain's test split. Default: all."""


class Config(Section):
    """A whole workspace."""

    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    clusters: ClustersConfig = ClustersConfig()
    model: ModelConfig = ModelConfig()
    """The small model (SLM)."""
    large: ModelConfig = ModelConfig(num_layers=7, dims=2816, num_heads=22)
    """The large model (LLM) of the same tokenizer."""
    projection: ProjectionConfig = ProjectionConfig()
    """The projected network (SLM-pn) around the small model."""
    mixture: MixtureConfig = MixtureConfig()
    """The hard mixture (SLM-mix) of small models."""
    training: TrainingConfig = TrainingConfig(hours=8)
    finetuning: FinetuningConfig = FinetuningConfig()
    lora: LoraConfig = LoraConfig()
    distillation: DistillationConfig = DistillationConfig()
    study: StudyConfig = StudyConfig()

    def all_recorded(self, exclude: Collection[str] = ()) -> dict:
        """`recorded` of each section."""
        return {name: getattr(self, name).recorded() for name in Config.model_fields if name not in exclude}
