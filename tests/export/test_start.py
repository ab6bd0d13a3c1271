"""`pretrain --init-from`: models that we exported, that transformers wrote, that mlx-lm wrote."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import call, small_config, write_jsonl
from mlx.utils import tree_flatten

from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import DataConfig, ModelConfig
from mlx_slm.errors import SlmError
from mlx_slm.export.model import export_model, load_exported
from mlx_slm.export.start import Pretrained
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer, initialise
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.hub_tokenizer import HuggingFaceTokenizer, open_tokenizer
from mlx_slm.text.store import Store

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def byte_level_tokenizer(texts, folder):
    """A GPT-2 tokenizer of 500 pieces, written by transformers."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: peers)")
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=500, special_tokens=["<|endoftext|>"])
    made.save(str(folder / "raw.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "raw.json"), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder / "model")
    return tokenizer


def transformers_model(family, texts, folder, **changes):
    """A random model that transformers wrote, with a byte-level tokenizer; returns (directory, model)."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: peers)")
    torch = pytest.importorskip("torch", reason="needs torch (extra: peers)")
    tokenizer = byte_level_tokenizer(texts, folder)
    torch.manual_seed(0)
    end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4, **end | changes
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        configure, make = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        }[family]
        sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = configure(**sizes | {"rope_theta": 5000.0, "rms_norm_eps": 1e-5} | end | changes)
        model = make(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    model.save_pretrained(folder / "model")
    return folder / "model", model.eval()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"head_dim": 16}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": LLAMA3, "head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen2", {"attention_bias": True}),
        ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
        ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    ],
)
def test_the_model_that_transformers_wrote_is_what_training_starts_from(tmp_path, texts, family, changes):
    torch = pytest.importorskip("torch", reason="needs torch (extra: peers)")
    directory, peer = transformers_model(family, texts, tmp_path, **changes)
    origin = Pretrained(directory, 32)
    model = Transformer(origin.shape)
    model.update(origin.parameters())
    assert origin.shape.num_parameters == sum(value.size for _, value in tree_flatten(model.parameters()))
    tokens = np.random.default_rng(0).integers(0, 500, (3, 32))
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.array(model.logits(mx.array(tokens))), expected, atol=1e-4)


def test_its_tokenizer_prepares_the_text_and_the_export_runs_everywhere(tmp_path, texts, capsys):
    """The whole path: init from a Hub model, importance sampling, specialise, evaluate, transformers, mlx-lm."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: peers)")
    import mlx_lm

    directory, _ = transformers_model("llama", texts, tmp_path, tie_word_embeddings=False)
    generic, notes = (write_jsonl(tmp_path / f"{n}.jsonl", t) for n, t in (("g", texts[:600]), ("n", texts[600:900])))
    sets = {"generic": [str(generic)], "notes": [str(notes)]}
    config = small_config(data=DataConfig(context_length=32, valid_fraction=0.1, test_fraction=0.1, sets=sets))
    workspace = Workspace(tmp_path / "w")
    workspace.root.mkdir()
    workspace.config_file.write_text(dump_config(config))
    shutil.copyfile(workspace.config_file, workspace.root / "first.yaml")
    start = ("--method", "is", "--domain", "notes", "--k", "5", "--init-from", str(directory))
    code, out, err = call(capsys, workspace, "pretrain", *start)
    assert code == 0, err
    assert f"taking the tokenizer of {directory}" in out
    tokenizer = open_tokenizer(workspace.tokenizer)
    peer = transformers.AutoTokenizer.from_pretrained(str(directory))
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.eos_id == peer.eos_token_id
    assert tokenizer.encode(texts[:50]) == [peer.encode(text, add_special_tokens=False) for text in texts[:50]]
    assert tokenizer.decode_all(tokenizer.encode(texts[:50])) == texts[:50]
    assert "<|endoftext|>" in tokenizer.decode(tokenizer.encode(["a <|endoftext|> b"])[0]), "text, not a special token"
    store = Store(workspace.data("generic", "train"))
    assert store.windows[:]["bytes"].sum() == store.num_bytes
    assert call(capsys, workspace, "specialize", "--domain", "notes", "--from", "is-notes-all")[0] == 0
    code, out, _ = call(capsys, workspace, "evaluate", "is-notes-all", "notes-is-all", "--json")
    before, after = (row["perplexity"] for row in json.loads(out)["results"])
    assert code == 0 and after < before
    model = workspace.model("notes-is-all")
    ids = peer("The file is open", return_tensors="np")["input_ids"]
    exported, _ = load_exported(model)
    ours = np.array(exported.logits(mx.array(ids)))
    loaded, _ = mlx_lm.load(str(model))
    np.testing.assert_allclose(np.array(loaded(mx.array(ids))), ours, atol=1e-4)
    code, out, err = call(capsys, workspace, "pretrain", *start)
    assert code == 0 and "run is-notes-all is finished" in out, err
    code, out, err = call(capsys, workspace, "pretrain", "--config", str(workspace.root / "first.yaml"), *start)
    assert code == 0 and "run is-notes-all is finished" in out, err
    code, _, err = call(capsys, workspace, "pretrain", *start[:-2])
    assert code == 1 and "init_from" in err


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_we_exported_starts_where_it_was(tmp_path, prepared, tokenizer, config, family, capsys):
    shape = Shape.of(ModelConfig(family=family, num_layers=2, dims=32, num_heads=4), 400, 32)
    parameters = initialise(shape, 3)
    made = export_model(
        tmp_path / "mine", shape, parameters, tokenizer, {"method": "none", "tokenizer": tokenizer.fingerprint}, {}
    )
    origin = Pretrained(made, 32)
    assert origin.shape == shape
    for (name, value), (_, expected) in zip(
        sorted(tree_flatten(origin.parameters())), sorted(tree_flatten(parameters)), strict=True
    ):
        assert mx.array_equal(value, expected), name
    shutil.copytree(prepared.root, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    workspace.config_file.write_text(dump_config(config))
    code, _, err = call(capsys, workspace, "pretrain", "--init-from", str(made), "--name", "more")
    assert code == 0, err
    record = json.loads((workspace.run("more") / "run.json").read_text())
    assert record["inputs"]["init_from"] == origin.fingerprint and record["inputs"]["shape"]["family"] == family


def test_mlx_lms_layout_of_gpt2_is_read(tmp_path, tokenizer):
    shape = Shape.of(ModelConfig(family="gpt2", num_layers=2, dims=32, num_heads=4), 400, 64)
    parameters = initialise(shape, 3)
    made = export_model(
        tmp_path / "mine", shape, parameters, tokenizer, {"method": "none", "tokenizer": tokenizer.fingerprint}, {}
    )
    mx.save_safetensors(str(made / "model.safetensors"), dict(tree_flatten(parameters)))
    found = dict(tree_flatten(Pretrained(made, 16).parameters()))
    for name, expected in tree_flatten(parameters):
        assert mx.array_equal(found[name], expected[:16] if name == "model.wpe.weight" else expected), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 80}, "n_inner is 80, mlx-lm reads"),
        (
            {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "tie_word_embeddings": False},
            "tie_word_embeddings is False",
        ),
        ({"model_type": "mistral"}, "of type 'mistral'; supported: gpt2, llama"),
        ({"attention_bias": True}, "do not fit config.json: model.layers.0.self_attn.q_proj.bias is missing"),
        ({"attention_bias": None, "head_dim": 7}, "heads of 7 numbers"),
        ({"model_type": "qwen3", "attention_bias": True}, "not supported: attention_bias is True"),
        ({"mlp_bias": True}, "not supported: mlp_bias is True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type llama3 needs low_freq_factor, high_freq"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "high_freq_factor 4 is not above low_freq_factor 4"),
        ({"rope_scaling": LLAMA3 | {"factor": float("inf")}}, "rope_scaling.factor: input should be less than"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8}}, "not supported: rope_scaling is"),
        ({"head_dim": 16}, r"q_proj.weight \(32, 32\), expected \(64, 32\)"),
        ({"head_dim": 7}, "heads of 7 numbers: rotary positions need an even size"),
        ({"quantization": {"bits": 4}}, "quantised; dequantise them first: mlx_lm.convert"),
        ({"max_position_embeddings": 8}, "it reads 8 tokens, data.context_length is 32: set data.context_length=8"),
        ({"num_hidden_layers": 3}, "do not fit config.json: model.layers.2"),
        ({"intermediate_size": 64}, r"mlp.down_proj.weight \(32, 128\), expected \(32, 64\)"),
    ],
)
def test_a_directory_that_does_not_fit_is_named(tmp_path, tokenizer, changes, message):
    shape = Shape.of(ModelConfig(family="llama", num_layers=2, dims=32, num_heads=4), 400, 32)
    made = export_model(
        tmp_path / "mine",
        shape,
        initialise(shape, 3),
        tokenizer,
        {"method": "none", "tokenizer": tokenizer.fingerprint},
        {},
    )
    config = made / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(SlmError, match=message):
        Pretrained(made, 32).parameters()


