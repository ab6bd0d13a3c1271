"""Shared: a small workspace made from docstrings of the standard library; the real corpora where they are at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import hypothesis
import pytest

import mlx_slm  # noqa: F401  (before mlx: the BLAS)
from mlx_slm.cli import run
from mlx_slm.config.files import dump_config
from mlx_slm.config.schema import (
    ClustersConfig,
    Config,
    DataConfig,
    FinetuningConfig,
    MixtureConfig,
    ModelConfig,
    ProjectionConfig,
    TokenizerConfig,
    TrainingConfig,
)
from mlx_slm.errors import SlmError
from mlx_slm.experts.experts import Experts
from mlx_slm.export.model import huggingface_config
from mlx_slm.machine import runtime
from mlx_slm.methods.requests import Pretraining
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.rope import RopeScaling
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.stages.pretrain import pretrain
from mlx_slm.storage.arrays import save_arrays
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.docstrings import documents
from mlx_slm.text.prepare import prepare
from mlx_slm.text.sources import Preparation
from mlx_slm.text.store import Store
from mlx_slm.text.tokenizer import TrainedTokenizer
from mlx_slm.training.find import find_run

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # CUDA and M5: products of fp32 would keep 10 bits
CORPORA = Path(os.environ.get("MLX_SLM_CORPORA", Path(__file__).parents[2] / "shared" / "corpora"))


def pytest_addoption(parser):
    parser.addoption("--as-gpu", action="store_true", help="take the forms for a GPU (bf16, one stream) on this device")


def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started this in the background
    if config.getoption("--as-gpu"):
        os.environ["MLX_SLM_AS_GPU"] = "1"


def rounding() -> float:
    """The relative error of one rounding in the compute dtype: what tolerances are multiples of."""
    return 2.0**-9 if runtime.on_gpu() else 2.0**-24


class Recorder(Report):
    """Keeps what was said."""

    def __init__(self):
        self.lines, self.warnings = [], []

    def line(self, text):
        self.lines.append(text)

    def warn(self, text):
        self.warnings.append(text)


KILLED = """
import os, signal, sys
import mlx_slm
from mlx_slm.cli import run
from mlx_slm.text.rows import Sampler

real, calls = Sampler.rows, []
def rows(self, step):
    calls.append(step)
    if len(calls) == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, step)
Sampler.rows = rows
sys.exit(run(sys.argv[1:]))
"""
"""A program that is the command line, and is killed when it asks for rows for the {calls}th time."""


def find_ports(count: int) -> list[int]:
    """Ports of this machine that are free, one behind the other."""
    for first in range(20_000 + os.getpid() % 10_000, 60_000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return list(range(first, first + count))
    raise OSError("no free ports")


def copy_of(workspace: Workspace, directory: Path) -> Workspace:
    """A workspace to write into."""
    shutil.copytree(workspace.root, directory)
    return Workspace(directory)


def call(capsys, workspace: Workspace, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in a workspace."""
    code = run([arguments[0], "--workspace", str(workspace.root), *arguments[1:]])
    return code, *capsys.readouterr()


@pytest.fixture
def report() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def corpora() -> Path:
    if not CORPORA.is_dir():
        pytest.skip("the real corpora are not at hand")
    return CORPORA


