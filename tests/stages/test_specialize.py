"""Distillation and LoRA as a user has them."""

import itertools
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import KILLED, call, copy_of, rounding, small_config
from mlx.utils import tree_flatten
from training.test_trainer import assert_same, everything

from mlx_slm.cli import run
from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import DistillationConfig, ModelConfig
from mlx_slm.errors import SlmError
from mlx_slm.evaluation.evaluate import evaluate
from mlx_slm.export.model import load_any, load_exported, weights_of
from mlx_slm.finetuning import finetune
from mlx_slm.methods.requests import Pretraining, Specialisation
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.stages.specialize import specialize
from mlx_slm.storage.workspace import Workspace
from mlx_slm.training.checkpoint import checkpoint_steps, load_weights
from mlx_slm.training.distillation import Distillation
from mlx_slm.training.find import find_run

LARGE = ModelConfig(family="gpt2", num_layers=2, dims=48, num_heads=4)
QWEN3 = ModelConfig(family="qwen3", num_layers=2, dims=32, num_heads=4, num_kv_heads=2, head_dims=16)


@pytest.fixture(scope="module")
def large_config():
    return small_config(large=LARGE)


@pytest.fixture(scope="module")
def trained(prepared, large_config, tmp_path_factory) -> Workspace:
    """A workspace with the runs `slm`, `llm` and `qwen3`. Do not write into it."""
    workspace = Workspace(tmp_path_factory.mktemp("teach") / "w")
    shutil.copytree(prepared.root, workspace.root)
    workspace.config_file.write_text(dump_config(large_config))
    for method in ("slm", "llm"):
        pretrain(Project(workspace, large_config), Pretraining(method))
    pretrain(Project(workspace, large_config.model_copy(update={"model": QWEN3})), Pretraining("slm", name="qwen3"))
    return workspace


@pytest.fixture
def own(trained, tmp_path) -> Workspace:
    """A copy to write into."""
    return copy_of(trained, tmp_path / "w")


@pytest.mark.parametrize("source", ["slm", "llm", "qwen3"])
def test_lora_trains_adapters_alone_and_mlx_lm_reads_them(source, own, large_config, report, monkeypatch):
    from mlx_lm import load

    falling = itertools.count(9.0, -0.01)  # so small a base need not gain anything, and then the start is kept
    monkeypatch.setattr(finetune, "validation_loss", lambda *_: lambda _: next(falling))
    base = find_run(own, source)
    before = dict(tree_flatten(base.weights()))
    tuned = specialize(Project(own, large_config, report), Specialisation("notes", source=source, tokens=4000, lora=4))
    assert tuned.name == "notes-lora-4k" and not own.model(tuned.name).exists()
    after = load_weights(base.path, base.weights_step())
    for name, value in tree_flatten(after):
        assert mx.array_equal(value, before[name]), "the base is as it was"
    checkpoint = load_weights(tuned.path, checkpoint_steps(tuned.path)[-1])
    adapted = {name.rsplit(".", 2 if source == "llm" else 1)[0] for name, _ in tree_flatten(checkpoint)}
    assert {name.rsplit(".", 1)[-1] for name in adapted} == ({"c_attn"} if source == "llm" else {"q_proj", "v_proj"})
    merged = dict(tree_flatten(weights_of(own, tuned)))
    changed = {name for name in before if not mx.array_equal(merged[name], before[name])}
    assert changed == {f"{name}.weight" for name in adapted}, "everything else is frozen, bit for bit"

    model = Transformer(base.shape)
    model.update(weights_of(own, tuned))
    tokens = mx.array(np.arange(64).reshape(2, 32))
    theirs, _ = load(str(own.model(source)), adapter_path=str(own.adapter(tuned.name)))
    np.testing.assert_allclose(np.array(theirs(tokens)), np.array(model.logits(tokens)), atol=1e-5)

    rows = evaluate(Project(own, large_config, report), [source, tuned.name], domains=["notes"], split="valid")[
        "results"
    ]
    assert rows[1]["nll"] < rows[0]["nll"], "it learned"
    specialize(
        Project(own, large_config, report), Specialisation("notes", source=source, tokens=4000, lora=4, fuse=True)
    )
    fused, _ = load_exported(own.model(tuned.name))
    np.testing.assert_allclose(np.array(fused.logits(tokens)), np.array(model.logits(tokens)), atol=1e-5)


def test_an_adapter_knows_its_base(own, large_config, report):
    tuned = specialize(Project(own, large_config, report), Specialisation("notes", source="slm", tokens=4000, lora=2))
    pretrain(Project(own, large_config, report), Pretraining("slm", fresh=True))
    with pytest.raises(SlmError, match="run slm was trained again since notes-lora-4k adapted it"):
        weights_of(own, tuned)


