"""The quickstart on a little of its text: every stage is real, only shorter."""

import json
import re
import subprocess
import sys

import pytest

from mlx_slm.cli import run

SHORT = [
    "data.limit=400k",
    "training.tokens=60k",
    "training.warmup_steps=10",
    "training.eval_every=30",
    "finetuning.max_steps=40",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart")


def quickstart(folder, capsys, *more):
    settings = [word for value in SHORT for word in ("--set", value)]
    code = run(["quickstart", "--workspace", str(folder / "w"), *settings, *more])
    return code, *capsys.readouterr()


def test_all_stages_and_the_shape_of_the_result(folder, capsys):
    code, out, err = quickstart(folder, capsys, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found) >= {"seconds", "device", "domain", "results", "model", "sample"}
    assert found["domain"] == "stdlib"
    assert [(r["method"], r["stage"]) for r in found["results"]] == [
        ("slm", "none"),
        ("slm", "pretrained"),
        ("slm", "specialized"),
        ("is", "pretrained"),
        ("is", "specialized"),
        ("pn", "pretrained"),
        ("pn", "pretrained"),
        ("pn", "specialized"),
    ]
    assert [r.get("select") for r in found["results"][5:]] == ["frequent", "histogram", "histogram"]
    perplexities = [r["perplexity"] for r in found["results"]]
    none, pretrained, specialized, sampled, sampled_specialized, frequent, histogram, tuned_expert = perplexities
    assert tuned_expert < 0.9 * histogram < 0.5 * none and frequent < 0.5 * none
    assert len(set(perplexities)) == 8
    assert 800 < none < 1300, "random weights are as good as a vocabulary of 1,024 at random"
    assert specialized < 0.9 * pretrained < 0.5 * none
    assert sampled_specialized < 0.9 * sampled < 0.5 * none
    assert found["results"][3]["tokens"] == pytest.approx(found["results"][1]["tokens"], rel=0.03)
    assert found["results"][1]["tokens"] > 50_000 and found["results"][1]["seconds"] > 0
    assert found["sample"].startswith("Return the number of bytes written to the file.") and len(found["sample"]) > 80
    assert [line[0] for line in err.splitlines() if line[:2] in {f"{i}." for i in range(1, 9)}] == list("1234567")


def test_a_second_run_finds_everything_done(folder, capsys, monkeypatch):
    from mlx_slm.text import docstrings

    monkeypatch.setattr(docstrings, "documents", lambda _: pytest.fail("the text was read again"))
    code, out, _ = quickstart(folder, capsys)
    assert code == 0 and "run slm is finished" in out and "run stdlib-slm-30k is finished" in out
    assert "slm, specialized" in out and "mlx-slm generate" in out


def test_serving_answers_the_openai_client(folder):
    openai = pytest.importorskip("openai", reason="needs the openai client (extra: peers)")
    model = str(folder / "w" / "models" / "stdlib-slm-30k")
    command = [sys.executable, "-m", "mlx_slm", "serve", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            address = re.search(r"http://\S+/v1", server.stdout.readline())[0]
            client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
            for name in (model, "stdlib-slm-30k"):
                answer = client.completions.create(model=name, prompt="Download a", max_tokens=8)
                assert answer.usage.completion_tokens == 8 and isinstance(answer.choices[0].text, str)
        finally:
            server.terminate()
