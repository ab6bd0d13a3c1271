"""A published model as a teacher, and as a start for a set whose windows are of another length than asked for."""

import json

import mlx.core as mx
import numpy as np
from conftest import call, publish, write_jsonl

from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.storage.workspace import Workspace
from mlx_slm.training.distillation import Distillation
from mlx_slm.training.runs import find_run

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
    small = publish(tmp_path / "small", texts[:300])
    config = json.loads((small / "config.json").read_text())
    weights = mx.load(str(small / "model.safetensors"))
    cut = {n: v[:400] if n.endswith("embed_tokens.weight") else v for n, v in weights.items()}
    mx.save_safetensors(str(small / "model.safetensors"), cut)
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    code, _, err = call(capsys, workspace, *command[:6], str(small), *command[7:], "--name", "other")
    assert code == 1 and "a teacher knows every token of its student" in err and err.count("\n") == 1


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
