"""The rows of a fine-tuning with replay: the domain's share, and generic rows by the domain's histogram."""

import dataclasses
import shutil

import numpy as np
import pytest
from conftest import Recorder

from mlx_slm.clustering.clusters import Clusters
from mlx_slm.clustering.importance import histogram
from mlx_slm.errors import SlmError
from mlx_slm.finetuning.domain import domain_set
from mlx_slm.finetuning.rows import finetuning_rows
from mlx_slm.project import Project
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store


def test_replayed_rows_are_those_of_the_domains_clusters(prepared, config, tmp_path):
    shutil.copytree(prepared.root, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    clusters = config.clusters.model_copy(update={"k": 5})
    plain = config.finetuning.model_copy(update={"batch_rows": 8})
    project = Project(workspace, config.model_copy(update={"clusters": clusters, "finetuning": plain}), Recorder())
    domain = domain_set(project, "notes", 4000, [])
    without, per_pass, said = finetuning_rows(project, domain, 50)
    assert per_pass == without.num_rows / 8 and said == {}
    replaying = project.having(finetuning=plain.model_copy(update={"replay": 0.25}))
    longer = dataclasses.replace(domain, store=Store(workspace.data("notes", "train")))
    longer.store.context_length = 16
    with pytest.raises(SlmError, match=r"data/generic.* has windows of 32 tokens, the configuration asks for 16"):
        finetuning_rows(replaying, longer, 50)
    assert not (workspace.root / "clusters").exists(), "said before the long work"
    sampler, per_pass, said = finetuning_rows(replaying, domain, 50)
    assert per_pass == without.num_rows / 6, "six rows of eight are the domain's"
    assert said["replay"]["share"] == 0.25 and said["replay"]["domain"] == "notes"

    assigned = Clusters(workspace, 5).assigned("notes", "train").clusters[:]
    counts = histogram(assigned[domain.windows], domain.store.lengths(domain.windows), 5)
    np.testing.assert_allclose(sampler.distribution(0), [0.75, *(0.25 * counts / counts.sum())], atol=1e-12)

    own = {tuple(row) for step in range(20) for row in without.rows(step)[0].tolist()}
    drawn = [sampler.rows(step) for step in range(20)]
    for tokens, _, clusters in drawn:
        assert (clusters == 0).sum() == 6
        assert all(
            (tuple(row) in own) == (cluster == 0) for row, cluster in zip(tokens.tolist(), clusters, strict=True)
        )
