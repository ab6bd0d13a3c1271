"""`export`: cards, quantised models, the Hub; and what other programs make of an exported model."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import mlx.core as mx
import pytest
from conftest import call, copy_of, small_config, write_jsonl
from huggingface_hub import ModelCard

from mlx_slm.config.files import dump_config, find_config, load_config
from mlx_slm.export.card import About, about_of
from mlx_slm.export.model import export_model, load_exported
from mlx_slm.export.quantize import bits_per_weight
from mlx_slm.files import load_tokenizer_json
from mlx_slm.machine.trees import flat, nested
from mlx_slm.models.families import FAMILIES
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.storage.artifacts import MANIFEST, load_manifest
from mlx_slm.storage.records import read_record, write_record
from mlx_slm.text.hub_tokenizer import open_tokenizer


@pytest.fixture(scope="module")
def workspace(with_experts, tmp_path_factory):
    """With the model `slm`, whose sizes are multiples of 32, and the domain `notes`."""
    return copy_of(with_experts, tmp_path_factory.mktemp("exported") / "w")


def mlx_lm(*arguments, said_to_it=None) -> str:
    """mlx-lm's own command line."""
    command = [sys.executable, "-c", "import mlx_slm; from mlx_lm.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, input=said_to_it)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_card_says_what_the_hub_reads(workspace, capsys):
    call(capsys, workspace, "evaluate", "slm", "--domain", "notes")
    options = ["--license", "mit", "--language", "en", "--dataset", "me/texts", "--base-model", "me/base"]
    code, out, err = call(capsys, workspace, "export", "slm", *options, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["bits_per_weight"] == 32
    card = ModelCard.load(f"{facts['path']}/README.md")
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["language"] == ["en"] and data["pipeline_tag"] == "text-generation"
    assert data["datasets"] == ["me/texts"] and data["base_model"] == "me/base" and data["library_name"] == "mlx"
    (results,) = data["model-index"][0]["results"]
    row = json.loads((workspace.results / "evaluations.jsonl").read_text().splitlines()[-1])
    values = {metric["type"]: metric["value"] for metric in results["metrics"]}
    assert values["perplexity"] == pytest.approx(row["perplexity"], abs=1e-4)
    assert values["bits_per_byte"] == pytest.approx(row["bits_per_byte"], abs=1e-4)
    assert "mlx_lm.lora --model . --train --data DIRECTORY --num-layers -1" in card.text and "Limits" in card.text
    manifest = load_manifest(workspace.model("slm"), "model")
    assert set(manifest["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert "mlx_lm.convert --hf-path . --mlx-path 4bit -q --q-group-size 32" in card.text, "32 wide"
    assert "starts behind `</s>`" in card.text and "one after the other" in card.text


def test_a_card_keeps_what_was_said_and_written_by_hand(workspace, capsys):
    path = workspace.model("slm")
    said = ["--license", "mit", "--language", "en", "--language", "de", "--base-model", "me/base"]
    call(capsys, workspace, "export", "slm", *said)
    (path / "notes.txt").write_text("mine")
    call(capsys, workspace, "export", "slm", "--dataset", "me/texts")
    data = ModelCard.load(path / "README.md").data.to_dict()
    assert (data["license"], data["language"], data["datasets"]) == ("mit", ["en", "de"], ["me/texts"])
    text = (path / "README.md").read_text() + "by hand"
    (path / "README.md").write_text(text)
    code, _, err = call(capsys, workspace, "generate", "slm", "-p", "x", "-m", "1", "--json")
    assert code == 0, "a card that was changed makes no model unusable"
    shutil.copytree(path, workspace.model("kept"))
    code, _, err = call(capsys, workspace, "export", "kept", "--license", "apache-2.0")
    assert code == 0 and "was changed by hand, so it stays" in err
    assert (workspace.model("kept") / "README.md").read_text() == text
    assert about_of(workspace.model("kept")) == About("mit", ("en", "de"), ("me/texts",), "me/base")
    shutil.rmtree(workspace.model("kept"))
    for options in ([], ["--quantize", "8"]):
        code, _, err = call(capsys, workspace, "export", "slm", *options)
        assert code == 0 and (path / "README.md").read_text() == text and (path / "notes.txt").exists(), err
    run = workspace.run("slm") / "run.json"
    record = read_record(run)
    write_record(run, record | {"started": record["started"] + 1})  # as if it had been trained again
    code, _, err = call(capsys, workspace, "export", "slm")
    assert code == 0 and "was changed by hand" in err
    assert (path / "README.md").read_text() == text and (path / "notes.txt").read_text() == "mine"
    (path / "README.md").unlink()
    call(capsys, workspace, "export", "slm", "--license", "mit")


def test_a_card_shows_evaluations_of_its_own_weights(workspace, capsys):
    copy = copy_of(workspace, workspace.root.parent / "again")
    call(capsys, copy, "evaluate", "slm", "--domain", "notes")
    call(capsys, copy, "export", "slm")
    assert "| notes | test |" in (copy.model("slm") / "README.md").read_text()
    model, manifest = load_exported(copy.model("slm"))
    weights = nested({name: value + 0.01 for name, value in flat(model.parameters()).items()})
    tokenizer = open_tokenizer(copy.tokenizer)
    export_model(copy.model("new"), model.shape, weights, tokenizer, manifest["inputs"], {})
    shutil.rmtree(copy.model("slm"))
    copy.model("new").rename(copy.model("slm"))
    shutil.rmtree(copy.run("slm"))
    with open(copy.results / "evaluations.jsonl", "a") as file:
        file.write('{"model": "slm", "set"')
    code, _, err = call(capsys, copy, "export", "slm")
    assert code == 0, err
    assert "| notes | test |" not in (copy.model("slm") / "README.md").read_text(), "of the weights of before"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_as_mlx_lm_does_it(bits, workspace, capsys):
    code, out, err = call(capsys, workspace, "export", "slm", "--quantize", str(bits), "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert bits < facts["bits_per_weight"] < bits + 1.2, (
        "groups of 32: 16 bits of scale and 16 of offset; and the norms"
    )
    whole, quantised = facts["perplexity"]
    assert quantised != whole and quantised == pytest.approx(whole, rel={4: 0.2, 8: 0.01}[bits])
    code, out, err = call(capsys, workspace, "evaluate", f"slm-{bits}bit", facts["path"], "--domain", "notes", "--json")
    assert code == 0, err
    first, second = json.loads(out)["results"]
    assert first["perplexity"] == second["perplexity"]
    code, out, err = call(capsys, workspace, "generate", f"slm-{bits}bit", "-p", "Return", "-m", "4", "--json")
    assert code == 0 and json.loads(out)["tokens"] >= 1, err
    for options in (["--quantize", "4"], ["--format", "gguf"]):
        code, _, err = call(capsys, workspace, "export", f"slm-{bits}bit", *options)
        assert code == 1 and "name the model it is of" in err


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_quantises_and_is_evaluated(family, workspace, capsys):
    tokenizer = open_tokenizer(workspace.tokenizer)
    shape = Shape(family, 2, 64, 256, 2, 2, tokenizer.vocab_size, 32)
    weights = nested({n: v + 0.1 for n, v in flat(initialise(shape, 0)).items()})
    made_from = {"run": "slm", "method": "slm", "tokenizer": tokenizer.fingerprint}
    export_model(workspace.model(family), shape, weights, tokenizer, made_from, {"domain": "notes"})
    code, out, err = call(capsys, workspace, "export", family, "--quantize", "8", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert 8.5 <= facts["bits_per_weight"] < 10 and facts["set"] == "notes"
    whole, quantised = facts["perplexity"]
    assert quantised == pytest.approx(whole, rel=0.02)


def test_quantising_goes_on_where_its_cost_cannot_be_measured(workspace, tmp_path, capsys):
    empty = type(workspace)(tmp_path / "empty")
    code, out, err = call(capsys, empty, "export", str(workspace.model("slm")), "--quantize", "4", "--json")
    assert code == 0 and "is not measured" in err, err
    assert "perplexity" not in json.loads(out) and (empty.model("slm-4bit") / "config.json").exists()
    code, _, err = call(capsys, empty, "export", str(empty.model("slm-4bit")), "--fuse")
    assert code == 1 and "--fuse has nothing to apply" in err


def test_weights_of_other_kinds_are_not_taken_for_numbers(workspace, tmp_path, capsys):
    copy = copy_of(workspace, tmp_path / "w").model("slm")
    (copy / MANIFEST).unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    code, _, err = call(capsys, workspace, "evaluate", str(copy), "--domain", "notes")
    assert code == 1 and "of the kind fp8" in err and err.count("\n") == 1
    (copy / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(copy / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    mx.save_safetensors(str(copy / "model.safetensors"), weights | {name: weights[name].astype(mx.int8)})
    code, _, err = call(capsys, workspace, "evaluate", str(copy), "--domain", "notes")
    assert code == 1 and "no numbers that a model multiplies with" in err and err.count("\n") == 1


def test_a_target_that_cannot_be_written(workspace, tmp_path, capsys, monkeypatch):
    copy = copy_of(workspace, tmp_path / "w")
    shutil.rmtree(copy.root / "models" / "slm-4bit", ignore_errors=True)
    before = sorted(p.name for p in (copy.root / "models").iterdir())
    real = os.mkdir

    def refused(path, *how, **more):
        if "slm-4bit" in str(path) or str(path).endswith("gguf"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *how, **more)

    monkeypatch.setattr(os, "mkdir", refused)
    for options in (["--quantize", "4"], ["--format", "gguf"]):
        code, _, err = call(capsys, copy, "export", "slm", *options)
        assert code == 1 and "Permission denied" in err and "Traceback" not in err and err.count("\n") == 1, err
    assert sorted(p.name for p in (copy.root / "models").iterdir()) == before


def test_a_model_that_does_not_divide_says_so(workspace, capsys):
    tokenizer = open_tokenizer(workspace.tokenizer)
    shape = Shape("llama", 1, 24, 64, 2, 2, tokenizer.vocab_size, 32)
    made_from = {"run": "slm", "method": "slm", "tokenizer": tokenizer.fingerprint}
    export_model(workspace.model("odd"), shape, initialise(shape, 0), tokenizer, made_from, {})
    code, out, _ = call(capsys, workspace, "export", "odd")
    assert code == 0 and "no multiple of 64" in out
    code, _, err = call(capsys, workspace, "export", "odd", "--quantize", "4")
    assert code == 1 and "no multiple of 32" in err and not workspace.model("odd-4bit").exists()


def test_an_unfinished_run_and_a_name_that_is_none(workspace, capsys):
    code, _, err = call(capsys, workspace, "export", "slm", "--quantize", "3")
    assert code == 2 and "'3' is not one of '4', '8'" in err
    code, _, err = call(capsys, workspace, "export", "pn")
    assert code == 1 and "--bundle DIR hands them over" in err and not workspace.model("pn").exists()
    code, _, err = call(capsys, workspace, "export", "slm", "--fuse")
    assert code == 1 and "there are no adapters for --fuse" in err
    code, _, err = call(capsys, workspace, "export", "slm", "--private")
    assert code == 2 and "--private is for --push-to-hub" in err
    code, _, err = call(capsys, workspace, "export", "sml")
    assert code == 1 and "did you mean slm?" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["quickstart", "mini", "laptop", "mac", "paper"])
def test_shipped_configurations_quantise_whole(name):
    """mlx-lm's groups of 64 go into every size, so that four bits are 4.5 a weight and the norms."""
    config = load_config(find_config(name))
    for section in (config.model, config.large):
        assert Shape.of(section, config.tokenizer.vocab_size, config.data.context_length).falls_into(64), section


def test_mlx_lm_trains_converts_fuses_and_chats(workspace, tmp_path, capsys):
    """Its own command line on a model as it was exported: the commands of the card."""
    model = workspace.model("slm")
    call(capsys, workspace, "export", "slm")
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid"):
        messages = [{"role": "user", "content": "Return the"}, {"role": "assistant", "content": " number of bytes."}]
        (data / f"{split}.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 8)
    adapters = tmp_path / "adapters"
    how = ["--num-layers", -1, "--iters", 2, "--batch-size", 2, "--max-seq-length", 32, "--adapter-path", adapters]
    said = mlx_lm("lora", "--model", model, "--train", "--data", data, *how)
    assert "Trainable parameters" in said and (adapters / "adapters.safetensors").exists()
    fused = tmp_path / "fused"
    mlx_lm("fuse", "--model", model, "--adapter-path", adapters, "--save-path", fused)
    quantised = tmp_path / "quantised"
    mlx_lm("convert", "--hf-path", model, "--mlx-path", quantised, "-q", "--q-group-size", 32)
    code, out, err = call(
        capsys, workspace, "evaluate", str(fused), str(quantised), "slm", "--domain", "notes", "--json"
    )
    assert code == 0, err
    tuned, four, whole = (row["perplexity"] for row in json.loads(out)["results"])
    assert tuned != whole != four and four == pytest.approx(whole, rel=0.2)
    assert bits_per_weight(quantised, load_manifest(model, "model")["info"]["shape"]) < 5.2
    own = load_tokenizer_json(model / "tokenizer.json").encode("Return").ids
    said = mlx_lm("generate", "--model", fused, "--prompt", "Return", "--max-tokens", 3, "--ignore-chat-template")
    assert f"Prompt: {len(own)} tokens" in said and own[0] == 1
    said = mlx_lm("chat", "--model", model, "--max-tokens", 3, said_to_it="Return\nq\n")
    assert "bye" in said and "Traceback" not in said, said
    pytest.importorskip("gguf", reason="needs the gguf package (extra: peers)")
    for directory in (fused, model):
        code, out, err = call(capsys, workspace, "export", str(directory), "--format", "gguf", "--json")
        assert code == 0, err
    code, _, err = call(capsys, workspace, "export", str(quantised), "--format", "gguf")
    assert code == 1 and "its weights are quantised" in err


@pytest.mark.parametrize("form", ["text", "completions", "messages"])
def test_mlx_lm_trains_on_data_of_every_form_with_its_defaults(form, workspace, tmp_path):
    rows = {
        "text": {"text": "Return the number of bytes."},
        "completions": {"prompt": "Return the", "completion": " number of bytes."},
        "messages": {"messages": [{"role": "user", "content": "Return"}, {"role": "assistant", "content": " it."}]},
    }
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(rows[form])}\n" * 8)
    how = ["--iters", 1, "--num-layers", -1, "--max-seq-length", 32, "--adapter-path", tmp_path / "adapters"]
    said = mlx_lm("lora", "--model", workspace.model("slm"), "--train", "--data", tmp_path, *how)
    assert "Traceback" not in said and (tmp_path / "adapters" / "adapters.safetensors").exists()


def test_a_directory_with_another_tokenizer_reads_the_text_with_it(workspace, tmp_path, capsys):
    other = type(workspace)(tmp_path / "other")
    words = write_jsonl(tmp_path / "words.jsonl", [f"word {i} and {i * 7} more, {i % 13}" for i in range(900)])
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(small_config()))
    code, _, err = call(capsys, other, "prepare", "generic", str(words), "--config", str(config))
    assert code == 0, err
    copy = copy_of(workspace, tmp_path / "copy").model("slm")
    (copy / MANIFEST).unlink()
    code, out, err = call(capsys, other, "evaluate", str(copy), "--domain", "generic", "--json")
    assert code == 0 and json.loads(out)["results"][0]["tokenizer"] == "own", err


class Hub(BaseHTTPRequestHandler):
    """The few requests of the Hub's interface that an upload makes."""

    repos: ClassVar[dict] = {}
    broken = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer token" or self.broken:
            return self.answer({"error": "no"}, 401 if not self.broken else 500)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.setdefault(name, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                self.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(
            {
                "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{'1' * 40}",
                "commitOid": "1" * 40,
                "success": True,
            }
        )

    def do_GET(self):
        self.answer({"id": "me/notes", "sha": "1" * 40, "siblings": []})

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_pushing_to_a_hub(workspace, capsys):
    """A stand-in of its HTTP interface: the real one was not reached."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    script = "import sys; from mlx_slm.cli import run; sys.exit(run(sys.argv[1:]))"

    def push(repo, token):
        environment = os.environ | {
            "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", script, "export", "slm", "--workspace", str(workspace.root)]
        options = ["--license", "mit", "--push-to-hub", repo, "--json"]
        return subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=120)

    try:
        done = push("me/notes", "token")
        assert done.returncode == 0, done.stderr
        uploaded, path = Hub.repos["me/notes"], workspace.model("slm")
        assert set(uploaded) == {p.name for p in path.iterdir()} - {MANIFEST}
        assert all(data == (path / name).read_bytes() for name, data in uploaded.items())
        for repo, token, broken, wanted in (
            ("me/notes", "wrong", False, "log in with `hf auth login`"),
            ("not a name", "token", False, "not the name of a repository"),
            ("me/notes", "token", True, "the Hub did not take it"),
        ):
            Hub.broken = broken
            done = push(repo, token)
            assert done.returncode == 1 and f"--push-to-hub {repo}" in done.stderr, done.stderr
            assert "Traceback" not in done.stderr and wanted in done.stderr.splitlines()[-1]
    finally:
        Hub.broken = False
        server.shutdown()
        server.server_close()
    done = push("me/notes", "token")
    assert done.returncode == 1 and "the Hub was not reached" in done.stderr and "Traceback" not in done.stderr
