"""GGUF in llama.cpp itself: the same ids, the same continuation, the same log-probabilities."""

import json
import urllib.request

import mlx.core as mx
import numpy as np
import pytest
from conftest import AS_LLAMA3, call, copy_of

from mlx_slm.errors import SlmError
from mlx_slm.export.gguf import write_gguf
from mlx_slm.export.model import export_model, load_exported
from mlx_slm.files import load_tokenizer_json
from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.text.hub_tokenizer import open_tokenizer

HARD = [
    "Return the number of bytes.",
    "line ends\n\r\n\r and\ttabs\t\t",
    "  runs   of    spaces  ",
    "\U0001f389\U0001f469\u200d\U0001f467 \u6f22\u5b57 e\u0301 \xe9",
    "a</s>b <s> <unk> <0x0A>",
    "\x00\x07\x7f",
    " lead",
    "",
]
CONTEXT = 32
FORMS = {family: family for family in FAMILIES} | {"llama3": "llama"}


@pytest.fixture(scope="module")
def workspace(with_experts, tmp_path_factory):
    """A model of each family, with weights large enough that its predictions are sure of something."""
    pytest.importorskip("gguf", reason="needs the gguf package (extra: peers)")
    workspace = copy_of(with_experts, tmp_path_factory.mktemp("gguf") / "w")
    tokenizer = open_tokenizer(workspace.tokenizer)
    for seed, family in enumerate(FORMS):
        kv, head = (2, 0) if family == "gpt2" else (1, 32 if family == "qwen3" else 0)
        more = AS_LLAMA3 | {"head_dims": 16} if family == "llama3" else {"head_dims": head}
        shape = Shape(FORMS[family], 2, 64, 256, 2, kv, tokenizer.vocab_size, CONTEXT, **more)
        weights = {n: 3 * v if v.ndim == 2 else v + 0.1 for n, v in flat(initialise(shape, seed)).items()}
        made_from = {"run": "slm", "method": "slm", "tokenizer": tokenizer.fingerprint}
        export_model(workspace.model(family), shape, nested(weights), tokenizer, made_from, {})
    return workspace


class LlamaCpp:
    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp (extra: peers)")
        how = xllamacpp.CommonParams()
        how.model.path, how.n_ctx, how.n_parallel, how.port = str(path), CONTEXT, 1, 0
        how.warmup, how.verbosity = False, -1
        how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(how)

    def ask(self, path, **body):
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text):
        return self.ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def greedy(self, ids, tokens):
        """[(id, {id: log-probability} of the five likeliest)] of each step."""
        answer = self.ask(
            "/completion", prompt=ids, n_predict=tokens, temperature=0, n_probs=5, samplers=["top_k"], top_k=1,
            return_tokens=True, cache_prompt=False, ignore_eos=True,
        )  # fmt: skip
        tops = [{e["id"]: e["logprob"] for e in step["top_logprobs"]} for step in answer["completion_probabilities"]]
        return list(zip(answer["tokens"], tops, strict=True))


@pytest.mark.parametrize("family", list(FORMS))
@pytest.mark.parametrize(("kind", "bound"), [("f32", 1e-3), ("f16", 1e-2), ("q8_0", 0.2)])
def test_llama_cpp_reads_the_same_model(family, kind, bound, workspace, capsys):
    """f32: to the 1e-3 that its tables of GELU in half precision leave. f16 rounds weights and activations to 2^-11,
    q8_0 to half of 1/127 of the largest of 32."""
    code, out, err = call(capsys, workspace, "export", family, "--format", "gguf", "--type", kind, "--json")
    assert code == 0, err
    facts = json.loads(out)
    llama = LlamaCpp(facts["path"])
    path = workspace.model(family)
    tokenizer = load_tokenizer_json(path / "tokenizer.json")
    tokenizer.encode_special_tokens = True
    for text in HARD:
        assert llama.ids(text) == tokenizer.encode(text).ids, repr(text)
    model, _ = load_exported(path)
    ids = tokenizer.encode("Return the number").ids
    seen = []
    for token, top in llama.greedy(ids, 12):
        logits = model.logits(mx.array([ids]))[0, -1]
        chances = np.array(logits - mx.logsumexp(logits))
        seen += [abs(chances[i] - value) for i, value in top.items()]
        if kind == "f32":
            assert token == int(chances.argmax())
        ids = [*ids, token]
    assert len(seen) == 60 and max(seen) < bound
    bits = {"f32": 32, "f16": 16, "q8_0": 8.5}[kind]
    assert bits < facts["bits_per_weight"] < bits + 4, "the rest: vocabulary, norms, positions"


def test_the_command_says_what_cannot_be(workspace, capsys, monkeypatch, tmp_path):
    for options, wanted in (
        (["--format", "gguf", "--type", "q3_k"], "is not one of 'f16', 'q8_0', 'f32'"),
        (["--type", "f16"], "--type is for --format gguf"),
        (["--format", "gguf", "--quantize", "4"], "--type q8_0 makes a small file"),
        (["--format", "gguf", "--license", "mit"], "goes with --type and --fuse alone"),
        (["--bundle", "x", "--language", "en"], "--bundle goes without other options"),
    ):
        code, _, err = call(capsys, workspace, "export", "llama", *options)
        assert code == 2 and wanted in err
    code, _, err = call(capsys, workspace, "export", "lama", "--format", "gguf")
    assert code == 1 and "did you mean llama?" in err
    model, _ = load_exported(workspace.model("llama"))
    shape = Shape(**model.shape.to_dict() | {"vocab_size": 10})
    with pytest.raises(SlmError, match=r"400 ids, its embedding 10 rows"):
        write_gguf(tmp_path / "a" / "x.gguf", workspace.model("llama"), shape, model.parameters())
    import gguf

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_gguf(tmp_path / "a" / "x.gguf", workspace.model("llama"), model.shape, model.parameters())
    assert list((tmp_path / "a").iterdir()) == [], "nothing half-written"


def test_a_tokenizer_of_byte_level_bpe(workspace, tmp_path):
    """As models of the Hub have: gpt2's and smollm's pre-tokenizers are written, another one is refused."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    shape = Shape("llama", 1, 32, 128, 2, 2, 330, CONTEXT)
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for steps, known in (([plain], True), ([digits, plain], True), ([pre_tokenizers.Whitespace(), plain], False)):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
        tokenizer.train_from_iterator(["Return the number of bytes 123 4567 it's \u6f22 we'll"] * 4, trainer)
        tokenizer.add_tokens([AddedToken("<own>", normalized=False)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
        if not known:
            with pytest.raises(SlmError, match=r"BPE, pre-tokenizer Whitespace, ByteLevel.*convert_hf_to_gguf"):
                write_gguf(tmp_path / "x.gguf", tmp_path, shape, initialise(shape, 0))
            continue
        write_gguf(tmp_path / "x.gguf", tmp_path, shape, initialise(shape, 0))
        llama = LlamaCpp(tmp_path / "x.gguf")
        tokenizer.encode_special_tokens = True
        for text in [*HARD[:4], "it's we'll 12345, 6\u00a07", "\n\n\n  x"]:
            assert llama.ids(text) == tokenizer.encode(text).ids, repr(text)
