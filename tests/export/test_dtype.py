"""`export --dtype`: 16 bits a weight, read alike by us, mlx-lm and transformers."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import call, publish, write_jsonl

from mlx_slm.export.model import load_exported
from mlx_slm.machine.trees import flat
from mlx_slm.storage.workspace import Workspace

STEPS = (
    "--set", "data.context_length=32", "--set", "finetuning.max_steps=2", "--set", "finetuning.warmup_steps=1",
    "--set", "finetuning.eval_tokens=500",
)  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("dtype")
    model = publish(folder / "tiny", texts[:300])
    notes = write_jsonl(folder / "notes.jsonl", texts[600:800])
    from mlx_slm.cli import run

    command = ["specialize", "--workspace", str(folder / "w"), "--domain", "notes", "--from", str(model), str(notes)]
    assert run([*command, "--name", "a", *STEPS]) == 0
    return Workspace(folder / "w")


@pytest.mark.parametrize(("dtype", "suffix", "bits"), [("bfloat16", "bf16", 8), ("float16", "fp16", 11)])
def test_a_model_in_16_bits(workspace, dtype, suffix, bits, capsys):
    import torch
    from mlx_lm import load
    from transformers import AutoModelForCausalLM

    code, out, err = call(capsys, workspace, "export", "a", "--dtype", dtype, "--json")
    assert code == 0, err
    facts = json.loads(out)
    path = workspace.model(f"a-{suffix}")
    before, after = facts["perplexity"]
    assert facts["path"] == str(path) and facts["bits_per_weight"] == 16 and before != after
    assert after == pytest.approx(before, rel=0.02)
    whole, _ = load_exported(workspace.model("a"))
    half, _ = load_exported(path)
    for name, value in flat(whole.parameters()).items():
        rounded = np.array(flat(half.parameters())[name])
        np.testing.assert_allclose(rounded, np.array(value), rtol=2.0**-bits, atol=1e-7)
        assert half.parameters() and rounded.dtype == np.float32
    tokens = np.random.default_rng(0).integers(0, 400, (1, 32))
    theirs, _ = load(str(path))
    assert {value.dtype for value in flat(theirs.parameters()).values()} == {getattr(mx, dtype)}
    ours = np.array(half.logits(mx.array(tokens)))
    torches = AutoModelForCausalLM.from_pretrained(str(path), dtype="auto")
    assert torches.dtype == getattr(torch, dtype)
    for logits in (
        np.array(theirs(mx.array(tokens)).astype(mx.float32)),
        torches(torch.tensor(tokens)).logits.float().detach().numpy(),
    ):
        assert np.abs(logits - ours).max() < 2.0 ** (3 - bits) * np.abs(ours).max()
    for again in (("--quantize", "4"), ("--dtype", dtype)):
        code, _, err = call(capsys, workspace, "export", str(path), *again)
        assert code == 1 and "has 16 bits a weight already" in err
    code, _, err = call(capsys, workspace, "export", f"a-{suffix}", "--format", "gguf")
    assert code == 0, err


def test_it_goes_alone(workspace, capsys):
    wrong = (
        (("--quantize", "4"), "--quantize or --dtype, not both"),
        (("--format", "gguf"), "--type and --fuse alone"),
    )
    for other, message in wrong:
        code, _, err = call(capsys, workspace, "export", "a", "--dtype", "bfloat16", *other)
        assert code == 2 and message in err


def test_the_context_of_the_model_that_it_comes_from_stays(workspace):
    """Training took windows of 32 tokens of a model that reads 64."""
    config = json.loads((workspace.model("a") / "config.json").read_text())
    assert config["max_position_embeddings"] == 64
    assert load_exported(workspace.model("a"))[0].shape.context_length == 64
