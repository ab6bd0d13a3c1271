"""How a prompt becomes ids: cut before it is encoded, behind what stands in front of a text, within the context."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, processors

from mlx_slm.errors import SlmError
from mlx_slm.export.prompt import Prompts


class Theirs:
    """What of mlx-lm's tokenizer is asked."""

    chat_template = None
    eos_token_id = 1

    def __len__(self):
        return 400


@pytest.fixture
def directory(prepared, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(prepared.tokenizer / name, tmp_path / name)
    return tmp_path


def prompts(directory, **config) -> Prompts:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return Prompts(directory, Theirs())


def test_a_long_text_is_cut_before_it_is_encoded_and_ends_the_same(directory):
    short = prompts(directory, vocab_size=400, max_position_embeddings=32)
    whole = prompts(directory, vocab_size=400)
    text = "Return the number of bytes, and raise an error. " * 400
    cut, _, notes = short.fit(short.encode(text), 8)
    assert cut == [1, *whole.encode(text)[-15:]] and "is longer than the context" in notes[0]
    assert len(short.encode(text)) < len(whole.encode(text)) / 4
    with pytest.raises(SlmError, match=r"19,200 characters are more than the context"):
        short.require_short(text)
    short.require_short("short")


@pytest.mark.parametrize("context", [2, 3, 4, 32])
def test_there_is_always_room_to_go_on(directory, context):
    reads = prompts(directory, vocab_size=400, max_position_embeddings=context)
    for length in range(1, 2 * context + 2):
        ids, max_tokens, _ = reads.fit([1, *range(5, 5 + length - 1)], 100)
        assert ids and max_tokens >= 1 and len(ids) + max_tokens <= context


def test_sizes_of_a_part_that_reads_text(directory):
    reads = prompts(directory, text_config={"vocab_size": 380, "max_position_embeddings": 64})
    assert (reads.vocab_size, reads.context, reads.num_tokens) == (380, 64, 380)
    with pytest.raises(SlmError, match="its embedding has 380 rows"):
        reads.require_known([380])


def test_what_stands_behind_a_text_is_not_in_front_of_it(directory):
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<unk> $A </s>", None, [("<unk>", 0), ("</s>", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(directory / "tokenizer.json"))
    reads = prompts(directory, vocab_size=400)
    ids = reads.encode("a</s> long text")
    assert ids[0] == 0 and 1 not in ids and len(ids) > 8
    assert b"".join(map(reads.piece, ids[1:])) == b"a</s> long text"
