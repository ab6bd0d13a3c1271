"""Faults, injected and counted: kills, renames cut off, full disks, flipped bits, little memory, two terminals.

    scripts/faults [--seed S] [--moments N] [--kinds kill,rename,disk,flip,memory,together]

Each trial runs a command of the program on a copy of a small workspace, harms it, runs the same command again, and
compares every file of numbers with those of an undisturbed run. An outcome is `held`, or what went wrong: `traceback`,
`silent` (exit 0 and other numbers), `lost` (the command does not end well afterwards), `hung`. Prints the table that
docs/reliability.md holds; exits with 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

NUMBERS = {".safetensors", ".bin", ".npy", ".model", ".u4", ".i8", ".f16"}
LIMIT = 120
CONFIG = {
    "data": {"context_length": 32, "valid_fraction": 0.1, "test_fraction": 0.1},
    "tokenizer": {"vocab_size": 400},
    "clusters": {"k": 4, "encoder": "lsi", "dims": 8},
    "model": {"family": "llama", "num_layers": 1, "dims": 32, "num_heads": 4},
    "projection": {"k": 4, "h": 2, "clusters_per_step": 2},
    "training": {"steps": 40, "learning_rate": 3e-3, "warmup_steps": 4, "batch_rows": 8, "report_every": 10}
    | {"eval_every": 20, "eval_tokens": 2000, "checkpoint_every": 5},
    "finetuning": {"max_steps": 30, "batch_rows": 4, "eval_tokens": 2000, "evaluations_per_pass": 40},
}


@dataclass(frozen=True)
class Command:
    name: str
    arguments: tuple[str, ...]


@dataclass
class Site:
    """A folder with sources, and for each command the workspace before and the numbers after it."""

    root: Path
    commands: list[Command]
    seconds: dict[str, float]
    numbers: dict[str, dict[str, str]]

    def before(self, command: Command) -> Path:
        return self.root / f"before-{command.name}"


def run(arguments, workspace: Path, prelude: str = "", preexec=None, kill_after: float | None = None):
    """(exit code, stdout and stderr); code None where it hung. `prelude`: Python that runs first."""
    code = f"{prelude}\nimport sys\nfrom mlx_slm.cli import main\nmain()"
    words = [sys.executable, "-c", code, arguments[0], "--workspace", str(workspace), *arguments[1:]]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            words, stdout=said, stderr=said, env=environment, preexec_fn=preexec, cwd=workspace.parent
        )
        try:
            process.wait(LIMIT if kill_after is None else kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if kill_after is None:
                return None, "hung"
        said.seek(0)
        return process.returncode, said.read().decode(errors="replace")


def numbers_of(workspace: Path) -> dict[str, str]:
    """SHA-256 of every file of numbers that is not in a hidden folder."""
    found = {}
    for path in sorted(workspace.rglob("*")):
        name = path.relative_to(workspace).as_posix()
        if path.suffix in NUMBERS and path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def build(root: Path, names: tuple[str, ...] = ()) -> Site:
    """Run all commands (or those of these names) once, undisturbed."""
    from mlx_slm.text.docstrings import documents

    texts = [text for text, _ in zip(documents("stdlib"), range(1500), strict=False)]
    for name, part in (("generic", texts[:1200]), ("notes", texts[1200:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    (root / "tiny.yaml").write_text(json.dumps(CONFIG))
    commands = [
        Command("prepare", ("prepare", "generic", str(root / "generic.jsonl"), "--config", str(root / "tiny.yaml"))),
        Command("prepare-notes", ("prepare", "notes", str(root / "notes.jsonl"))),
        Command("cluster", ("cluster",)),
        Command("pretrain", ("pretrain",)),
        Command("pretrain-pn", ("pretrain", "--method", "pn")),
        Command("specialize", ("specialize", "--domain", "notes", "--from", "pn")),
    ]
    commands = [command for command in commands if not names or command.name in names]
    site, workspace = Site(root, commands, {}, {}), root / "undisturbed"
    workspace.mkdir()
    for command in commands:
        shutil.copytree(workspace, site.before(command))
        begun = time.perf_counter()
        code, said = run(command.arguments, workspace)
        assert code == 0, said
        site.seconds[command.name] = time.perf_counter() - begun
        site.numbers[command.name] = numbers_of(workspace)
    return site


def judged(site: Site, command: Command, workspace: Path, said: str, again: bool = True) -> str:
    """Run the command once more, and say what became of its work."""
    if "Traceback" in said:
        return "traceback"
    if said == "hung":
        return "hung"
    if again:
        code, said = run(command.arguments, workspace)
        if "Traceback" in said:
            return "traceback afterwards"
        if code != 0:
            return "lost"
    return "held" if numbers_of(workspace) == site.numbers[command.name] else "silent"


def killed(site: Site, command: Command, rng: random.Random, workspace: Path) -> str:
    """kill -9 at any moment of it."""
    _, said = run(command.arguments, workspace, kill_after=rng.uniform(0.05, 1) * site.seconds[command.name])
    return judged(site, command, workspace, said)


RENAMES = """
import os, signal
count, real = [0], {"rename": os.rename, "replace": os.replace}
def cut(name):
    def renamed(*args, **kwargs):
        count[0] += 1
        if count[0] == NUMBER and BEFORE:
            os.kill(os.getpid(), signal.SIGKILL)
        real[name](*args, **kwargs)
        if count[0] == NUMBER:
            os.kill(os.getpid(), signal.SIGKILL)
    return renamed
