import pytest
from conftest import read_jsonl

from mlx_slm.config.schema import TokenizerConfig
from mlx_slm.errors import SlmError
from mlx_slm.text.tokenizer import TrainedTokenizer, pieces, sample_documents, train_tokenizer

PROBES = [
    "a  b",
    " leading",
    "   three",
    "trailing  \n\n",
    "tabs\tand\r\nreturns\n\n\n  x",
    "",
    "漢字 🙂 é",
    "literal <unk> \n <0x0A> text",
    "x" * 300,
]


MADE_FROM = {"settings": {}, "text": "by hand"}


def huggingface(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory))


def test_encode_and_decode_are_lossless_and_count_bytes(tokenizer, texts):
    for text, ids in zip(texts + PROBES, tokenizer.encode(texts + PROBES), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].astype(int).sum() == len(text.encode())
        assert tokenizer.eos_id not in ids


def test_huggingface_form_gives_the_same_ids_and_text(tokenizer, texts):
    other = huggingface(tokenizer.directory)
    probes = [p for p in PROBES if "<unk>" not in p]
    for text, ids in zip(texts + probes, tokenizer.encode(texts + probes), strict=True):
        assert other.encode(text, add_special_tokens=False) == ids
        assert other.encode(text) == [tokenizer.eos_id, *ids], "a text begins as in training"
        assert other.decode(ids) == text
    assert other.eos_token_id == other.bos_token_id == tokenizer.eos_id
    assert len(other) == tokenizer.vocab_size


def test_special_tokens_that_are_written_out_are_text_in_training(tokenizer):
    (ids,) = tokenizer.encode(["a</s>b <unk>"])
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "a</s>b <unk>"


def test_a_chat_is_the_contents_of_its_messages(tokenizer):
    other = huggingface(tokenizer.directory)
    messages = [{"role": "system", "content": "Return"}, {"role": "user", "content": " the number"}]
    for add in (False, True):
        ids = other.apply_chat_template(messages, add_generation_prompt=add)["input_ids"]
        assert ids == [tokenizer.eos_id, *tokenizer.encode(["Return the number"])[0]]


def test_mlx_lm_streams_text_back(tokenizer):
    from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, load

    wrapped = load(tokenizer.directory)
    detokenizer = wrapped.detokenizer
    assert isinstance(detokenizer, SPMStreamingDetokenizer)
    for text in PROBES:
        detokenizer.reset()
        streamed = ""
        for token in tokenizer.encode([text])[0]:
            detokenizer.add_token(token)
            streamed += detokenizer.last_segment
        detokenizer.finalize()
        assert streamed + detokenizer.last_segment == text


@pytest.mark.parametrize("domain", ["stackexchange", "pubmed"])
def test_every_document_of_a_real_domain(tokenizer, corpora, domain):
    other = huggingface(tokenizer.directory)
    for split in ("train", "valid", "test"):
        documents = read_jsonl(corpora / "domains" / domain / f"{split}.jsonl.gz")
        encoded = tokenizer.encode(documents)
        assert [tokenizer.decode(ids) for ids in encoded] == documents
        if split == "valid":
            assert [other.encode(text, add_special_tokens=False) for text in documents] == encoded


def test_pieces_join_to_the_text_and_stay_below_the_limit():
    text = "".join(f"wörd{i} " + "\n" * (i % 5 == 0) for i in range(3000)) + "漢" * 5000
    parts = list(pieces(text))
    assert "".join(parts) == text and max(len(part.encode()) for part in parts) <= 4000


def test_long_documents_reach_the_trainer(tmp_path):
    # The default limit of 4,192 bytes would skip a document of one long line.
    text = " ".join(f"zyx{i % 50}" for i in range(20_000))
    made = train_tokenizer(tmp_path / "t", [text], TokenizerConfig(vocab_size=310), MADE_FROM)
    assert len(made.encode([text])[0]) < len(text) / 2


def test_sample_is_repeatable_whatever_the_order_and_bounded(texts):
    documents = [(str(i).rjust(8, "0").encode()[::-1], text) for i, text in enumerate(texts)]
    config = TokenizerConfig(sample_bytes=20_000)
    found = sample_documents(iter(documents), config)
    assert found == sample_documents(reversed(documents), config)
    size = sum(len(text.encode()) for text in found)
    assert 20_000 <= size < 20_000 + max(len(text.encode()) for text in texts)
    assert found != sample_documents(iter(documents), TokenizerConfig(sample_bytes=20_000, seed=1))
    scanned = []
    sample_documents((scanned.append(d) or d for d in documents), TokenizerConfig(scan_bytes=5000))
    assert sum(len(text.encode()) for _, text in scanned[:-1]) < 5000


def test_vocabulary_must_fit_the_text(tmp_path):
    with pytest.raises(
        SlmError, match=r"vocab_size 9000 is more than .* bytes of generic text support: set it to \d+ or less"
    ):
        train_tokenizer(
            tmp_path / "t", ["a few words of text here, not many"] * 3, TokenizerConfig(vocab_size=9000), {}
        )
    with pytest.raises(SlmError, match=r"vocab_size 200 is too small: .* need \d+ at least"):
        train_tokenizer(tmp_path / "t", ["a few words"], TokenizerConfig(vocab_size=200), MADE_FROM)
    assert not (tmp_path / "t").exists()


def test_training_is_repeatable(tmp_path, texts, tokenizer):
    a, b = (train_tokenizer(tmp_path / n, texts[:200], TokenizerConfig(vocab_size=400), MADE_FROM) for n in "ab")
    assert a.fingerprint == b.fingerprint != tokenizer.fingerprint


def test_a_damaged_tokenizer_is_noticed(tmp_path, texts):
    train_tokenizer(tmp_path / "t", texts[:200], TokenizerConfig(vocab_size=400), MADE_FROM)
    path = tmp_path / "t" / "tokenizer.json"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SlmError, match=r"tokenizer\.json is damaged"):
        TrainedTokenizer(tmp_path / "t")
