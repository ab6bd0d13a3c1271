"""The rows of a fine-tuning: the domain set's, and with replay generic ones among them, resampled to the domain."""

from __future__ import annotations

import numpy as np

from mlx_slm.clustering.target import SamplingTarget, clusters_for, importance_of, inputs_of
from mlx_slm.errors import SlmError
from mlx_slm.finetuning.domain import DomainSet
from mlx_slm.project import Project
from mlx_slm.text.rows import Sampler, Stream
from mlx_slm.text.store import Store


def require_replay(project: Project) -> None:
    """Raise SlmError, before any long work, where rows are to be replayed from a generic set that is not there."""
    data, share = project.config.data, project.config.finetuning.replay
    if share and data.generic not in project.workspace.sets():
        raise SlmError(
            f"finetuning.replay={share:g} draws rows of the set {data.generic!r}, which is not prepared in "
            f"{project.workspace.root}: `mlx-slm prepare {data.generic} SOURCE...` first, or set finetuning.replay=0"
        )


def finetuning_rows(project: Project, domain: DomainSet, steps: int) -> tuple[Sampler, float, dict]:
    """(the rows, steps of a pass over the domain set, what a record says of replay); `steps`: at most so many.

    With replay the share r of the rows of each step is drawn as SLM-is draws them for this domain set.
    """
    config, report, generic_name = project.config, project.report, project.config.data.generic
    tuning, own = config.finetuning, Stream.of(domain.store, domain.windows)
    streams, distribution, inputs = [own], np.ones(1), {}
    if tuning.replay:
        rows = steps * tuning.batch_rows
        for share, whose in ((tuning.replay, "the generic set"), (1 - tuning.replay, "the domain")):
            if share * rows < 1:
                raise SlmError(
                    f"finetuning.replay={tuning.replay:g}: of at most {rows:,} rows none is left for {whose}: give "
                    "another share, or train longer"
                )
        target, store = SamplingTarget(domain.name, domain.tokens), Store(project.workspace.data(generic_name, "train"))
        store.require_context(own.row_length)
        clusters = clusters_for(project, target)
        generic = clusters.assigned(generic_name, "train").streams(store)
        aim = importance_of(project, target, clusters, generic, max(1, round(rows * tuning.replay)))
        report.line(f"{100 * tuning.replay:g} % of the rows are replayed from {generic_name}\n{aim.lines}")
        streams += generic
        distribution = np.concatenate([[1 - tuning.replay], tuning.replay * aim.distribution])
        inputs = {"replay": {"share": tuning.replay, **inputs_of(config, target, clusters, aim)}}
    sampler = Sampler(streams, distribution, tuning.batch_rows, tuning.seed)
    return sampler, own.num_rows / (tuning.batch_rows * (1 - tuning.replay)), inputs
