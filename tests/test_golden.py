"""The first 20 losses of every method on fixed text and seeds, against those that are committed.

On the processor and with the versions that wrote them they are the same bits; elsewhere 1e-3 apart at the most. To
write them again after a change that is meant to change them: `python tests/test_golden.py`.
"""

import json
import os
import random
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_slm.cli import run
from mlx_slm.machine import blas, runtime
from mlx_slm.storage.records import fingerprint

FILE = Path(__file__).with_name("golden.json")
STEPS = 20
QWEN3 = ("--set", "model.family=qwen3", "--set", "model.head_dims=16")
COMMANDS = {
    "slm": ["pretrain"],
    "slm-gpt2": ["pretrain", "--name", "slm-gpt2", "--set", "model.family=gpt2", "--set", "model.num_kv_heads=null"],
    "llm": ["pretrain", "--method", "llm"],
    "is-notes": ["pretrain", "--method", "is", "--domain", "notes", "--name", "is-notes"],
    "pn": ["pretrain", "--method", "pn"],
    "mix/expert-2": ["pretrain", "--method", "mix"],
    "notes-slm": ["specialize", "--domain", "notes", "--name", "notes-slm"],
    "notes-nopt": ["specialize", "--domain", "notes", "--name", "notes-nopt", "--from", "none"],
    "notes-pn": ["specialize", "--domain", "notes", "--name", "notes-pn", "--from", "pn"],
    "notes-mix": ["specialize", "--domain", "notes", "--name", "notes-mix", "--from", "mix"],
    "notes-lora": ["specialize", "--domain", "notes", "--name", "notes-lora", "--lora", "4"],
    "slm-qwen3": ["pretrain", "--name", "slm-qwen3", *QWEN3],
    "pn-qwen3": ["pretrain", "--method", "pn", "--name", "pn-qwen3", *QWEN3],
    "lora-qwen3": ["specialize", "--domain", "notes", "--name", "lora-qwen3", "--from", "slm-qwen3", "--lora", "4"],
    "notes-d": ["specialize", "--domain", "notes", "--name", "notes-d", "--teacher", "llm"],
}
"""By the run whose losses are taken."""
CONFIG = f"""
data: {{context_length: 32, valid_fraction: 0.1, test_fraction: 0.1}}
tokenizer: {{vocab_size: 300}}
clusters: {{encoder: lsi, dims: 8, k: 4}}
projection: {{k: 4, h: 3, spread: 0.3}}
mixture: {{k: 4, tokens: {STEPS * 256}}}
model: {{family: llama, num_layers: 2, dims: 32, num_heads: 4, num_kv_heads: 2}}
large: {{family: gpt2, num_layers: 2, dims: 48, num_heads: 4}}
training: {{steps: {STEPS}, learning_rate: 3.0e-3, warmup_steps: 4, batch_rows: 8, report_every: 1, eval_every: 10,
  eval_tokens: 1000}}
finetuning: {{learning_rate: 1.0e-3, max_steps: {STEPS}, warmup_steps: 2, evaluations_per_pass: 1000, eval_tokens: 200,
  patience: 100}}
"""


def documents(topic: int, count: int) -> list[str]:
    """Sentences of a made-up language, of which every topic has its own words: clusters of them cannot be doubted."""
    draw = random.Random(topic).random  # the same numbers in every version of Python
    words = ["".join("bdfgklmnprst"[int(12 * draw())] + "aeiou"[int(5 * draw())] for _ in range(3)) for _ in range(40)]
    return [" ".join(words[int(40 * draw() ** 2)] for _ in range(25)) + "." for _ in range(count)]


def losses(folder: Path) -> dict[str, list[float]]:
    """The losses of each run of `COMMANDS`, in nats per token, step by step."""
    texts = {"generic": [d for topic in range(4) for d in documents(topic, 200 + 40 * topic)]}
    texts["notes"] = documents(1, 300)[240:]
    (folder / "config.yaml").write_text(CONFIG)
    for name, found in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    prepared = [["prepare", name, str(folder / f"{name}.jsonl")] for name in texts]
    for command in [*prepared, *COMMANDS.values()]:
        where = ["--config", str(folder / "config.yaml"), "--workspace", str(folder / "w"), "--quiet"]
        assert run([*command, *where]) == 0, command
    return {name: of_run(folder / "w" / "runs" / name) for name in COMMANDS}


def of_run(path: Path) -> list[float]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record][:STEPS]


def maker() -> dict[str, str]:
    """What the last bits of a loss depend on."""
    named = {name: version(name) for name in ("mlx", "numpy", "sentencepiece")}
    forced = {key: value for key, value in sorted(os.environ.items()) if key.startswith(("MKL_", "OPENBLAS_", "MLX_"))}
    loops = Path(shutil.which("g++") or "").parent.name  # `native`: vectorised ones
    processor = fingerprint([runtime.device_name(), runtime.cores(), blas.processor(), forced, loops])[:16]
    return named | {"arithmetic": runtime.arithmetic(), "processor": processor}


def test_the_first_losses_are_those_that_were_written_down(tmp_path):
    golden, found = json.loads(FILE.read_text()), losses(tmp_path)
    assert set(found) == set(golden["losses"]) and all(len(each) == STEPS for each in found.values())
    if golden["maker"] == maker():
        assert found == golden["losses"]
    bound = 2e-2 if runtime.on_gpu() else 1e-3
    for name, expected in golden["losses"].items():
        assert found[name] == pytest.approx(expected, rel=bound), name


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps({"maker": maker(), "losses": losses(Path(folder))}, indent=1) + "\n")
    sys.exit()
