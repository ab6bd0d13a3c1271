"""Plan early: budgets in, the recommended method out, with what every method costs on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import mlx.core as mx

from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError, nearest
from mlx_slm.machine import runtime
from mlx_slm.methods.costs import METHODS, PAPER_PERPLEXITY, SIZES, Cost, Rates, costs_of_budgets, recommend
from mlx_slm.models.lora import Lora
from mlx_slm.models.projected import ProjectedShape
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.pretraining.pretrain import calibrated_speed
from mlx_slm.report import Report
from mlx_slm.specialization.finetune import choose_recipe
from mlx_slm.storage.records import read_json_lines
from mlx_slm.storage.workspace import EVALUATIONS, Workspace
from mlx_slm.training.projected_step import network_bytes, resolved
from mlx_slm.training.runs import find_run
from mlx_slm.training.step import training_bytes

SAMPLING_SHARE = 130 / 650
"""What a domain's SLM-is gets of the hours of a generic pretraining, where it is not said: as in Table 3."""
CALIBRATION_SECONDS = 20
LORA_RANK = 64


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


def make_plan(
    workspace: Workspace, config: Config, budgets: Budgets, report: Report, domain: str | None = None
) -> dict:
    """The recommendation and a row per method: `{"recommended", "reason", "methods": [...]}` (DESIGN, "The commands").

    `domain`: the set whose recorded perplexities are shown. Raises SlmError if no method fits.
    """
    if domain and domain not in workspace.sets():
        raise SlmError(f"--domain {domain}: no such set is prepared{nearest(domain, workspace.sets())}")
    vocab, context = config.tokenizer.vocab_size, config.data.context_length
    small, large = (Shape.of(section, vocab, context) for section in (config.model, config.large))
    network = ProjectedShape.of(config.projection, small)
    config = config.model_copy(update={"projection": resolved(config.projection, config.training, network)})
    rates, sources = _rates(workspace, config, small, large, network, report)
    sampling = budgets.sampling_hours or SAMPLING_SHARE * budgets.generic_hours
    limit = _most_tokens(config, budgets.domain_tokens)
    costs = costs_of_budgets(
        rates,
        budgets.generic_hours,
        sampling,
        budgets.domain_tokens,
        limit,
        config.finetuning.patience,
        config.finetuning.again,
    )
    tokens = _pretraining_tokens(rates, budgets.generic_hours, sampling)
    memory = _memory(config, small, large, network)
    allowed = _largest_allowed(budgets, small, large, report)
    shapes = {name: large if name in ("llm", "lora") else small for name in METHODS}
    against = {name: _against(shapes[name], costs[name], memory[name], allowed, budgets) for name in METHODS}
    against = {name: reason for name, reason in against.items() if reason}
    method, reason = recommend(costs, budgets.domains, against)
    rows = [
        {
            "method": name,
            "pretraining_tokens": tokens.get(name),
            "generic_hours": costs[name].generic,
            "specialization_hours": costs[name].specialization,
            "total_hours": costs[name].total(budgets.domains),
            "inference_parameters": shapes[name].num_parameters,
            "memory_gb": memory[name] / 2**30,
            "fits": name not in against,
            "against": against.get(name),
            **_perplexity(workspace, name, domain, budgets),
        }
        for name in METHODS
    ]
    return {
        "recommended": method,
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


def _pretraining_tokens(rates: Rates, generic_hours: float, sampling_hours: float) -> dict[str, int]:
    """Tokens that each method is pretrained on in its hours; SLM-d divides its own between student and teacher."""
    of_method = {"slm": rates.slm, "mix": rates.slm, "pn": rates.pn, "llm": rates.llm, "lora": rates.llm}
    found = {name: int(generic_hours / rate) for name, rate in of_method.items()}
    return found | {"is": int(sampling_hours / rates.slm)}


def _most_tokens(config: Config, domain_tokens: int) -> float:
    """Tokens that one fine-tuning processes at the most: the steps of its recipe."""
    steps = config.finetuning.max_steps or choose_recipe(config.finetuning, domain_tokens, False).steps
    return steps * config.finetuning.batch_rows * config.data.context_length


def _memory(config: Config, small: Shape, large: Shape, network: ProjectedShape) -> dict[str, float]:
    """Bytes that training takes at the least, one row (SLM-pn: one group) at a time."""
    training, groups = config.training, config.projection.clusters_per_step
    again = training.checkpoint_layers is not False
    one, two = (training_bytes(shape, 1, again) for shape in (small, large))
    rows = max(1, training.batch_rows // groups)
    spared = Lora(large, min(LORA_RANK, large.dims), 1.0).bytes_spared
    return {
        **dict.fromkeys(("slm", "nopt", "is", "mix"), one),
        "pn": network_bytes(network, groups, rows, 1, again),
        "d": max(two, one + 4 * large.num_parameters),
        "llm": two,
        "lora": two - spared,
    }


def _rates(
    workspace: Workspace, config: Config, small: Shape, large: Shape, network: ProjectedShape, report: Report
) -> tuple[Rates, dict[str, str]]:
    """(rates, where each comes from): recorded runs of the same shape on this device, a calibration, or FLOPs."""
    group = config.training.batch_rows * config.data.context_length / config.projection.clusters_per_step
    flops = {
        "slm": small.flops_per_token,
        "pn": network.flops_per_token(group),
        "llm": large.flops_per_token,
        "lora": Lora(large, min(LORA_RANK, large.dims), 1.0).flops_per_token,
        "llm_forward": large.forward_flops_per_token,
    }
    recorded = _recorded_speeds(workspace, {"slm": small, "pn": small, "llm": large}, config)
    sources = {name: f"run {run}" for name, (run, _) in recorded.items()}
    if "slm" not in recorded:
        report.line(f"measuring this machine's speed on the small model (about {CALIBRATION_SECONDS} s)")
        speed = calibrated_speed(small, config.training, CALIBRATION_SECONDS)
        recorded["slm"] = ("", speed)
        sources["slm"] = f"measured now, {speed:,.0f} tokens/s"
    found = Rates.from_flops(recorded["slm"][1], flops)
    hours = {name: getattr(found, name) for name in flops}
    if "llm" in recorded:
        scale = 1 / (3600 * recorded["llm"][1]) / hours["llm"]
        hours |= {name: scale * hours[name] for name in ("llm", "lora", "llm_forward")}
    if "pn" in recorded:
        hours["pn"] = 1 / (3600 * recorded["pn"][1])
    for name in hours:
        sources.setdefault(name, f"by FLOPs from {'llm' if name in ('lora', 'llm_forward') else 'slm'}")
    return Rates(**hours), sources


def _recorded_speeds(workspace: Workspace, shapes: dict[str, Shape], config: Config) -> dict[str, tuple[str, float]]:
    """(run, tokens per second) of the newest finished pretraining of each method with this shape on this device."""
    projection = config.projection.model_dump(mode="json")
    found: dict[str, tuple[float, str, float]] = {}
    for name in workspace.runs():
        run = find_run(workspace, name)
        method, record = run.record["method"], run.record
        fits = method in shapes and run.finished and "from" not in record["inputs"] and record["seconds"] > 60
        same = fits and record["device"] == runtime.device_name()
        same = same and record["inputs"].get("projection", projection) == projection
        if same and _body(run.shape) == _body(shapes[method]) and record["started"] > found.get(method, (0.0,))[0]:
            positions = record["step"] * record["inputs"]["training"]["batch_rows"] * run.shape.context_length
            found[method] = (record["started"], name, positions / record["seconds"])
    return {method: (name, speed) for method, (_, name, speed) in found.items()}


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


def _perplexity(workspace: Workspace, method: str, domain: str | None, budgets: Budgets) -> dict:
    """`{"perplexity", "source", "perplexity_tokens"}`: the best recorded on the domain's test set after specialising on
    so many of its tokens, else the paper's average of nine domains at the nearest of its sizes."""
    recorded = _recorded_perplexities(workspace, method, domain, budgets.domain_tokens) if domain else []
    if recorded:
        return {"perplexity": min(recorded), "source": "run", "perplexity_tokens": budgets.domain_tokens}
    if method not in PAPER_PERPLEXITY:
        return {"perplexity": None, "source": None, "perplexity_tokens": None}
    near, size = min(enumerate(SIZES), key=lambda one: abs(math.log(budgets.domain_tokens / one[1])))
    return {"perplexity": PAPER_PERPLEXITY[method][near], "source": "paper", "perplexity_tokens": size}


def _recorded_perplexities(workspace: Workspace, method: str, domain: str, tokens: int) -> list[float]:
    """The newest perplexity of each run of a method that was specialised to the domain on so many tokens."""
    found = {}
    for row in read_json_lines(workspace.results / EVALUATIONS, keys=("set", "split", "model", "perplexity")):
        if row["set"] == domain and row["split"] == "test" and row["model"] in workspace.runs():
            record = find_run(workspace, row["model"]).record
            inputs = record["inputs"]
            if record["method"] == method and (inputs.get("domain"), inputs.get("tokens")) == (domain, tokens):
                found[row["model"]] = row["perplexity"]
    return list(found.values())
