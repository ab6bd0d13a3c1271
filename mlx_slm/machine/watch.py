"""Beats between ranks, over UDP: one that is not heard of any more is lost, and the others end with its name.

MLX's engines notice a connection that was closed; for a rank that stands still, or a cable that was pulled, they wait
without end.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_slm.machine.ranks import Ranks

BEAT, SILENT = 1.0, 30.0
"""Seconds between beats, and without any after which a rank is lost."""
NOTICED = 4.0
"""Seconds in which it is found out who ended, where a connection was closed."""
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
        self.others = {rank: tuple(place) for rank, place in enumerate(every) if rank != ranks.rank}
        self.heard: dict[int, float] = {}
        self.ended: dict[int, str] = {}
        """Why a rank ended, as it said itself; empty where it was done."""
        threading.Thread(target=self._run, daemon=True).start()

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.ranks.hosts[rank]})"

    def send(self, ended: str | None = None) -> None:
        """Beat, or say that this rank ends."""
        message = json.dumps({"token": self.token, "rank": self.ranks.rank, "ended": ended}).encode()
        for place in self.others.values():
            with contextlib.suppress(
                OSError
            ):  # where the network is down the other side does not hear of this one either
                self.socket.sendto(message, place)

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
            for rank, at in self.heard.items():
                if time.monotonic() - at > SILENT and rank not in self.ended:
                    self._end(f"{self.name(rank)} has not been heard of for {SILENT:.0f} s")

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

    def lost(self) -> str:
        """Who is gone, where a connection was closed: the first that said why, or that is heard of no more."""
        until = time.monotonic() + NOTICED
        while time.monotonic() < until:
            for rank, why in self.ended.items():
                if why:
                    return why if why.startswith("rank ") else f"{self.name(rank)} ended: {why}"
            time.sleep(BEAT / 10)
        silent = [(at, rank) for rank, at in self.heard.items() if time.monotonic() - at > 2 * BEAT]
        return f"{self.name(min(silent)[1])} is gone" if silent else "another rank is gone"

    def _end(self, what: str) -> None:
        self.send(what)
        sys.stderr.write(f"mlx-slm: error: {what}: {RESTART}\n")
        sys.stderr.flush()
        for call in before_exit:
            call()
        os._exit(1)


RESTART = "start all ranks again, they go on from the last checkpoint"


def start(ranks: Ranks) -> None:
    global _watch
    _watch = Watch(ranks)


def who_is_lost() -> str:
    return _watch.lost() if _watch else "another rank is gone"


def say_end(why: str) -> None:
    """Tell the other ranks, if there are any, that this one ends; `why`: empty where it is done."""
    if _watch:
        _watch.send(why)


def _own_address() -> str:
    """Of this rank: as the launcher's list of hosts has it, or as its name stands for."""
    file = os.environ.get("MLX_HOSTFILE")
    if file and os.environ.get("MLX_RANK", "").isdigit():
        return json.loads(Path(file).read_text())[int(os.environ["MLX_RANK"])][0].rpartition(":")[0]
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # a name that nobody knows: then ranks of this host alone hear it
        return "127.0.0.1"