def test_a_student_learns_from_a_teacher_that_is_kept(own, large_config, report):
    plain = specialize(Project(own, large_config, report), Specialisation("notes", source="slm", tokens=4000))
    student = specialize(
        Project(own, large_config, report), Specialisation("notes", source="slm", tokens=4000, teacher="llm")
    )
    assert student.name == "notes-d-4k" and student.record["inputs"]["teacher"]["run"] == "notes-llm-4k"
    assert student.record["valid_nll"] != plain.record["valid_nll"]
    small, large = (find_run(own, name).shape for name in ("slm", "llm"))
    per_step = student.record["flops"] / student.record["step"]
    assert per_step == 4 * 32 * (small.flops_per_token + large.forward_flops_per_token), "4 rows of 32 tokens"
    before = (own.run("notes-llm-4k") / "run.json").stat().st_mtime_ns
    other = large_config.model_copy(update={"distillation": DistillationConfig(a=0.2, tau=2.0)})
    again = specialize(
        Project(own, other, report), Specialisation("notes", source="slm", tokens=4000, teacher="llm", name="softer")
    )
    assert (own.run("notes-llm-4k") / "run.json").stat().st_mtime_ns == before, "the teacher is reused"
    assert again.record["valid_nll"] != student.record["valid_nll"]
    with pytest.raises(SlmError, match=r"another configuration \(distillation\.a 0\.5 -> 0\.2"):
        specialize(Project(own, other, report), Specialisation("notes", source="slm", tokens=4000, teacher="llm"))


def test_with_a_of_one_it_is_fine_tuning_bit_for_bit(own, large_config, report):
    alone = large_config.model_copy(update={"distillation": DistillationConfig(a=1.0, tau=2.0)})
    student = specialize(Project(own, alone, report), Specialisation("notes", source="slm", tokens=4000, teacher="llm"))
    plain = specialize(Project(own, alone, report), Specialisation("notes", source="slm", tokens=4000))
    (ours, records), (theirs, other_records) = everything(student.path), everything(plain.path)
    assert records == other_records and ours.pop("state") == theirs.pop("state")
    for name, value in ours.items():
        assert mx.array_equal(value, theirs[name]), name


@pytest.mark.parametrize("way", [("--lora", "4", "--from", "llm"), ("--teacher", "llm")])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(way, own, large_config):
    arguments = ["specialize", "--domain", "notes", "--tokens", "4k", *way, "--workspace", str(own.root)]
    assert run([*arguments, "--name", "whole"]) == 0, "which makes the fine-tuned teacher too"
    steps = find_run(own, "whole").record["step"]
    killed = [sys.executable, "-c", KILLED.format(calls=steps - 3), *arguments, "--name", "killed"]
    assert subprocess.run(killed, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert checkpoint_steps(own.run("killed")) and not find_run(own, "killed").finished
    assert run([*arguments, "--name", "killed"]) == 0
    assert_same(own.run("killed"), everything(own.run("whole")))


def test_the_loss_of_a_step_is_that_of_plain_softmaxes(trained):
    student, teacher = (load_any(trained, name)[0] for name in ("slm", "llm"))
    rng = np.random.default_rng(0)
    tokens, weights = mx.array(rng.integers(0, 400, (3, 33))), mx.array(rng.random((3, 32), np.float32))
    found = Distillation(teacher, 0.3, 2.0)(student, tokens, weights).item()
    ours, theirs = (np.array(m.logits(tokens[:, :-1]).astype(mx.float32), np.float64) for m in (student, teacher))
    log_softmax = lambda x: x - np.log(np.exp(x).sum(axis=-1, keepdims=True))  # noqa: E731
    nll = -np.take_along_axis(log_softmax(ours), np.array(tokens)[:, 1:, None], axis=-1)[..., 0]
    p, q = log_softmax(theirs / 2), log_softmax(ours / 2)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    assert found == pytest.approx(((0.3 * nll + 0.7 * 4 * kl) * np.array(weights)).sum(), rel=max(1e-5, rounding()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora", "4", "--teacher", "llm"), "--lora and --teacher"),
        (("--lora", "4", "--from", "none"), "--lora adapts one pretrained model, and there is none"),
        (("--lora", "33"), "--lora 33: the matrices of run slm have rank 32 at the most"),
        (("--teacher", "lm"), "no run 'lm'"),
    ],
)
def test_ways_that_do_not_go_together(arguments, message, trained, capsys):
    code, _, err = call(capsys, trained, "specialize", "--domain", "notes", "--tokens", "4k", *arguments)
    assert code == 1 and message in err


def test_a_teacher_with_another_tokenizer_is_refused(own, large_config, report, capsys):
    run = find_run(own, "llm")
    run.record["inputs"]["tokenizer"] = "another"
    run.save()
    code, _, err = call(capsys, own, "specialize", "--domain", "notes", "--tokens", "4k", "--teacher", "llm")
    assert code == 1 and "run llm and data/notes were made with different tokenizers" in err
    assert call(capsys, own, "specialize", "--domain", "notes", "--fuse")[0] == 2
