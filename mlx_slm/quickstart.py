"""The whole path on the built-in corpus: docstrings -> tokenizer -> model -> specialised model -> answer.

The generic set is the docstrings of all packages, the domain those of one. A document falls into the same split of
both sets, so no model is trained on what it is tested on. Every line of the table is a method at one stage: none
(random weights), pretrained, specialised. All methods pretrain on the same number of tokens.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

from mlx_slm.clustering.target import SamplingTarget
from mlx_slm.config.schema import Config
from mlx_slm.errors import SlmError
from mlx_slm.evaluation.evaluate import evaluate
from mlx_slm.experts.experts import FREQUENT, HISTOGRAM
from mlx_slm.export.generate import Sampling, stream
from mlx_slm.export.model import export_model
from mlx_slm.machine import runtime
from mlx_slm.methods.importance import ImportanceSampling
from mlx_slm.methods.plain import Small
from mlx_slm.methods.projected import ProjectedNetwork
from mlx_slm.methods.requests import Pretraining, Specialisation
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.project import Project
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.stages.specialize import specialize
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import open_tokenizer
from mlx_slm.text.prepare import ensure_set
from mlx_slm.training.runs import Run

PROMPT = "Return the number of bytes written to the file.\n\n"
DOMAIN_TOKENS = 30_000
SMALL, SAMPLED, NETWORK = Small.name, ImportanceSampling.name, ProjectedNetwork.name


def run_quickstart(project: Project, fresh: bool = False) -> dict:
    """Run every stage that is not done; returns `{"seconds", "device", "domain", "results", "model", "sample"}`."""
    started = time.perf_counter()
    workspace, config, report = project.workspace, project.config, project.report
    generic = config.data.generic
    domain = next((name for name in config.data.sets if name != generic), None)
    if domain is None:
        raise SlmError(f"the quickstart needs a configuration that names {generic!r} and one domain in data.sets")
    if fresh:
        for made in ("tokenizer", "data", "encoder", "embeddings", "clusters"):
            shutil.rmtree(workspace.root / made, ignore_errors=True)
    report.line(f"1. text: docstrings of the installed packages; the domain is {domain}")
    for name in (generic, domain):
        ensure_set(project, name)
    report.line("2. pretraining a small model on the generic set")
    base = pretrain(project, Pretraining(SMALL, fresh=fresh))
    report.line(f"3. specialising it to {domain}")
    asked = Specialisation(domain, tokens=DOMAIN_TOKENS, fresh=fresh)
    tuned = specialize(project, asked)
    report.line(f"4. SLM-is: pretraining on the generic set resampled to look like {domain}, then specialising")
    sampled = pretrain(project, Pretraining(SAMPLED, fresh=fresh, target=SamplingTarget(domain, DOMAIN_TOKENS)))
    tuned_sampled = specialize(project, replace(asked, source=sampled.name))
    report.line(f"5. SLM-pn: pretraining {config.projection.k} experts at once, then specialising one")
    network = pretrain(project, Pretraining(NETWORK, fresh=fresh))
    tuned_expert = specialize(project, replace(asked, source=network.name, select=HISTOGRAM))
    report.line(f"6. perplexity of {domain} text that no model has seen")
    untrained = export_untrained(workspace, config)
    stages = [
        (SMALL, "none", None, untrained, 0, 0.0),
        (SMALL, "pretrained", None, *_outcome(base)),
        (SMALL, "specialized", None, *_outcome(tuned)),
        (SAMPLED, "pretrained", None, *_outcome(sampled)),
        (SAMPLED, "specialized", None, *_outcome(tuned_sampled)),
        (NETWORK, "pretrained", FREQUENT, *_outcome(network)),
        (NETWORK, "pretrained", HISTOGRAM, *_outcome(network)),
        (NETWORK, "specialized", HISTOGRAM, *_outcome(tuned_expert)),
    ]
    results = []
    for method, stage, select, name, tokens, seconds in stages:
        expert = select if name == network.name else None
        evaluation = evaluate(project, [name], [domain], expert=expert, tokens=DOMAIN_TOKENS)
        row = evaluation["results"][0]
        facts = {"perplexity": row["perplexity"], "tokens": tokens, "seconds": seconds}
        results.append({"method": method, "stage": stage, **({"select": select} if select else {}), **facts})
    report.line("7. the best specialised model, through mlx-lm")
    plain = [i for i, stage in enumerate(stages) if stage[3] != network.name]
    best = min(plain, key=lambda i: results[i]["perplexity"])
    model = workspace.model(stages[best][3])
    sample = "".join(part.text for part in stream(model, PROMPT, Sampling(max_tokens=80), report))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "device": runtime.device_name(),
        "domain": domain,
        "results": results,
        "model": str(model),
        "prompt": PROMPT,
        "sample": PROMPT + sample,
    }


def export_untrained(workspace: Workspace, config: Config) -> str:
    """Export the model as it is before any training, so that it is scored as the others are; returns its name."""
    tokenizer = open_tokenizer(workspace.tokenizer)
    shape = Shape.of(config.model, tokenizer.vocab_size, config.data.context_length)
    inputs = {"method": "none", "tokenizer": tokenizer.fingerprint}
    path = workspace.model("untrained")
    export_model(path, shape, initialise(shape, config.training.seed), tokenizer, inputs, {})
    return path.name


def _outcome(run: Run) -> tuple[str, int, float]:
    return run.name, run.record["tokens"], run.record["seconds"]
