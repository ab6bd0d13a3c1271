"""A published model as a teacher, and as a start for a set whose windows are of another length than asked for."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import call, publish, write_jsonl

from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.storage.workspace import Workspace
from mlx_slm.training.distillation import Distillation
from mlx_slm.training.find import find_run

STEPS = (
    "--set", "finetuning.max_steps=4", "--set", "finetuning.warmup_steps=1", "--set", "finetuning.eval_tokens=500",
    "--set", "model.family=llama", "--set", "model.num_layers=1", "--set", "model.dims=32", "--set",
    "model.num_heads=2",
)  # fmt: skip


def test_a_published_model_teaches_in_an_empty_workspace(texts, tmp_path, capsys):
    """Its embedding has 448 rows, the student as many as its tokenizer has tokens: 420."""
    teacher, workspace = publish(tmp_path / "big", texts[:300]), Workspace(tmp_path / "w")
    notes = write_jsonl(tmp_path / "notes.jsonl", texts[600:800])
    command = ("specialize", "--domain", "notes", "--from", "none", "--teacher", str(teacher), str(notes), *STEPS)
    code, out, err = call(capsys, workspace, *command, "--set", "data.context_length=32", "--json")
    assert code == 0, err
    run = find_run(workspace, json.loads(out)["run"])
    assert run.shape.vocab_size == 420 and run.shape.context_length == 32
    assert run.record["inputs"]["teacher"]["run"] == "notes-big-all" and run.published is None
    assert find_run(workspace, "notes-big-all").published["model"] == str(teacher)
    code, out, err = call(capsys, workspace, *command, "--set", "data.context_length=32")
    assert code == 0 and out.count("is finished") == 2, "the teacher is trained once"
    card = (workspace.model(run.name) / "README.md").read_text()
    assert "- teacher: run notes-big-all, of big (licence: apache-2.0)" in card and "license: other" in card
    namesake = publish(tmp_path / "elsewhere" / "big", texts[:300])
    weights = mx.load(str(namesake / "model.safetensors"))
    mx.save_safetensors(str(namesake / "model.safetensors"), {n: 2 * v for n, v in weights.items()})
    again = (*command[:6], str(namesake), *command[7:], "--set", "data.context_length=32", "--name", "of-namesake")
    assert call(capsys, workspace, *again)[0] == 0
    taught = find_run(workspace, "of-namesake").record["inputs"]["teacher"]["run"]
    assert taught.startswith("notes-big-all-") and find_run(workspace, "notes-big-all").published["model"] == str(
        teacher
    )
    small = publish(tmp_path / "small", texts[:300])
    config = json.loads((small / "config.json").read_text())
    weights = mx.load(str(small / "model.safetensors"))
    cut = {n: v[:400] if n.endswith("embed_tokens.weight") else v for n, v in weights.items()}
    mx.save_safetensors(str(small / "model.safetensors"), cut)
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    code, _, err = call(capsys, workspace, *command[:6], str(small), *command[7:], "--name", "other")
    assert code == 1 and "a teacher knows every token of its student" in err and err.count("\n") == 1
    exact = {n: v[:420] if n.endswith("embed_tokens.weight") else v for n, v in weights.items()}
    mx.save_safetensors(str(small / "model.safetensors"), exact)
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 420}))
    padded = ("specialize", "--domain", "notes", "--from", str(teacher), "--teacher", str(small), *STEPS)
    code, _, err = call(capsys, workspace, *padded, "--name", "padded-student")
    assert code == 0 and find_run(workspace, "padded-student").shape.vocab_size == 448, err
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 420, "max_position_embeddings": 16}))
    code, _, err = call(capsys, workspace, *padded, "--name", "short")
    assert code == 1 and f"--teacher {small}: it reads 16 tokens" in err


def test_a_padded_teacher_teaches_as_one_that_is_not():
    rng = np.random.default_rng(3)
    student, wide = Shape("llama", 1, 32, 64, 2, 2, 50, 16), Shape("llama", 1, 32, 64, 2, 2, 80, 16)
    padded = initialise(wide, 1)
    table = padded["model"]["embed_tokens"]["weight"]
    cut = padded | {"model": padded["model"] | {"embed_tokens": {"weight": table[:50]}}}
    tokens, losses = mx.array(rng.integers(0, 50, (3, 17))), []
    for shape, parameters in ((wide, padded), (student, cut)):
        model, teacher = Transformer(student), Transformer(shape)
        model.update(initialise(student, 2))
        teacher.update(parameters)
        losses.append(Distillation(teacher, 0.5, 2.0)(model, tokens, mx.ones((3, 16))).item())
    assert losses[0] == losses[1]


def test_what_a_teacher_has_no_row_for_it_never_expects():
    """A student of 80 rows: as if the teacher's 50 were followed by logits of minus infinity."""
    rng = np.random.default_rng(4)
    student, narrow = Shape("llama", 1, 32, 64, 2, 2, 80, 16), Shape("llama", 1, 32, 64, 2, 2, 50, 16)
    model, teacher = Transformer(student), Transformer(narrow)
    model.update(initialise(student, 2))
    teacher.update(initialise(narrow, 1))
    tokens = rng.integers(0, 50, (2, 17))
    found = Distillation(teacher, 0.25, 2.0)(model, mx.array(tokens), mx.ones((2, 16))).item()
    ours, theirs = (np.array(one.logits(mx.array(tokens[:, :-1])), np.float64) for one in (model, teacher))

    def log_softmax(logits):
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    cross_entropy = -np.take_along_axis(log_softmax(ours), tokens[:, 1:, None], axis=-1).sum()
    p, log_q = log_softmax(theirs / 2), log_softmax(ours / 2)[..., :50]
    expected = 0.25 * cross_entropy + 0.75 * 4 * (np.exp(p) * (p - log_q)).sum()
    assert abs(found - expected) < 1e-5 * expected

    def loss(head):
        model.update({"model": {"embed_tokens": {"weight": head}}})
        return Distillation(teacher, 0.25, 2.0)(model, mx.array(tokens), mx.ones((2, 16)))

    table = model.head
    gradient = np.array(mx.grad(loss)(table))
    move = mx.array(rng.normal(size=table.shape), mx.float32)
    there, back = (loss(table + sign * 1e-3 * move).item() for sign in (1, -1))
    assert (there - back) / 2e-3 == pytest.approx((gradient * np.array(move)).sum(), rel=2e-3)


def test_windows_longer_than_asked_for_are_read_as_they_are(texts, tmp_path, capsys):
    """A set that exists keeps its windows of 64; gpt2's table of positions must have as many rows."""
    model, workspace = publish(tmp_path / "tiny", texts[:300], "gpt2"), Workspace(tmp_path / "w")
    notes = write_jsonl(tmp_path / "notes.jsonl", texts[600:800])
    first = ("specialize", "--domain", "notes", "--from", str(model), *STEPS)
    assert call(capsys, workspace, *first, "--name", "a", str(notes))[0] == 0
    code, _, err = call(capsys, workspace, *first, "--name", "b", "--set", "data.context_length=16", "--json")
    assert code == 0 and find_run(workspace, "b").shape.context_length == 64, err
    losses = [find_run(workspace, name).record["valid_nll"] for name in "ab"]
    assert losses[0] == losses[1]
