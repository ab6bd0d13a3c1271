"""Faults of two ranks that work together, injected and counted: killed, frozen, cut off from each other.

    scripts/faults ranks [--seed S] [--moments N] [--kinds moment,place,stages] [--soak MINUTES]

Each trial runs a command on a copy of a small workspace, harms one rank, sees that the other ends within a minute with
its name, starts both again, and compares every file of numbers with those of an undisturbed run of two ranks.
`--soak`: memory, files and threads of two ranks with a checkpoint every few seconds. Prints a line of JSON for each
trial, and the table that docs/reliability.md holds; exits with 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
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
from faults import CONFIG, numbers_of

from benchmarks.link import ADDRESSES, ENDS, HOSTS, two_hosts

ROOT = Path(__file__).resolve().parents[1]
TRAINING = CONFIG["training"] | {"steps": 200, "checkpoint_every": 20, "eval_every": 50, "report_every": 50}
MAIN = "import sys, mlx_slm; from mlx_slm.cli import main; main()"
ALLOWED = 60
"""Seconds in which the other rank has ended."""
PRETRAIN = ("pretrain", "--method", "slm")
SMALL = (
    "import mlx_slm, mlx_slm.text.shards as s, mlx_slm.machine.ranks as r; s.SHARD_BYTES, r.BUFFER = 20_000, 20_000\n"
)
"""As many shards of text, and sums in a step, as a large set and a large model have."""
STAGES = {
    "prepare": ("prepare", "generic", "TEXT"),
    "cluster": ("cluster", "--k", "4", "--k", "16", "--set", "clusters.tree=[4,4]"),
    "a mixture": ("pretrain", "--method", "mix"),
}
"""Commands other than a training that ranks share; TEXT is the file of the generic set."""
HARMS = {
    "killed": "os.kill(os.getpid(), 9)",
    "frozen": f"os.kill(os.getpid(), {int(signal.SIGSTOP)})",
    "cut off": "os.system('ip link set dev END down')",
}
HARMED = """
import os, mlx_slm, {module}
calls, real = [], {module}.{function}
def harmed(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        open({mark!r}, "w").close()
        {harm}
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
OF_THE_FIRST = ("in a checkpoint",)
"""Places where the first rank alone comes."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Pair:
    """Two ranks of one command. `preludes`: Python that each runs first; `apart`: each in a network namespace."""

    def __init__(self, site: Site, workspace: Path, preludes=("", ""), apart: bool = False):
        self.workspace = workspace
        hosts = ADDRESSES if apart else ("127.0.0.1", "127.0.0.1")
        spaces = [("ip", "netns", "exec", name) for name in HOSTS] if apart else [(), ()]
        file = workspace / "hosts.json"
        file.write_text(json.dumps([[f"{host}:{free_port()}"] for host in hosts]))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLX_HOSTFILE": str(file)}
        command = [*site.command, "--quiet", "-y", "--workspace", str(workspace)]
        self.said = [tempfile.TemporaryFile() for _ in hosts]
        self.ranks = [
            subprocess.Popen(
                [*space, sys.executable, "-c", SMALL + prelude + MAIN, *command],
                env=environment | {"MLX_RANK": str(rank)},
                stdout=said,
                stderr=said,
            )
            for rank, (prelude, space, said) in enumerate(zip(preludes, spaces, self.said, strict=True))
        ]

    def wait(self, rank: int, seconds: float) -> int | None:
        try:
            return self.ranks[rank].wait(max(0, seconds))
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


class Site:
    """A workspace before a command, and what an undisturbed run of it by two ranks makes."""

    def __init__(self, root: Path, command: tuple[str, ...]):
        self.root, self.before = root, root / "before"
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(400)]
        lines = (json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(1500))
        text, config = root / "text.jsonl", root / "config.yaml"
        text.write_text("\n".join(lines))
        config.write_text(yaml.safe_dump(CONFIG | {"training": TRAINING, "mixture": {"k": 4}}))
        prepare = ("prepare", "generic", str(text), "--config", str(config))
        self.command = prepare if command == STAGES["prepare"] else command
        self.before.mkdir()
        if self.command != prepare:
            words = [sys.executable, "-m", "mlx_slm", *prepare, "-y", "--quiet", "--workspace", str(self.before)]
            subprocess.run(words, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        start = time.monotonic()
        whole = self.copy("whole")
        assert Pair(self, whole).done()
        self.seconds, self.numbers = time.monotonic() - start, numbers_of(whole)

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
    resumed = Pair(site, pair.workspace)
    if not resumed.done():
        return {"result": "lost", "said": resumed.text(0)[-300:] + resumed.text(1)[-300:]}
    same = numbers_of(pair.workspace) == site.numbers
    traceback = "Traceback" in said
    result = "traceback" if traceback else "other bits" if not same else "held" if named or finished else "not named"
    return {
        "result": result,
        "seconds": round(seconds, 1),
        "code": code,
        "said": "" if result == "held" else said[-300:],
    }


def trial(site: Site, harm: str, victim: int, moment: float | None = None, place: str | None = None) -> dict:
    """Harm a rank at a moment, in seconds from the start, or where it comes to a place in the code."""
    mark, preludes = site.root / "mark", ["", ""]
    mark.unlink(missing_ok=True)
    if place:
        module, function, call = PLACES[place]
        what = HARMS[harm].replace("END", ENDS[victim])
        preludes[victim] = HARMED.format(module=module, function=function, call=call, mark=str(mark), harm=what)
    apart = harm == "cut off"
    with two_hosts() if apart else contextlib.nullcontext():
        pair = Pair(site, site.copy("trial"), preludes, apart)
        if place:
            while not mark.exists() and pair.ranks[victim].poll() is None:
                time.sleep(0.02)
            if not mark.exists():
                pair.end()
                return {"result": "did not come there", "said": pair.text(victim)[-300:]}
        else:
            time.sleep(moment or 0)
            if apart:
                subprocess.run(["ip", "-n", HOSTS[victim], "link", "set", ENDS[victim], "down"], check=True)
            else:
                pair.ranks[victim].send_signal(signal.SIGKILL if harm == "killed" else signal.SIGSTOP)
        since = time.monotonic()
        ended = not apart or pair.wait(victim, ALLOWED) is not None
        found = outcome(site, pair, victim, since)
    if not ended:
        found["result"] = "hung"
    return {"victim": victim} | ({"place": place} if place else {"moment": round(moment or 0, 1)}) | found


def soak(site: Site, minutes: float) -> dict:
    """Memory (MB), open files and threads of each rank, after the first tenth and at the end of some minutes."""
    workspace = site.copy("soak")
    config = CONFIG | {"training": TRAINING | {"steps": 10_000_000, "checkpoint_every": 200, "report_every": 1000}}
    (workspace / "config.yaml").write_text(yaml.safe_dump(config))
    pair = Pair(site, workspace)
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
    parser.add_argument("--kinds", default="moment,place,stages")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    options = parser.parse_args()
    kinds, rng = options.kinds.split(","), random.Random(options.seed)
    results: Counter = Counter()

    def note(kind: str, found: dict) -> None:
        results[kind, found["result"]] += 1
        print(json.dumps({"kind": kind} | found), flush=True)

    def at_moments(site: Site, harm: str, count: int, what: str) -> None:
        for _ in range(count):
            note(what, trial(site, harm, rng.randrange(2), moment=rng.uniform(0, site.seconds)))

    with tempfile.TemporaryDirectory() as folder:
        roots = {name: Path(folder) / name for name in ("a training", *STAGES)}
        for root in roots.values():
            root.mkdir()
        site = Site(roots["a training"], PRETRAIN)
        print(json.dumps({"kind": "undisturbed", "seconds": round(site.seconds, 1)}), flush=True)
        for harm in HARMS:
            if "moment" in kinds:
                at_moments(site, harm, options.moments if harm == "killed" else 3, f"{harm} at any moment")
            for place in PLACES if "place" in kinds else ():
                for victim in (0,) if place in OF_THE_FIRST else (0, 1):
                    note(f"{harm} {place}", trial(site, harm, victim, place=place))
        for name, command in STAGES.items() if "stages" in kinds else ():
            other = Site(roots[name], command)
            at_moments(other, "killed", 4, f"{name}: killed at any moment")
            at_moments(other, "frozen", 2, f"{name}: frozen at any moment")
        if options.soak:
            note(f"none: {options.soak:g} minutes, a checkpoint every 200 steps", soak(site, options.soak))
    for kind in dict.fromkeys(kind for kind, _ in results):
        tried = sum(count for (of, _), count in results.items() if of == kind)
        print(f"| {kind} | {results[kind, 'held']} of {tried} |")
    sys.exit(any(result != "held" for _, result in results))


if __name__ == "__main__":
    main()
