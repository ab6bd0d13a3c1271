"""Plan early: budgets in, the recommended method out, with what every method costs on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import mlx.core as mx

from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError, nearest
from mlx_slm.finetuning.finetune import choose_recipe
from mlx_slm.machine import runtime
from mlx_slm.methods import METHODS, Method
from mlx_slm.methods.base import Models
from mlx_slm.methods.costs import OF_LARGE, READING, SIZES, Cost, Rates, Spending
from mlx_slm.methods.lora import LowRank, adapters_of
from mlx_slm.methods.plain import Large, Small
from mlx_slm.methods.projected import ProjectedNetwork
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.planning.recommend import recommend
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.stages.setup import calibrated_speed
from mlx_slm.storage.records import read_json_lines
from mlx_slm.storage.workspace import EVALUATIONS, Workspace
from mlx_slm.training.find import find_run

SAMPLING_SHARE = 130 / 650
"""What a domain's SLM-is gets of the hours of a generic pretraining, where it is not said: as in Table 3."""
CALIBRATION_SECONDS = 20


@dataclass(frozen=True)
class Budgets:
    """What a user has. Hours are of this machine."""

    generic_hours: float
    domains: int = 1
    domain_tokens: int = 1_000_000
    specialization_hours: float | None = None
    """Per domain; None: no limit."""
    sampling_hours: float | None = None
    """Of them, for pretraining an SLM-is; None: a fifth of the generic hours."""
    inference_parameters: int | None = None
    """The largest model that may be run; None: the small one."""
    inference_speed: float | None = None
    """Tokens per second that the model must write on this machine."""


def make_plan(project: Project, budgets: Budgets, domain: str | None = None) -> dict:
    """The recommendation and a row per method: `{"recommended", "reason", "methods": [...]}`.

    `domain`: the set whose recorded perplexities are shown. Raises SlmError if no method fits.
    """
    workspace, report = project.workspace, project.report
    if domain and domain not in workspace.sets():
        raise SlmError(f"--domain {domain}: no such set is prepared{nearest(domain, workspace.sets())}")
    models = Models.of(project.config)
    config = models.config
    rates, sources = _rates(workspace, models, report)
    spending = Spending(
        rates,
        budgets.generic_hours,
        budgets.sampling_hours or SAMPLING_SHARE * budgets.generic_hours,
        budgets.domain_tokens,
        _most_tokens(config, budgets.domain_tokens),
        config.finetuning.patience,
        config.finetuning.again,
    )
    costs = {method.name: method.cost(spending) for method in METHODS}
    memory = {method.name: method.memory(models) for method in METHODS}
    allowed = _largest_allowed(budgets, models.small, models.large, report)
    shapes = {method.name: method.shape(models) for method in METHODS}
    against = {
        name: reason
        for name in costs
        if (reason := _against(shapes[name], costs[name], memory[name], allowed, budgets))
    }
    chosen, reason = recommend(costs, budgets.domains, against)
    rows = [
        {
            "method": method.name,
            "pretraining_tokens": method.pretraining_tokens(spending),
            "generic_hours": costs[method.name].generic,
            "specialization_hours": costs[method.name].specialization,
            "total_hours": costs[method.name].total(budgets.domains),
            "inference_parameters": shapes[method.name].num_parameters,
            "memory_gb": memory[method.name] / 2**30,
            "fits": method.name not in against,
            "against": against.get(method.name),
            **_perplexity(workspace, method, domain, budgets),
        }
        for method in METHODS
    ]
    return {
        "recommended": chosen,
        "reason": reason,
        "domains": budgets.domains,
        "device": runtime.device_name(),
        "rates": {name: getattr(rates, name) * 1e9 for name in sources},
        "rates_from": sources,
        "methods": rows,
    }


def _against(shape: Shape, cost: Cost, memory: float, allowed: float, budgets: Budgets) -> str | None:
    """Why a method cannot be taken; None if it can."""
    if shape.num_parameters > allowed:
        return f"it has {shape.num_parameters:,} parameters, the inference budget admits {allowed:,.0f}"
    have = 0.8 * runtime.memory_bytes()
    if memory > have:
        return f"training it needs {memory / 2**30:.1f} GB, {have / 2**30:.1f} can be used"
    limit = budgets.specialization_hours
    if limit is not None and cost.specialization > limit:
        return f"it takes {cost.specialization:.3g} hours a domain, {limit:.3g} are given"
    return None


def _most_tokens(config: Config, domain_tokens: int) -> float:
    """Tokens that one fine-tuning processes at the most: the steps of its recipe."""
    steps = config.finetuning.max_steps or choose_recipe(config.finetuning, domain_tokens, False).steps
    return steps * config.finetuning.batch_rows * config.data.context_length


