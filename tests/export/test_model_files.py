"""Model directories from anywhere: damaged safetensors, hostile configurations, flipped bytes get one sentence."""

import json
import shutil
import struct

import pytest
from conftest import call

from mlx_slm.errors import SlmError
from mlx_slm.export.model import check_directory
from mlx_slm.export.start import Pretrained
from mlx_slm.storage.artifacts import MANIFEST


def header(tensors, data: bytes = b"\0" * 64, size: int | None = None) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(dtype="F32", shape=(16,), offsets=(0, 64)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


HOSTILE = {
    "a header of 2^60": header(tensor(), size=2**60),
    "a header of 2^63 - 1": header(tensor(), size=2**63 - 1),
    "a header cut off": header(tensor())[:20],
    "deep JSON": header(b"[" * 50_000),
    "JSON that is a list": header([]),
    "offsets outside": header(tensor(offsets=(0, 6400), shape=(1600,))),
    "overlapping": header(tensor() | {"b": tensor()["a"]}),
    "a hole": header(tensor(shape=(8,), offsets=(32, 64))),
    "a negative shape": header(tensor(shape=(-16,))),
    "a shape that overflows": header(tensor(shape=(2**62, 4))),
    "a shape that is not its bytes": header(tensor(shape=(15,))),
    "a shape that is text": header({"a": {"dtype": "F32", "shape": "16", "data_offsets": [0, 64]}}),
    "a type that there is not": header(tensor(dtype="F31")),
    "offsets turned round": header(tensor(offsets=(64, 0))),
    "no tensors": header({}, b""),
    "a pickle": b"\x80\x04\x95" + b"\0" * 100,
    "an empty file": b"",
    "bytes behind the end": header(tensor(), b"\0" * 96),
}


@pytest.fixture
def model(with_experts, tmp_path):
    """An exported model without its manifest: as a stranger's directory."""
    path = tmp_path / "model"
    shutil.copytree(with_experts.model("slm"), path)
    (path / MANIFEST).unlink()
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_safetensors(name, model, with_experts, capsys):
    (model / "model.safetensors").write_bytes(HOSTILE[name])
    for command in (("generate", str(model), "-p", "x"), ("serve", str(model))):
        code, _, err = call(capsys, with_experts, *command)
        assert code == 1 and err.startswith("mlx-slm: error: ") and err.count("\n") == 1, err
        assert "model.safetensors" in err
    with pytest.raises(SlmError, match=r"model\.safetensors"):
        Pretrained(model, 32).parameters()


CONFIGS = {
    "a list": [],
    "text": "llama",
    "null": None,
    "minus one layer": {"num_hidden_layers": -1},
    "no layer": {"num_hidden_layers": 0},
    "half a layer": {"num_hidden_layers": 1.5},
    "layers as text": {"num_hidden_layers": "2"},
    "a billion layers": {"num_hidden_layers": 10**9},
    "a null": {"hidden_size": None},
    "a truth": {"hidden_size": True},
    "heads that do not divide": {"num_attention_heads": 3, "head_dim": None},
    "groups that do not divide": {"num_key_value_heads": 3},
    "an infinite base": {"rope_theta": float("inf")},
    "a rope that is a list": {"rope_scaling": [1]},
    "an epsilon below zero": {"rms_norm_eps": -1e-5},
    "a vocabulary of 2^40": {"vocab_size": 2**40},
    "a family that is a path": {"model_type": "../../x"},
    "nested": {"model_type": [["llama"]]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configurations(name, model, with_experts, capsys):
    changes, path = CONFIGS[name], model / "config.json"
    config = json.loads(path.read_text())
    assert Pretrained(model, 32).shape.family == "llama"
    path.write_text(json.dumps(config | changes if isinstance(changes, dict) else changes))
    with pytest.raises(SlmError, match=r"config\.json"):
        Pretrained(model, 32)
    code, _, err = call(capsys, with_experts, "pretrain", "--init-from", str(model), "--name", "hostile")
    assert code == 1 and err.count("\n") == 1 and "config.json" in err and not with_experts.run("hostile").exists()
    if name not in ("heads that do not divide", "groups that do not divide"):  # mlx-lm says those
        with pytest.raises(SlmError, match=r"config\.json"):
            check_directory(model)


@pytest.mark.parametrize("extra", [{"model_file": "evil.py"}, {"auto_map": {"AutoModel": "evil.Model"}}])
def test_code_of_its_own_is_not_run(extra, model, with_experts, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | extra))
    (model / "evil.py").write_text(f"open({str(model / 'hacked')!r}, 'w')")
    code, _, err = call(capsys, with_experts, "generate", str(model), "-p", "x")
    assert code == 1 and "brings code of its own" in err and not (model / "hacked").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"])
def test_a_flipped_byte_is_noticed_where_a_model_is_run(name, with_experts, tmp_path, capsys):
    path = tmp_path / "model"
    shutil.copytree(with_experts.model("slm"), path)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    for command in (("generate", str(path), "-p", "x"), ("serve", str(path)), ("evaluate", str(path))):
        code, _, err = call(capsys, with_experts, *command)
        assert code == 1 and err.count("\n") == 1 and name in err and "damaged" in err, err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("data", [b"", b"[]", b"{" * 100_000, b'{"version": "1.0"}', b"\xff\xfe"])
def test_a_tokenizer_that_is_none(name, data, model, with_experts, capsys):
    if (name, data) == ("tokenizer_config.json", b'{"version": "1.0"}'):
        pytest.skip("mlx-lm reads it")
    (model / name).write_bytes(data)
    code, _, err = call(capsys, with_experts, "generate", str(model), "-p", "x")
    assert code == 1 and err.count("\n") == 1 and name in err, err


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 25), "no/such/dir"])
def test_names_of_any_length(name, with_experts, capsys):
    for command in (
        ("generate", name, "-p", "x"),
        ("evaluate", name),
        ("specialize", "--domain", "notes", "--from", name),
    ):
        code, _, err = call(capsys, with_experts, *command)
        assert code == 1 and err.count("\n") == 1 and "Traceback" not in err, err
