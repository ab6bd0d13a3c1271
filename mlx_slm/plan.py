"""Plan early: budgets in, the recommended method out, with what every method costs on this machine."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import mlx.core as mx

from mlx_slm import runtime
from mlx_slm.config import Config
from mlx_slm.costs import METHODS, PAPER_PASSES, PAPER_PERPLEXITY, Cost, Rates, costs_of_budgets, recommend
from mlx_slm.errors import SlmError
from mlx_slm.models.lora import Lora
from mlx_slm.models.projected import ProjectedShape
from mlx_slm.models.transformer import Shape, Transformer, initialise
from mlx_slm.report import Report
from mlx_slm.training.projected_step import network_bytes
from mlx_slm.training.runs import find_run
from mlx_slm.training.step import measure_speed, training_bytes
from mlx_slm.workspace import MANIFEST, Workspace, read_json

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

    `domain`: the set whose recorded perplexities are shown. Raises SlmError if not even the small model fits.
    """
    vocab, context = config.tokenizer.vocab_size, config.data.context_length
    small, large = (Shape.of(section, vocab, context) for section in (config.model, config.large))
    network = ProjectedShape.of(config.projection, small)
    rates, sources = _rates(workspace, config, small, large, network, report)
    sampling = budgets.sampling_hours or SAMPLING_SHARE * budgets.generic_hours
    costs = costs_of_budgets(rates, budgets.generic_hours, sampling, budgets.domain_tokens)
    memory = _memory(config, small, large, network)
    have = 0.8 * runtime.memory_bytes()
    allowed = _largest_allowed(budgets, small, large, report)
    if small.num_parameters > allowed:
        raise SlmError(
            f"the small model has {small.num_parameters:,} parameters, the inference budget admits {allowed:,.0f}: "
            "choose a smaller one in the section model"
        )
    method, reason = recommend(
        costs,
        budgets.domains,
        large.num_parameters <= allowed and memory["llm"] <= have,
        budgets.specialization_hours,
        memory["pn"] <= have,
    )
    limit = budgets.specialization_hours or float("inf")
    rows = []
    for name in METHODS:
        shape = large if name in ("llm", "lora") else small
        fits = memory[name] <= have and shape.num_parameters <= allowed and costs[name].specialization <= limit
        rows.append(
            _row(name, costs[name], budgets, shape, memory[name], fits, _perplexity(workspace, name, domain, budgets))
        )
    return {
        "recommended": method,
        "reason": reason,
        "domains": budgets.domains,
        "device": runtime.device_name(),
        "rates": {name: getattr(rates, name) * 1e9 for name in sources},
        "rates_from": sources,
        "methods": rows,
    }


def _row(name: str, cost: Cost, budgets: Budgets, shape: Shape, memory: float, fits: bool, perplexity: tuple) -> dict:
    return {
        "method": name,
        "generic_hours": cost.generic,
        "specialization_hours": cost.specialization,
        "total_hours": cost.total(budgets.domains),
        "inference_parameters": shape.num_parameters,
        "memory_gb": memory / 2**30,
        "fits": fits,
        "perplexity": perplexity[0],
        "source": perplexity[1],
    }


def _memory(config: Config, small: Shape, large: Shape, network: ProjectedShape) -> dict[str, float]:
    """Bytes that training takes at the least, one row (SLM-pn: one group) at a time."""
    training, groups = config.training, config.projection.clusters_per_step
    one, two = (training_bytes(shape, 1, training.checkpoint_layers) for shape in (small, large))
    rows = max(1, training.batch_rows // groups)
    adapters = Lora(large, min(LORA_RANK, large.dims), 1.0).num_parameters
    return {
        **dict.fromkeys(("slm", "nopt", "is", "mix"), one),
        "pn": network_bytes(network, groups, rows, 1, training.checkpoint_layers),
        "d": max(two, one + 4 * large.num_parameters),
        "llm": two,
        "lora": two - 4 * 6 * large.num_parameters + 4 * 6 * adapters,
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
    recorded = _recorded_speeds(workspace, {"slm": small, "pn": small, "llm": large})
    sources = {name: f"run {run}" for name, (run, _) in recorded.items()}
    if "slm" not in recorded:
        report.line(f"measuring this machine's speed on the small model (about {CALIBRATION_SECONDS} s)")
        speed = measure_speed(small, len(runtime.lanes()), CALIBRATION_SECONDS)
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


def _recorded_speeds(workspace: Workspace, shapes: dict[str, Shape]) -> dict[str, tuple[str, float]]:
    """(run, tokens per second) of the newest finished pretraining of each method with this shape on this device."""
    found: dict[str, tuple[float, str, float]] = {}
    for name in workspace.runs():
        run = find_run(workspace, name)
        method, record = run.record["method"], run.record
        fits = method in shapes and run.finished and "from" not in record["inputs"] and record["seconds"] > 60
        same = fits and record["device"] == runtime.device_name()
        if same and _body(run.shape) == _body(shapes[method]) and record["started"] > found.get(method, (0.0,))[0]:
            positions = record["step"] * record["inputs"]["training"]["batch_rows"] * run.shape.context_length
            found[method] = (record["started"], name, positions / record["seconds"])
    return {method: (name, speed) for method, (_, name, speed) in found.items()}


def _body(shape: Shape) -> dict:
    """What decides a model's speed; a tokenizer may have come out a few pieces smaller than configured."""
    return {key: value for key, value in shape.to_dict().items() if key != "vocab_size"}


def _largest_allowed(budgets: Budgets, small: Shape, large: Shape, report: Report) -> float:
    """Parameters that the inference budget admits: by default those of the small model."""
    if budgets.inference_parameters:
        return budgets.inference_parameters
    if not budgets.inference_speed:
        return small.num_parameters
    report.line("measuring how fast this machine writes with the large and with the small model")
    for shape in (large, small):
        if decoding_speed(shape) >= budgets.inference_speed:
            return shape.num_parameters
    return 0


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
    return tokens / (time.perf_counter() - begun)


def _perplexity(workspace: Workspace, method: str, domain: str | None, budgets: Budgets) -> tuple[float | None, str]:
    """(perplexity, source): the best recorded on the domain's test set, else the paper's average of nine domains."""
    recorded = _recorded_perplexities(workspace, method, domain) if domain else []
    if recorded:
        return min(recorded), "run"
    sizes = sorted(PAPER_PASSES)
    column = next((i for i, size in enumerate(sizes) if budgets.domain_tokens <= size), len(sizes) - 1)
    found = PAPER_PERPLEXITY.get(method)
    return (found[column] if found else None), "paper"


def _recorded_perplexities(workspace: Workspace, method: str, domain: str) -> list[float]:
    file, found = workspace.results / "evaluations.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        path = workspace.model(row["model"]) / MANIFEST if row["model"] in workspace.models() else None
        if path and row["set"] == domain and row["split"] == "test" and read_json(path)["inputs"]["method"] == method:
            found.append(row["perplexity"])
    return found