def _rates(workspace: Workspace, models: Models, report: Report) -> tuple[Rates, dict[str, str]]:
    """(rates, where each comes from): recorded runs of the same shape on this device, a calibration, or FLOPs."""
    small, large = Small.name, Large.name
    flops = rated_flops(models)
    recorded = _recorded_speeds(workspace, models)
    sources = {name: f"run {run}" for name, (run, _) in recorded.items()}
    if small not in recorded:
        report.line(f"measuring this machine's speed on the small model (about {CALIBRATION_SECONDS} s)")
        speed = calibrated_speed(models.small, models.config.training, CALIBRATION_SECONDS)
        recorded[small] = ("", speed)
        sources[small] = f"measured now, {speed:,.0f} tokens/s"
    for name in flops:
        sources.setdefault(name, f"by FLOPs from {large if name in OF_LARGE and name != large else small}")
    return Rates.from_speeds({name: speed for name, (_, speed) in recorded.items()}, flops), sources


def rated_flops(models: Models) -> dict[str, float]:
    """Training FLOPs of a token, by the names of `Rates`."""
    flops = {method.name: method.flops_per_token(models) for method in (Small(), ProjectedNetwork(), Large())}
    flops[LowRank.name] = adapters_of(models.large).flops_per_token
    return flops | {READING: models.large.forward_flops_per_token}


def _recorded_speeds(workspace: Workspace, models: Models) -> dict[str, tuple[str, float]]:
    """(run, tokens per second) of the newest finished pretraining of each method with this shape on this device."""
    shapes = {method.name: method.shape(models) for method in (Small(), ProjectedNetwork(), Large())}
    projection = models.config.projection.recorded()
    newest: dict[str, tuple[float, str, float]] = {}
    for name in workspace.runs():
        run = find_run(workspace, name)
        method, record = run.record["method"], run.record
        fits = method in shapes and run.finished and "from" not in record["inputs"] and record["seconds"] > 60
        same = fits and record["device"] == runtime.device_name()
        same = same and record["inputs"].get("projection", projection) == projection
        if same and _body(run.shape) == _body(shapes[method]) and record["started"] > newest.get(method, (0.0,))[0]:
            positions = record["step"] * record["inputs"]["training"]["batch_rows"] * run.shape.context_length
            newest[method] = (record["started"], name, positions / record["seconds"])
    return {method: (name, speed) for method, (_, name, speed) in newest.items()}


def _body(shape: Shape) -> dict:
    """What decides a model's speed; a tokenizer may have come out a few pieces smaller than configured."""
    return {key: value for key, value in shape.to_dict().items() if key != "vocab_size"}


def _largest_allowed(budgets: Budgets, small: Shape, large: Shape, report: Report) -> float:
    """Parameters that the inference budget admits: by default those of the small model. Raises SlmError for too much
    speed."""
    if budgets.inference_parameters:
        return budgets.inference_parameters
    if not budgets.inference_speed:
        return small.num_parameters
    report.line("measuring how fast this machine writes with the large and with the small model")
    for shape in (large, small):
        speed = decoding_speed(shape)
        if speed >= budgets.inference_speed:
            return shape.num_parameters
    raise SlmError(
        f"--inference-speed {budgets.inference_speed:g}: the small model writes {speed:.0f} tokens/s on this machine: "
        "choose a smaller one (section `model`)"
    )


def decoding_speed(shape: Shape, tokens: int = 8) -> float:
    """Tokens per second of a model of this shape that writes one token after the other, from an empty context."""
    runtime.configure_device()
    model = Transformer(shape)
    model.update(initialise(shape, 0))
    step = mx.compile(lambda token: model.logits(token)[:, -1].argmax(axis=-1, keepdims=True), inputs=[model.state])
    token = step(mx.zeros((1, 1), mx.int32))
    mx.eval(token)
    begun = time.perf_counter()
    for _ in range(tokens):
        token = step(token)
        mx.eval(token)
    seconds = time.perf_counter() - begun
    runtime.release_cache()
    return tokens / seconds


def _perplexity(workspace: Workspace, method: Method, domain: str | None, budgets: Budgets) -> dict:
    """`{"perplexity", "source", "perplexity_tokens"}`: the best recorded on the domain's test set after specialising on
    that many of its tokens, else the paper's average of nine domains at the nearest of its sizes."""
    recorded = _recorded_perplexities(workspace, method.name, domain, budgets.domain_tokens) if domain else []
    if recorded:
        return {"perplexity": min(recorded), "source": "run", "perplexity_tokens": budgets.domain_tokens}
    if method.paper_perplexity is None:
        return {"perplexity": None, "source": None, "perplexity_tokens": None}
    near, size = min(enumerate(SIZES), key=lambda one: abs(math.log(budgets.domain_tokens / one[1])))
    return {"perplexity": method.paper_perplexity[near], "source": "paper", "perplexity_tokens": size}


def _recorded_perplexities(workspace: Workspace, method: str, domain: str, tokens: int) -> list[float]:
    """The newest perplexity of each run of a method that was specialised to the domain on this many tokens."""
    perplexities = {}
    for row in read_json_lines(workspace.results / EVALUATIONS, keys=("set", "split", "model", "perplexity")):
        if row["set"] == domain and row["split"] == "test" and row["model"] in workspace.runs():
            record = find_run(workspace, row["model"]).record
            inputs = record["inputs"]
            if record["method"] == method and (inputs.get("domain"), inputs.get("tokens")) == (domain, tokens):
                perplexities[row["model"]] = row["perplexity"]
    return list(perplexities.values())
