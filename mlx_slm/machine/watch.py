"""Beats between ranks, over UDP: one that is not heard of any more is lost, and the others end with its name.

MLX's engines notice a connection that was closed; for a rank that stands still, or a cable that was pulled, they wait
without end.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_slm.machine.ranks import Ranks

BEAT, SILENT = 1.0, 30.0
"""Seconds between beats, and without any after which a rank is lost."""
NOTICED = 4.0
"""Seconds in which it is found out who ended, where a connection was closed."""
STUCK = 10.0
"""Seconds after which a rank ends that another has told of its own end: MLX's ring waits without end where several sums
were on their way."""
CONNECTING = 45.0
"""Seconds in which all ranks have to be there."""
LOST = 3
"""Exit code where another rank is lost: started again, all go on."""
alone = 0
"""How many parts of this process work on what the others do not, and need none of them."""
before_exit: list[Callable[[], None]] = []
"""To call where this process ends by itself, from a thread."""
_watch: Watch | None = None


class Watch:
    """Of one rank: a thread that beats, listens, and ends the process where another rank is lost."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("", 0))
        self.socket.settimeout(BEAT / 2)
        every = ranks.of_all([_own_address(), self.socket.getsockname()[1]])
        self.token = ranks.from_first(secrets.token_hex(8))
        self.parent = os.getppid()
        self.others = {rank: socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for rank in range(ranks.size)}
        del self.others[ranks.rank]
        for rank, link in self.others.items():
            with contextlib.suppress(OSError):
                link.connect(tuple(every[rank]))  # so that it is told where nobody listens there any more
        self.heard: dict[int, float] = {}
        self.gone: dict[int, float] = {}
        """When it was first told that nobody listens where a rank was."""
        self.refused = set(self.others)
        """Ranks of which a firewall says so from the start, or of which it is not known yet."""
        self.ended: dict[int, str] = {}
        """Why a rank ended, as it said itself; empty where it was done."""
        threading.Thread(target=self._run, daemon=True).start()

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.ranks.hosts[rank]})"

    def send(self, ended: str | None = None) -> None:
        """Beat, or say that this rank ends."""
        message = json.dumps({"token": self.token, "rank": self.ranks.rank, "ended": ended}).encode()
        for rank, link in self.others.items():
            try:
                link.send(message)
            except ConnectionRefusedError:
                self.gone.setdefault(rank, time.monotonic())
            except OSError:  # where the network is down the other side does not hear of this one either
                continue

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            now = time.monotonic()
            if now - last > SILENT / 2:  # it is this process that stood still
                self.heard = dict.fromkeys(self.heard, now)
            if now - last >= BEAT or not self.heard:
                self.send()
                last = now
            self._listen()
            if os.getppid() != self.parent:
                self._end("what started this rank is gone")
            for rank, at in self.heard.items():
                if now - at > SILENT and rank not in self.ended:
                    self._end(f"{self.name(rank)} has not been heard of for {SILENT:.0f} s")
            for rank, at in self.gone.items():
                if now - at > BEAT and rank not in self.ended and rank not in self.refused:
                    self._end(f"{self.name(rank)} is gone")
                if now - at > STUCK and self.ended.get(rank) and not alone:
                    self._end(self.told(rank))

    def _listen(self) -> None:
        try:
            message = json.loads(self.socket.recv(4096))
            if message["token"] != self.token:
                return
            self.heard[message["rank"]] = time.monotonic()
            if message["ended"] is not None:
                self.ended[message["rank"]] = message["ended"]
        except (OSError, ValueError, KeyError, TypeError):
            return

    def hears_all(self) -> bool:
        """Whether beats of all others come within the time of three."""
        until = time.monotonic() + 3 * BEAT
        while len(self.heard) < len(self.others) and time.monotonic() < until:
            time.sleep(BEAT / 100)
        return len(self.heard) == len(self.others)

    def lost(self) -> str:
        """Who is gone, where a connection was closed: the first that said why, or that is heard of no more."""
        until = time.monotonic() + NOTICED
        while time.monotonic() < until:
            for rank, why in self.ended.items():
                if why:
                    return self.told(rank)
            time.sleep(BEAT / 10)
        silent = [(at, rank) for rank, at in self.heard.items() if time.monotonic() - at > 2 * BEAT]
        return f"{self.name(min(silent)[1])} is gone" if silent else "another rank is gone"

    def told(self, rank: int) -> str:
        """Why a rank ended."""
        why = self.ended[rank]
        return why if why.startswith("rank ") else f"{self.name(rank)} ended: {why}"

    def _end(self, what: str) -> None:
        self.send(what)
        _exit(f"{what}: {RESTART}")


RESTART = "start all ranks again, they go on from the last checkpoint"


def _exit(what: str) -> None:
    """End this process from any thread, while another may wait in MLX without end."""
    sys.stderr.write(f"mlx-slm: error: {what}\n")
    sys.stderr.flush()
    for call in before_exit:
        call()
    os._exit(LOST)


def start(ranks: Ranks) -> None:
    """Begin to watch the others."""
    global _watch
    _watch = Watch(ranks)
    hearing = ranks.of_all(_watch.hears_all())
    _watch.refused = set(_watch.gone)
    deaf = [ranks.hosts[rank] for rank, hears in enumerate(hearing) if not hears]
    if deaf and ranks.is_first:
        sys.stderr.write(
            f"mlx-slm: warning: datagrams (UDP) do not reach {', '.join(dict.fromkeys(deaf))}: a rank that stands "
            "still will not be noticed; let them through the firewall\n"
        )


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """End this process where the others are not there in time: MLX waits for them without end, and no other thread of
    Python runs meanwhile, so it is another process that does."""
    ended, alive = os.pipe()
    if (timer := os.fork()) == 0:
        os.close(alive)
        os.setpgid(0, 0)  # Ctrl-C is for the other
        if not select.select([ended], [], [], CONNECTING)[0]:
            here = f"rank {os.environ.get('MLX_RANK')} ({socket.gethostname()})"
            late = f"{here} has waited {CONNECTING:.0f} s for {others()}: start each rank once, on its host"
            os.write(2, f"mlx-slm: error: {late}\n".encode())
            for call in before_exit:
                call()
            os.kill(os.getppid(), signal.SIGALRM)
        os._exit(0)
    os.close(ended)
    try:
        yield
    finally:
        os.close(alive)
        os.waitpid(timer, 0)


def who_is_lost() -> str:
    return _watch.lost() if _watch else "another rank is gone"


def say_end(why: str) -> None:
    """Tell the other ranks, if there are any, that this one ends; `why`: empty where it is done."""
    if _watch:
        for _ in range(3):  # datagrams may be lost
            _watch.send(why)


def _addresses() -> list[str]:
    """HOST:PORT of each rank, where the launcher has made a list."""
    file = os.environ.get("MLX_HOSTFILE")
    return [places[0] for places in json.loads(Path(file).read_text())] if file else []


def own_place() -> str:
    places = _addresses()
    return f" ({places[int(os.environ['MLX_RANK'])]})" if places else ""


def others() -> str:
    ranks = [f"rank {rank} ({place})" for rank, place in enumerate(_addresses()) if str(rank) != os.environ["MLX_RANK"]]
    return " or ".join(ranks[:4]) or "the others"


def _own_address() -> str:
    """Of this rank: as the launcher's list of hosts has it, or as its name stands for."""
    if places := _addresses():
        return places[int(os.environ["MLX_RANK"])].rpartition(":")[0]
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # a name that nobody knows: then ranks of this host alone hear it
        return "127.0.0.1"
