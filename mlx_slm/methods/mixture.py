"""SLM-mix (section 2.2): independent small models, one per cluster, each on the rows of its cluster alone.

Expert by expert; the run itself holds what they have in common, and is finished when all are.
"""

from __future__ import annotations

import time

import numpy as np

from mlx_slm.clustering.clusters import Clusters
from mlx_slm.errors import SlmError
from mlx_slm.experts.experts import HISTOGRAM, SELECTS
from mlx_slm.machine import runtime
from mlx_slm.machine.ranks import apart, ranks
from mlx_slm.methods.base import Method, Rows, Setup, TrainingJob
from mlx_slm.methods.experts import experts_inputs, generic_clusters
from mlx_slm.methods.requests import Pretraining
from mlx_slm.methods.work import announce_jobs, plain_job, work
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.storage.copies import copy_from
from mlx_slm.training.runs import (
    REMEDY,
    Run,
    RunRequest,
    alone_in,
    expert_path,
    is_of,
    open_expert,
    open_together,
)
from mlx_slm.training.scoring import validation_loss


class Mixture(Method):
    name, label, color = "mix", "SLM-mix", "C3"
    summary = "hard mixture"
    rows, section = Rows.CLUSTER, "mixture"
    one_model = milestones = False
    takes_experts = True
    selects = tuple(select for select in SELECTS if select != HISTOGRAM)
    paper_perplexity = (17.18, 14.21, 11.73)

    def check(self, project: Project, request: Pretraining) -> None:
        k = project.config.mixture.k
        beyond = [number for number in request.experts or [] if number >= k]
        if beyond:
            raise SlmError(f"--experts {beyond[0]}: the mixture has the experts 0 to {k - 1} (mixture.k = {k})")

    def pretrain(self, setup: Setup, request: Pretraining) -> Run:
        path, experts = setup.path, request.experts
        training = setup.project.config.training.model_copy(update={"milestones": []})
        project = setup.project.having(training=training)
        k = project.config.mixture.k
        clusters = generic_clusters(setup, k)
        mixture = {"mixture": project.config.mixture.model_dump(mode="json")}
        inputs = experts_inputs(setup, self.name, clusters) | mixture
        possible = [i for i in range(k) if inputs["generic"][i]]
        wanted = possible if experts is None else experts
        empty = [number for number in wanted if number not in possible]
        if empty:
            raise SlmError(f"--experts {empty[0]}: cluster {empty[0]} of the generic set is empty; it has no expert")
        jobs = expert_jobs(setup, clusters, inputs, wanted)
        whole = request.fresh and experts is None
        remedy = "start the whole mixture over with --fresh and without --experts" if request.fresh else REMEDY
        with alone_in(path):
            finished = {} if request.fresh else _finished_experts(Run(path, {}), possible)
            own = [n for n, record in finished.items() if n not in jobs or is_of(record, jobs[n].inputs)]
            done = set().union(*ranks().of_all(own))
            left = [job for number, job in jobs.items() if number not in done]

            def announce() -> None:
                announce_jobs(left, project.config.training, project.report)

            asked = RunRequest(path, self.name, inputs, project.config, whole, remedy=remedy, published=setup.published)
            run = open_together(project.workspace, asked, announce)
            if request.fresh:
                run.record["started"] = time.time()
            if not left:
                project.report.line(f"run {run.name} is finished: it has these experts; --fresh trains them again")
            try:
                for number in ranks().own([number for number in jobs if number not in done]):
                    project.report.line(
                        f"expert {number} of 0 to {k - 1}: cluster {number}, {inputs['generic'][number]:,} tokens"
                    )
                    with apart():
                        work(project, jobs[number], request.fresh, lambda: None)
            finally:
                if ranks().is_first:
                    _record_experts(run, possible)
            _collect(run, jobs, possible)
        return run


def expert_jobs(setup: Setup, clusters: Clusters, inputs: dict, experts: list[int]) -> dict[int, TrainingJob]:
    """Each expert: all mass on its cluster, validated on the held-out windows of that cluster."""
    config = setup.project.config
    streams = clusters.assigned(config.data.generic, "train").streams(setup.store)
    places = clusters.assigned(config.data.generic, "valid").clusters[:][setup.windows]
    share = max(1, setup.tokens // clusters.k) if setup.tokens else None
    tokens = config.mixture.tokens or share

    def job(expert: int) -> TrainingJob:
        own = setup.windows[places == expert]
        return plain_job(
            setup,
            inputs | {"expert": expert},
            [streams[expert]],
            np.ones(1),
            path=expert_path(setup.path, expert),
            steps=setup.steps(streams[expert].num_rows, tokens),
            evaluate=validation_loss(Transformer(setup.shape), setup.valid, own if len(own) else setup.windows),
        )

    return {expert: job(expert) for expert in experts}


def _collect(run: Run, jobs: dict[int, TrainingJob], possible: list[int]) -> None:
    """Record the experts that all ranks have trained, after bringing to the first those that are newer than its own."""
    of_this = {
        n: one for n, one in _finished_experts(run, possible).items() if n in jobs and is_of(one, jobs[n].inputs)
    }
    started = ranks().of_all({str(number): record["started"] for number, record in of_this.items()})
    for number in sorted(set().union(*started), key=int):
        times = [theirs.get(number, 0.0) for theirs in started]  # with --fresh another may have trained it again
        holder = times.index(max(times))
        if times[holder] != times[0]:
            copy_from(holder, expert_path(run.path, int(number)), wanted=lambda: ranks().is_first)
    ranks().by_first(lambda: _record_experts(run, possible))


def _finished_experts(run: Run, possible: list[int]) -> dict[int, dict]:
    """Records of the experts of a mixture that are finished."""
    experts = {number: open_expert(run, number) for number in possible}
    return {number: one.record for number, one in experts.items() if one and one.finished}


def _record_experts(run: Run, possible: list[int]) -> None:
    done = _finished_experts(run, possible)
    run.record.update(
        status="finished" if len(done) == len(possible) else "running",
        experts={number: record["valid_nll"] for number, record in done.items()},
        **{key: sum(record[key] for record in done.values()) for key in ("step", "tokens", "skipped_steps", "flops")},
        seconds=round(sum(record["seconds"] for record in done.values()), 2),
        device=runtime.device_name(),
    )
    run.save()