def read_jsonl(path: Path) -> list[str]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as file:
        return [json.loads(line)["text"] for line in file]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def publish(directory, texts, family="llama", **config):
    """A small model with random weights and a byte-level tokenizer of its own, as the Hub has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "chat_template": "{{ messages[0]['content'] }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = Shape(family, 1, 32, 128, 2, 2, 448, 64)
    save_arrays(directory / "model.safetensors", FAMILIES[family].to_hub(initialise(shape, 0)), {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(huggingface_config(shape, 0) | config))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\nsomebody's\n")
    return directory


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """1,200 real short documents."""
    found = []
    for text in documents("stdlib"):
        found.append(text)
        if len(found) == 1200:
            break
    return found


AS_LLAMA3 = {"attention_bias": True, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)}
"""What Llama 3 and others of its family have beyond a plain one. Heads of 16: one wavelength stays, two lie between."""


def shape_of(settings: ModelConfig, vocab_size: int, context_length: int, published: bool = False) -> Shape:
    """The shape of a model as trained here or, of the family llama, with all that published ones have."""
    shape = Shape.of(settings, vocab_size, context_length)
    return dataclasses.replace(shape, **AS_LLAMA3) if published else shape


def small_config(**changes) -> Config:
    sections = {
        "data": DataConfig(context_length=32, valid_fraction=0.1, test_fraction=0.1),
        "tokenizer": TokenizerConfig(vocab_size=400),
        "clusters": ClustersConfig(encoder="lsi", dims=8),
        "model": ModelConfig(family="llama", num_layers=2, dims=32, num_heads=4, num_kv_heads=2),
        "training": TrainingConfig(
            steps=12,
            learning_rate=3e-3,
            warmup_steps=4,
            batch_rows=8,
            report_every=4,
            eval_every=6,
            eval_tokens=2000,
            checkpoint_every=5,
        ),
        "finetuning": FinetuningConfig(
            learning_rate=1e-3, max_steps=30, warmup_steps=2, batch_rows=4, eval_tokens=2000
        ),
    }
    return Config(**(sections | changes))


@pytest.fixture(scope="session")
def config() -> Config:
    return small_config()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, texts, config) -> Workspace:
    """A workspace with a tokenizer, the generic set, and a domain `notes`. Do not write into it."""
    folder = tmp_path_factory.mktemp("prepared")
    workspace = Workspace(folder / "workspace")
    generic, notes = (
        write_jsonl(folder / "generic.jsonl", texts[:900]),
        write_jsonl(folder / "notes.jsonl", texts[900:]),
    )
    prepare(Project(workspace, config), Preparation("generic", [str(generic)]))
    prepare(Project(workspace, config), Preparation("notes", [str(notes)]))
    return workspace


@pytest.fixture(scope="session")
def expert_config() -> Config:
    return small_config(
        projection=ProjectionConfig(k=4, h=3, clusters_per_step=2, spread=0.3), mixture=MixtureConfig(k=4)
    )


@pytest.fixture(scope="session")
def with_experts(prepared, expert_config, tmp_path_factory) -> Workspace:
    """A workspace with a network `pn`, a mixture `mix` and the single model `slm`. Do not write into it."""
    workspace = Workspace(tmp_path_factory.mktemp("experts") / "w")
    shutil.copytree(prepared.root, workspace.root)
    workspace.config_file.write_text(dump_config(expert_config))
    for method in ("pn", "mix", "slm"):
        pretrain(Project(workspace, expert_config), Pretraining(method))
    experts_of(workspace, "pn").assigned(expert_config, "notes", "train", Report())
    return workspace


def experts_of(workspace: Workspace, name: str) -> Experts:
    """The experts of a run."""
    return Experts(workspace, find_run(workspace, name))


@pytest.fixture(scope="session")
def store(prepared) -> Store:
    return Store(prepared.data("generic", "train"))


@pytest.fixture(scope="session")
def tokenizer(prepared) -> TrainedTokenizer:
    return TrainedTokenizer(prepared.tokenizer)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """At least 2,000 real short texts: paragraphs of docstrings of the standard library."""
    found = dict.fromkeys(
        " ".join(part.split())[:160] for text in documents("stdlib") for part in text.split("\n\n") if len(part) > 60
    )
    return list(found)[:3000]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the default sentence encoder, from the wheel that has it."""
    from mlx_slm.config.schema import DEFAULT_ENCODER
    from mlx_slm.embedding.encoder import find_directory

    try:
        return find_directory(DEFAULT_ENCODER)
    except SlmError:
        pytest.skip("the default encoder is not on this machine (extra: peers)")


@pytest.fixture(scope="session")
def sentence_encoder(minilm):
    from mlx_slm.embedding.bert import SentenceEncoder

    return SentenceEncoder(minilm)
