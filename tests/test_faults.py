"""A small seeded part of `scripts/faults`: what held, goes on holding."""

import random
import shutil
import sys

import faults
import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and prctl as Linux has them")
SEED = 14


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return faults.build(tmp_path_factory.mktemp("faults"), ("prepare", "pretrain"))


@pytest.mark.parametrize(
    ("kind", "command"),
    [("kill", 0), ("rename", 0), ("together", 0), ("disk", 0), ("rename", 1), ("kill", 1), ("flip", 1), ("memory", 1)],
)
def test_it_holds(kind, command, site):
    command, workspace = site.commands[command], site.root / "trial"
    shutil.copytree(site.before(command), workspace)
    rng = random.Random(f"{SEED} {kind} {command.name}")
    try:
        outcome = faults.KINDS[kind](site, command, rng, workspace)
    finally:
        shutil.rmtree(workspace)
    if outcome == "left out":
        pytest.skip("no small disk can be made here")
    assert outcome == "held"
