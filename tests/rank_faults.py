"""Faults of two ranks that train together, injected and counted: killed, frozen, cut off from each other.

    scripts/faults ranks [--seed S] [--moments N] [--kinds moment,place,freeze,cut] [--soak MINUTES]

Each trial trains on a copy of a small workspace, harms one rank, sees that the other ends within a minute with its
name, starts both again, and compares the weights with those of an undisturbed training of two ranks, bit for bit.
`--soak`: memory, files and threads of two ranks with a checkpoint every few seconds. Prints a line of JSON for each
trial, and the table that docs/reliability.md holds; exits with 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from faults import CONFIG

ROOT = Path(__file__).resolve().parents[1]
TRAINING = CONFIG["training"] | {"steps": 200, "checkpoint_every": 20, "eval_every": 50, "report_every": 50}
COMMAND = ("pretrain", "--method", "slm", "--quiet", "-y")
MAIN = "import sys, mlx_slm; from mlx_slm.cli import main; main()"
ALLOWED = 60
"""Seconds in which the other rank has ended."""
HARMED = """
import os, mlx_slm, {module}
calls, real = [], {module}.{function}
def harmed(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), {signal})
    return real(*args, **kwargs)
{module}.{function} = harmed
"""
PLACES = {
    "before the first step": ("mlx_slm.text.rows", "Sampler.rows", 1),
    "in a reduction": ("mlx_slm.machine.ranks", "Ranks.summed_tree", 33),
    "in an evaluation": ("mlx_slm.training.scoring", "_of_all_ranks", 2),
    "in a checkpoint": ("mlx_slm.training.checkpoint", "save_arrays", 4),
    "at the end": ("mlx_slm.training.runs", "Run.finish", 1),
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Pair:
    """Two ranks of one training. `preludes`: Python that each runs first; `spaces`: a network namespace for each."""

    def __init__(self, workspace: Path, preludes=("", ""), hosts=("127.0.0.1", "127.0.0.1"), spaces=((), ())):
        self.workspace = workspace
        file = workspace / "hosts.json"
        file.write_text(json.dumps([[f"{host}:{free_port()}"] for host in hosts]))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLX_HOSTFILE": str(file)}
        self.said = [tempfile.TemporaryFile() for _ in hosts]
        self.ranks = [
            subprocess.Popen(
                [*space, sys.executable, "-c", prelude + MAIN, *COMMAND, "--workspace", str(workspace)],
                env=environment | {"MLX_RANK": str(rank)},
                stdout=said,
                stderr=said,
            )
            for rank, (prelude, space, said) in enumerate(zip(preludes, spaces, self.said, strict=True))
        ]

    def wait(self, rank: int, seconds: float) -> int | None:
        try:
            return self.ranks[rank].wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def text(self, rank: int) -> str:
        self.said[rank].seek(0)
        return self.said[rank].read().decode(errors="replace")

    def end(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def done(self) -> bool:
        """Whether both end well."""
        codes = [self.wait(rank, 300) for rank in range(2)]
        self.end()
        return codes == [0, 0]


def weights(workspace: Path) -> str:
    return hashlib.sha256((workspace / "models/slm/model.safetensors").read_bytes()).hexdigest()


class Site:
    """A prepared workspace, and what an undisturbed training of two ranks makes of it."""

    def __init__(self, root: Path):
        self.root, self.before = root, root / "before"
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(400)]
        lines = (json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(1500))
        (root / "text.jsonl").write_text("\n".join(lines))
        (root / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"training": TRAINING}))
        prepare = (sys.executable, "-m", "mlx_slm", "prepare", "generic", str(root / "text.jsonl"), "-y", "--quiet")
        options = ("--config", str(root / "config.yaml"), "--workspace", str(self.before))
        subprocess.run([*prepare, *options], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        start = time.monotonic()
        whole = self.copy("whole")
        assert Pair(whole).done()
        self.seconds, self.weights = time.monotonic() - start, weights(whole)

    def copy(self, name: str) -> Path:
        shutil.rmtree(self.root / name, ignore_errors=True)
        shutil.copytree(self.before, self.root / name)
        return self.root / name


def outcome(site: Site, pair: Pair, victim: int, since: float) -> dict:
    """What became of the other rank, and of both when they are started again."""
    other = 1 - victim
    code = pair.wait(other, ALLOWED - (time.monotonic() - since))
    seconds, said = time.monotonic() - since, pair.text(other)
    pair.end()
    if code is None:
        return {"result": "hung", "said": said[-300:]}
    finished = code == 0
    named = f"rank {victim} (" in said
    resumed = Pair(pair.workspace)
    if not resumed.done():
        return {"result": "lost", "said": resumed.text(0)[-300:] + resumed.text(1)[-300:]}
    same = weights(pair.workspace) == site.weights
    traceback = "Traceback" in said
    result = "traceback" if traceback else "other bits" if not same else "held" if named or finished else "not named"
    return {
        "result": result,
        "seconds": round(seconds, 1),
        "code": code,
        "said": "" if result == "held" else said[-300:],
    }


def at_moment(site: Site, rng: random.Random, how: signal.Signals = signal.SIGKILL) -> dict:
    """Harm either rank at any moment of a training."""
    victim, moment = rng.randrange(2), rng.uniform(0, site.seconds)
    pair = Pair(site.copy("trial"))
    time.sleep(moment)
    pair.ranks[victim].send_signal(how)
    return {"victim": victim, "moment": round(moment, 1)} | outcome(site, pair, victim, time.monotonic())


def at_place(site: Site, place: str, victim: int) -> dict:
    """Kill a rank where it comes to a place in the code."""
    module, function, call = PLACES[place]
    preludes = ["", ""]
    preludes[victim] = HARMED.format(module=module, function=function, call=call, signal=int(signal.SIGKILL))
    pair = Pair(site.copy("trial"), preludes)
    code = pair.wait(victim, 300)
    found = outcome(site, pair, victim, time.monotonic())
    if code != -signal.SIGKILL:
        found["result"] = f"not killed ({code})"
    return {"victim": victim, "place": place} | found


def cut(site: Site, rng: random.Random) -> dict:
    """Two network namespaces, and the link between them taken down: each ends, and names the other."""
    moment = rng.uniform(0.4, 0.7) * site.seconds
    names = ("slm-a", "slm-b")
    _spaces(names, make=True)
    try:
        spaces = [("ip", "netns", "exec", name) for name in names]
        pair = Pair(site.copy("trial"), hosts=("10.77.0.1", "10.77.0.2"), spaces=spaces)
        time.sleep(moment)
        subprocess.run(["ip", "-n", names[0], "link", "set", "slm-va", "down"], check=True)
        since = time.monotonic()
        code = pair.wait(0, ALLOWED)
        named = "rank 1 (" in pair.text(0)
        found = outcome(site, pair, 0, since)
        if found["result"] == "held" and code and not named:
            found["result"] = "not named"
        return {"moment": round(moment, 1)} | found
    finally:
        _spaces(names, make=False)


def _spaces(names: tuple[str, str], make: bool) -> None:
    """Two namespaces with a cable between them."""
    for name in names:
        subprocess.run(["ip", "netns", "add" if make else "del", name], check=True)
    if not make:
        return
    ends = ("slm-va", "slm-vb")
    subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
    for name, end, address in zip(names, ends, ("10.77.0.1", "10.77.0.2"), strict=True):
        subprocess.run(["ip", "link", "set", end, "netns", name], check=True)
        subprocess.run(["ip", "-n", name, "addr", "add", f"{address}/24", "dev", end], check=True)
        for device in (end, "lo"):
            subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)


def soak(site: Site, minutes: float) -> dict:
    """Memory (MB), open files and threads of each rank, after the first tenth and at the end of some minutes."""
    workspace = site.copy("soak")
    config = CONFIG | {"training": TRAINING | {"steps": 10_000_000, "checkpoint_every": 200, "report_every": 1000}}
    (workspace / "config.yaml").write_text(yaml.safe_dump(config))
    pair = Pair(workspace)
    seen = []
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until and all(process.poll() is None for process in pair.ranks):
        time.sleep(6 * minutes)
        seen.append([_state(process.pid) for process in pair.ranks])
    steps = sorted(int(path.name.split("-")[1]) for path in workspace.glob("runs/slm/checkpoints/step-*"))
    alive = all(process.poll() is None for process in pair.ranks)
    pair.end()
    flat = all(
        last["threads"] == first["threads"]
        and last["files"] <= first["files"] + 2
        and last["mb"] <= 1.05 * first["mb"] + 5
        for first, last in zip(seen[0], seen[-1], strict=True)
    )
    return {
        "result": "held" if alive and flat else "grew",
        "minutes": minutes,
        "step": steps[-1],
        "seen": [seen[0], seen[-1]],
    }


def _state(pid: int) -> dict:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"mb": int(status["VmRSS"].split()[0]) // 1024, "threads": int(status["Threads"]), "files": files}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--kinds", default="moment,place,freeze,cut")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    options = parser.parse_args()
    kinds, rng = options.kinds.split(","), random.Random(options.seed)
    results: Counter = Counter()

    def note(kind: str, found: dict) -> None:
        results[kind, found["result"]] += 1
        print(json.dumps({"kind": kind} | found), flush=True)

    with tempfile.TemporaryDirectory() as root:
        site = Site(Path(root))
        print(json.dumps({"kind": "undisturbed", "seconds": round(site.seconds, 1)}), flush=True)
        for _ in range(options.moments if "moment" in kinds else 0):
            note("killed at any moment", at_moment(site, rng))
        for place in PLACES if "place" in kinds else ():
            for victim in (0,) if place in ("in a checkpoint", "at the end") else (0, 1):
                note(f"killed {place}", at_place(site, place, victim))
        for _ in range(3 if "freeze" in kinds else 0):
            note("frozen (SIGSTOP)", at_moment(site, rng, signal.SIGSTOP))
        for _ in range(3 if "cut" in kinds else 0):
            note("the link between two hosts taken down", cut(site, rng))
        if options.soak:
            note(f"none: {options.soak:g} minutes, a checkpoint every 200 steps", soak(site, options.soak))
    for kind in dict.fromkeys(kind for kind, _ in results):
        tried = sum(count for (of, _), count in results.items() if of == kind)
        print(f"| {kind} | {results[kind, 'held']} of {tried} |")
    sys.exit(any(result != "held" for _, result in results))


if __name__ == "__main__":
    main()
