"""Serve the models of a workspace to OpenAI's clients, on mlx-lm's server."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.export.model import require_model
from mlx_slm.project import Project
from mlx_slm.storage.workspace import Workspace

BACKLOG = 128
CLOSING_SECONDS = 20


def serve(
    project: Project, names: Sequence[str] = (), host: str = "127.0.0.1", port: int = 8080, origins: Sequence[str] = ()
) -> None:
    """Answer requests for the named models (default: all that are exported) until SIGINT or SIGTERM.

    `origins`: pages that may ask besides those of this machine; `*`: any page, and any Host.
    Raises SlmError for an unknown model, a host that is none, or a port in use, before anything slow is done.
    """
    report, places = project.report, served(project.workspace, names)
    with listen(host, port) as listening:
        from mlx_slm.serving.generation import Generation
        from mlx_slm.serving.handler import Server
        from mlx_slm.serving.provider import Provider

        generation = Generation(Provider(places, list(origins)), report)
        try:
            server = Server(listening, host, generation, list(origins), report)
            report.line(
                f"serving {', '.join(generation.model_provider.ids)} at http://{server.address}/v1 (Ctrl-C stops)"
            )
            if not _is_loopback(host):
                report.warn(f"{host}: everybody who reaches this machine can use it; there is no password")
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            report.line("stopped")
        finally:
            if not generation.close(CLOSING_SECONDS):
                os._exit(1)  # a computation that does not end would keep the process


def served(workspace: Workspace, names: Sequence[str]) -> dict[str, Path]:
    """The directory of each name that a client may send: of a model its name, and what was given for it."""
    names = names or workspace.models()
    if not names:
        raise SlmError(f"no model in {workspace.root} yet: `mlx-slm specialize` makes one")
    places: dict[str, Path] = {}
    for given in names:
        path = require_model(workspace, given)
        path = path.resolve()
        if places.setdefault(path.name, path) != path:
            raise SlmError(f"two of the models are called {path.name}: serve one of them, or rename it")
        places[given] = path
    return places


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises SlmError with the reason where that cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise SlmError(f"--host {host}: not an address or a name of this machine") from error
    try:
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SlmError(f"--port {port}: something listens there already: end it, or choose another port") from error
        raise SlmError(f"--host {host} --port {port}: {error.strerror}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