def test_another_tokenizer_is_refused(tmp_path, prepared, texts, config, capsys):
    directory, _ = transformers_model("gpt2", texts, tmp_path)
    shutil.copytree(prepared.root, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    workspace.config_file.write_text(dump_config(config))
    code, _, err = call(capsys, workspace, "pretrain", "--init-from", str(directory))
    assert code == 1 and "it has another tokenizer than this workspace: use a new --workspace" in err
    (directory / "tokenizer.json").unlink()
    code, _, err = call(capsys, workspace, "pretrain", "--init-from", str(directory))
    assert code == 1 and "has no tokenizer.json" in err


def test_killed_while_its_text_is_tokenised_it_goes_on(tmp_path, texts, capsys, monkeypatch):
    from mlx_slm.text import prepare as preparing

    directory, _ = transformers_model("gpt2", texts, tmp_path)
    (directory / "tokenizer_config.json").unlink()
    sets = {"generic": [str(write_jsonl(tmp_path / "g.jsonl", texts))]}
    config = small_config(data=DataConfig(context_length=32, sets=sets))
    (tmp_path / "c.yaml").write_text(dump_config(config))
    workspace = Workspace(tmp_path / "w")
    start = ("pretrain", "--config", str(tmp_path / "c.yaml"), "--init-from", str(directory))
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "tokenise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(capsys, workspace, *start)[0] == 130
    code, _, err = call(capsys, workspace, *start)
    assert code == 0, err
    assert json.loads((workspace.model("slm") / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
