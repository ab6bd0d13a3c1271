"""The benchmarks run: every case once at the smallest size, and gives a record."""

import importlib.util
import json

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.case import Case, no_memory
from benchmarks.harness import play
from benchmarks.peers import PEERS
from benchmarks.run import BENCHMARKS, add_peaks
from benchmarks.sizes import SIZES
from mlx_slm.errors import SlmError


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_case_runs(name):
    try:
        case = BENCHMARKS[name](SIZES["tiny"])
    except SlmError as error:
        pytest.skip(str(error))
    case.work()
    assert case.amount > 0 and case.unit.endswith("/s")


@pytest.mark.parametrize("name", ["slm_step", "kmeans", "tokenising", "pn_step"])
def test_peers_do_the_same_work(name, tmp_path):
    file = tmp_path / "found.json"
    done = CliRunner().invoke(main, [name, "--size", "tiny", "--rounds", "1", "--peers", "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = [row for row in json.loads(file.read_text()) if row["name"] == name]
    peers = {row["peer"] for row in rows} - {None}
    packages = {"torch": "torch", "torch, compiled": "torch", "scikit-learn": "sklearn", "faiss": "faiss"}
    installed = {peer for peer in PEERS[name] if importlib.util.find_spec(packages.get(peer, "mlx"))}
    assert peers == installed
    ours = rows[0]
    assert ours["peer"] is None and ours["ratio"] == 1
    for row in rows[1:]:
        assert row["ratio"] == pytest.approx(row["median_s"] / ours["median_s"])
        assert row["value"] * row["median_s"] == pytest.approx(ours["value"] * ours["median_s"]), "the same amount"
        assert (row["unit"], row["dtype"]) == (ours["unit"], ours["dtype"])


def test_records_and_comparison(tmp_path):
    file = str(tmp_path / "found.json")
    arguments = ["cross_entropy", "--size", "tiny", "--rounds", "2", "--devices", "cpu", "--json", file]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    rows = json.load(open(file))
    assert [row["name"] for row in rows] == ["matmul", "read", "cross_entropy"], "the peaks are always measured"
    keys = {"name", "size", "device", "dtype", "median_s", "quartiles_s", "value", "unit", "peer", "ratio"}
    assert all(set(row) >= keys for row in rows)
    size, row = SIZES["tiny"], rows[-1]
    tokens = size.rows * size.context
    assert row["value"] == pytest.approx(tokens / row["median_s"])
    assert row["tflops"] == pytest.approx(6 * tokens * size.vocab_size * size.dims / row["median_s"] / 1e12)
    assert row["of_peak"] == pytest.approx(row["tflops"] / rows[0]["tflops"])
    again = CliRunner().invoke(main, [*arguments, "--compare", file])
    assert again.exit_code == 0 and "before" in again.output
    assert CliRunner().invoke(main, ["nothing"]).exit_code == 2
    for wrong in ('{"a": 1}', "[1]", "[{}]", "no JSON"):
        (tmp_path / "wrong.json").write_text(wrong)
        done = CliRunner().invoke(main, ["help", "--compare", str(tmp_path / "wrong.json")])
        assert done.exit_code == 2 and "wrong.json: not a file that --json of this command wrote" in done.output
    assert CliRunner().invoke(main, ["help", "--json", str(tmp_path / "no" / "x.json")]).exit_code == 2


def _fails(size, turn):
    turn.serve(Case(lambda: 1 / 0, 1, "times/s", memory=no_memory), {})


def _works(size, turn):
    turn.serve(Case(lambda: 0.5, 1, "times/s", memory=no_memory, timed=True), {})


def test_a_side_that_fails_is_left_out(capfd):
    found, _ = play({"fails": _fails, "works": _works}, SIZES["tiny"], 2)
    assert [turn[0] for turn in found["works"]] == [0.5, 0.5] and "fails" not in found
    assert "fails is left out: it failed in turn 0" in capfd.readouterr().out


def test_a_share_of_the_peak_is_the_larger_of_computing_and_moving():
    base = {"backend": "cpu", "peer": None}
    rows = [
        base | {"name": "matmul", "tflops": 2.0, "gb_per_s": None},
        base | {"name": "read", "tflops": None, "gb_per_s": 100.0},
        base | {"name": "x", "tflops": 0.5, "gb_per_s": 60.0},
    ]
    add_peaks(rows)
    assert [row["of_peak"] for row in rows] == [1.0, 1.0, 0.6]
