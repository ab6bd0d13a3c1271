"""HTTP: who may ask, what a request may look like, and OpenAI's form of answers and errors; mlx-lm does the rest."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm.server import APIHandler, CompletionRequest, get_system_fingerprint

from mlx_slm.errors import SlmError
from mlx_slm.report import Report
from mlx_slm.serving.generation import Generation, Request, Stopped, Unanswered
from mlx_slm.serving.provider import Provider
from mlx_slm.serving.requests import Asked, BadRequest, Chat, Completion, read_request

REQUEST_BYTES = 4 << 20
DRAINED_BYTES = 64 << 20
"""A larger request is read to its end up to here, so that its client can read why it is refused."""
IDLE_SECONDS = 30
"""A connection that is silent for this long in the middle of a request is closed."""
CONNECTIONS = 512
"""One more is closed."""
IN_WORK = 256
"""Requests that are answered or wait; one more is told to come back (503)."""
KINDS: dict[str, type[Asked]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": Chat,
    "/chat/completions": Chat,
}


class Handler(APIHandler):
    timeout = IDLE_SECONDS
    server: Server
    response_generator: Generation
    server_version = "mlx-slm"
    _legacy = False
    """Whether log-probabilities are asked for in the form of completions."""
    _started = False
    """Whether the head of the answer has been sent."""
    _request: Request | None = None

    def do_GET(self) -> None:
        self._safely(self._look)

    def do_OPTIONS(self) -> None:
        self._safely(super().do_OPTIONS)

    def do_POST(self) -> None:
        self._safely(self._post)

    def _look(self) -> None:
        path = self._place()
        if path == "/health":
            self.handle_health_check()
        elif path == "/v1/models":
            self._answer({"object": "list", "data": [self._entry(name) for name in self._provider.ids]})
        elif path.startswith("/v1/models/"):
            self._answer(self._entry(self._provider.resolve(unquote(path.removeprefix("/v1/models/")))))
        else:
            raise BadRequest(f"nothing is at {path[:100]}: see /v1/models, /v1/completions", 404)

    def _post(self) -> None:
        kind = KINDS.get(self._place())
        if kind is None:
            raise BadRequest(f"nothing is at {self.path[:100]}: post to {', '.join(KINDS)}", 404)
        asked = read_request(kind, self._json())
        if not self.server.slots.acquire(blocking=False):
            raise BadRequest(f"{IN_WORK} requests are in work: come back in a second", 503)
        try:
            self._generate(kind, asked)
        finally:
            self.server.slots.release()

    def _generate(self, kind: type[Asked], asked: Asked) -> None:
        name = self._provider.resolve(asked.model)
        body = asked.body() | {"model": name}
        self._legacy, self._stop_strings = kind is Completion, asked.stop or []
        self._says_tokens = bool({"max_tokens", "max_completion_tokens"} & set(body))
        data = json.dumps(body).encode()
        self.rfile = io.BufferedReader(io.BytesIO(data))
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(data))
        self.path = self._place()
        super().do_POST()

    def _place(self) -> str:
        """What is asked for, without a query."""
        try:
            return urlsplit(self.path).path.rstrip("/")
        except ValueError as error:
            raise BadRequest(f"{self.path[:100]} is no address ({error})") from None

    def _json(self) -> Any:
        """The body, whole and of a sane size."""
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise BadRequest("Content-Length is missing or no number", 411) from None
        if size < 0:
            raise BadRequest(f"Content-Length is {size}")
        if size > REQUEST_BYTES:
            self.close_connection = True
            left = size if size <= DRAINED_BYTES else 0
            while left > 0 and self.rfile.read(min(REQUEST_BYTES, left)):
                left -= REQUEST_BYTES
            raise BadRequest(f"the request has {size:,} bytes: at most {REQUEST_BYTES:,} are read", 413)
        data = b"".join(self._parts(size))
        if len(data) < size:
            raise BadRequest(f"the request ended after {len(data):,} of {size:,} bytes")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the request is not JSON ({str(error)[:100]})") from None

    def _parts(self, size: int) -> Iterator[bytes]:
        """The parts of a body as they come, all within the time of one; raises TimeoutError."""
        end = time.monotonic() + self.timeout
        while size and (part := self.rfile.read1(size)):
            yield part
            size -= len(part)
            if time.monotonic() > end:
                raise TimeoutError

    def _safely(self, work: Callable[[], Any]) -> None:
        """Answer who may ask, and what goes wrong with a sentence, where nothing of an answer was sent yet."""
        try:
            self._require_own()
            work()
        except BadRequest as error:
            self._refuse(error)
        except Unanswered as error:
            reason = error.args[0]
            status = 400 if isinstance(reason, SlmError) else 503 if isinstance(reason, Stopped) else 500
            self._refuse(BadRequest(str(reason), status))
        except Stopped as error:
            self._refuse(BadRequest(str(error), 503))
        except OSError:  # the client went away, or is silent
            self.close_connection = True
        except Exception as error:
            self._refuse(BadRequest(str(error), 500))
            with contextlib.suppress(OSError):  # nobody reads
                self.server.report.warn(f"a request failed ({type(error).__name__}: {error})")

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        self._request = Request(**vars(request), stop=self._stop_strings, says_tokens=self._says_tokens)
        super().handle_completion(self._request, [])

    def generate_response(self, text: str, finish_reason, *counts, **more) -> dict:
        response = super().generate_response(text, finish_reason, *counts, **more)
        if more.get("token_logprobs"):
            chances = more["tokens"], more["token_logprobs"], more["top_tokens"]
            response["choices"][0]["logprobs"] = self._logprobs(*chances)
        if self._request and self._request.notes:
            response["warnings"] = self._request.notes
        return response

    def _logprobs(self, tokens: list[int], chances: list[float], top: list[tuple]) -> dict:
        """Log-probabilities as OpenAI's API has them: one form for chats, another for completions."""
        assert self._request is not None
        piece = self._request.piece
        text = lambda token: piece(token).decode(errors="replace")  # noqa: E731
        best = [sorted(likely, key=lambda entry: -entry["logprob"]) for likely in top]
        if self._legacy:
            texts = list(map(text, tokens))
            named = [{text(entry["id"]): entry["logprob"] for entry in likely} for likely in best]
            offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
            return {"tokens": texts, "token_logprobs": chances, "top_logprobs": named, "text_offset": offsets}

        def entry(token: int, chance: float) -> dict:
            return {"token": text(token), "logprob": chance, "bytes": list(piece(token))}

        return {
            "content": [
                entry(token, chance) | {"top_logprobs": [entry(e["id"], e["logprob"]) for e in likely]}
                for token, chance, likely in zip(tokens, chances, best, strict=True)
            ]
        }

    def end_headers(self) -> None:
        self._started = True
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not listed."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: a line that is no request, a method that is none here."""
        self.close_connection = True
        self.headers = getattr(self, "headers", None) or Message()
        self._refuse(BadRequest(message or f"the request cannot be answered ({code})", code))

    def _require_own(self) -> None:
        """Refuse what is not of this machine by Host and Origin, so that no page of the web uses a user's server."""
        origin, allowed = self.headers.get("Origin"), self.server.allowed_origins
        if "*" in allowed:
            return
        host = self.headers.get("Host", "localhost")
        if not self.server.is_here(host):
            raise BadRequest(f"the host {host[:100]!r} is not this server's: --allow-origin '*' opens it", 403)
        if origin and origin not in allowed and origin.rpartition("//")[2] != host:
            raise BadRequest(f"pages of {origin[:100]} may not ask: --allow-origin {origin[:100]} opens it", 403)

    @property
    def _provider(self) -> Provider:
        return self.response_generator.model_provider

    def _entry(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "mlx-slm"}

    def _answer(self, value: dict, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self._set_completion_headers(status)
        if status == 503:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, error: BadRequest) -> None:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        body = {"error": {"message": str(error), "type": kind, "param": error.field, "code": None}}
        try:
            if self._started:  # in the middle of a stream
                self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
                self.close_connection = True
            else:
                self._headers_buffer: list[bytes] = []
                self._answer(body, error.status)
        except OSError:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """Answers at a socket that listens."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, host: str, generation: Generation, origins: list[str], report: Report):
        self.host, self.allowed_origins, self.report = host, origins, report
        self.slots = threading.BoundedSemaphore(IN_WORK)
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}
        fingerprint = get_system_fingerprint()

        def handle(*connection) -> Handler:
            return Handler(generation, *connection, system_fingerprint=fingerprint)

        super().__init__((host, 0), handle, bind_and_activate=False)
        self.socket.close()
        self.socket, self.address_family = listening, listening.family
        self.server_name, self.server_port = host, listening.getsockname()[1]

    @property
    def address(self) -> str:
        """host:port, as it stands in an address."""
        return f"[{self.host}]:{self.server_port}" if ":" in self.host else f"{self.host}:{self.server_port}"

    def is_here(self, host: str) -> bool:
        """Whether a Host header names this machine: by an address, or by a name that it has."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name in self._names

    def process_request(self, request, client_address) -> None:
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request, client_address) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            with contextlib.suppress(OSError):
                self.report.warn(f"a connection failed ({type(error).__name__}: {error})")
