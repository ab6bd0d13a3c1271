"""How alike the experts of a network are, against how alike their clusters are."""

import json
import os

import numpy as np
import pytest
from conftest import call, experts_of

from mlx_slm.experts.geometry import geometry


def test_experts_geometry_against_plain_numpy(with_experts, capsys):
    experts = experts_of(with_experts, "pn")
    facts = geometry(experts)
    E = np.array(experts.network["E"], np.float64)
    own = [np.array(M, np.float64) for name, M in experts.network["M"].items() if ".0." in name]
    c = np.concatenate([E @ M for M in own], axis=1)
    c -= c.mean(axis=0)
    expected = [[c[i] @ c[j] / np.sqrt((c[i] @ c[i]) * (c[j] @ c[j])) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(facts["layers"][0]["cosines"], expected, atol=1e-6)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    r = np.corrcoef([expected[i][j] for i, j in pairs], [facts["centroids"][i][j] for i, j in pairs])[0, 1]
    assert facts["layers"][0]["correlation"] == pytest.approx(r, abs=1e-6)
    assert sorted(facts["order"]) == [0, 1, 2, 3]
    code, out, _ = call(capsys, with_experts, "info", "pn", "--json")
    assert code == 0 and os.path.getsize(json.loads(out)["figure"]) > 10_000
    code, _, err = call(capsys, with_experts, "info", "mix")
    assert code == 1 and "run mix is a mixture" in err