os.rename, os.replace = cut("rename"), cut("replace")
"""


def renamed(site: Site, command: Command, rng: random.Random, workspace: Path) -> str:
    """kill -9 just before or just after a chosen rename."""
    prelude = RENAMES.replace("NUMBER", str(rng.randint(1, 14))).replace("BEFORE", str(rng.random() < 0.5))
    _, said = run(command.arguments, workspace, prelude)
    return judged(site, command, workspace, said)


def full(site: Site, command: Command, rng: random.Random, workspace: Path) -> str:
    """A disk with room for a part of what the command writes; afterwards there is room."""
    disk = workspace.with_name(f"{workspace.name}-disk")
    disk.mkdir()
    have = sum(path.stat().st_size for path in workspace.rglob("*") if path.is_file())
    size = int(have * 1.02) + rng.randint(100_000, 3_000_000)
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=100000", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        disk.rmdir()
        return "left out"
    try:
        try:
            shutil.copytree(workspace, disk / "w")
        except (OSError, shutil.Error):
            return "left out"
        _, said = run(command.arguments, disk / "w")
        subprocess.run(["mount", "-o", "remount,size=1G", str(disk)], check=True)
        return judged(site, command, disk / "w", said)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()


def flipped(site: Site, command: Command, rng: random.Random, workspace: Path) -> str:
    """One bit of one file is another: `info --verify` notices, and nothing uses it without a word."""
    shutil.rmtree(workspace)
    shutil.copytree(site.root / "undisturbed", workspace)
    files = [path for path in sorted(workspace.rglob("*")) if path.is_file() and path.stat().st_size]
    path = rng.choice([path for path in files if path.relative_to(workspace).as_posix() not in UNCHECKED])
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    code, said = run(("info", "--verify"), workspace)
    if "Traceback" in said:
        return "traceback"
    if code == 0:
        return f"silent: {path.relative_to(workspace)}"
    for arguments in (
        ("evaluate", "notes-pn-histogram-all"),
        ("generate", "slm", "-p", "x", "-m", "2"),
        command.arguments,
    ):
        code, said = run(arguments, workspace)
        if "Traceback" in said or code is None:
            return f"traceback: {path.relative_to(workspace)}"
    return "held"


UNCHECKED = {"config.yaml", "results/evaluations.jsonl"}
"""The user's own, and a log of results."""


def limited(site: Site, command: Command, rng: random.Random, workspace: Path) -> str:
    """Little memory: it ends, with a sentence or well; with enough memory it then ends well."""
    size = rng.randint(300, 1400) << 20
    code, said = run(command.arguments, workspace, preexec=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)))
    if "Traceback" in said:
        return "traceback"
    if code is None:
        return "hung"
    if code != 0 and "mlx-slm: error: " not in said:
        return f"no word, exit {code}"
    code, said = run(command.arguments, workspace)
    return "held" if code == 0 else "lost"


def together(site: Site, command: Command, rng: random.Random, workspace: Path) -> str:
    """The same command in two terminals."""
    from concurrent.futures import ThreadPoolExecutor

    def one(delay: float):
        time.sleep(delay)
        return run(command.arguments, workspace)

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(one, [0, rng.uniform(0, 0.5) * site.seconds[command.name]]))
    for code, said in outcomes:
        if "Traceback" in said:
            return "traceback"
        if code not in (0, 1) or (code == 1 and "another process" not in said):
            return "lost"
    return judged(site, command, workspace, "")


KINDS = {
    "kill": killed,
    "rename": renamed,
    "disk": full,
    "flip": flipped,
    "memory": limited,
    "together": together,
}


def trials(site: Site, kind: str, moments: int, seed: int) -> dict[str, Counter]:
    """Outcomes of `moments` trials of a kind for each command."""
    outcomes = {}
    for command in site.commands:
        found = outcomes[command.name] = Counter()
        for moment in range(moments):
            workspace = site.root / "trial"
            shutil.copytree(site.before(command), workspace)
            found[KINDS[kind](site, command, random.Random(f"{seed} {kind} {command.name} {moment}"), workspace)] += 1
            shutil.rmtree(workspace)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", type=int, default=10, help="trials of each kind for each command")
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        site = build(Path(folder))
        print(f"| fault | {' | '.join(command.name for command in site.commands)} |")
        print("|---" * (len(site.commands) + 1) + "|")
        for kind in options.kinds.split(","):
            outcomes = trials(site, kind, options.moments, options.seed)
            cells = [
                ", ".join(f"{count} {what}" for what, count in sorted(found.items())) for found in outcomes.values()
            ]
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
            worst = max(worst, any(set(found) - {"held", "left out"} for found in outcomes.values()))
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
