"""Serving: models by name, text that starts as in training, and requests that end service for nobody."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import Recorder, call, copy_of

from mlx_slm.errors import SlmError
from mlx_slm.export.generate import Sampling, stream
from mlx_slm.export.model import export_model
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import initialise
from mlx_slm.serving.generation import Generation
from mlx_slm.serving.handler import REQUEST_BYTES, Server
from mlx_slm.serving.provider import Provider
from mlx_slm.serving.serve import listen, serve, served
from mlx_slm.text.hub_tokenizer import open_tokenizer

CONTEXT = 32


class Service:
    """A server in a thread of its own, and a client of it."""

    def __init__(self, workspace, names=(), origins=()):
        self.report = Recorder()
        self.generation = Generation(Provider(served(workspace, names), list(origins)), self.report)
        self.server = Server(listen("127.0.0.1", 0), "127.0.0.1", self.generation, list(origins), self.report)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        assert self.generation.close(60), "the generation did not end"

    def raw(self, method, path, body=None, headers=()):
        """(status, body as bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=120)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def post(self, path="/v1/completions", **body):
        status, data = self.raw("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return status, json.loads(data)

    def text(self, prompt, model="slm", **more):
        status, body = self.post(model=model, prompt=prompt, **more)
        assert status == 200, body
        return body["choices"][0]["text"]

    def streamed(self, **body):
        """The chunks of a stream."""
        _, data = self.raw("POST", "/v1/completions", json.dumps(body | {"stream": True}))
        lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: {")]
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def workspace(with_experts, tmp_path_factory):
    """Three models: slm, a gpt2 with its learned positions, and a llama whose embedding has rows without a token."""
    workspace = copy_of(with_experts, tmp_path_factory.mktemp("served") / "w")
    tokenizer = open_tokenizer(workspace.tokenizer)
    for name, family, seed, unnamed in (("other", "llama", 1, 64), ("positions", "gpt2", 2, 0)):
        shape = Shape(family, 1, 32, 128, 2, 2, tokenizer.vocab_size + unnamed, CONTEXT)
        made_from = {"run": "slm", "method": "slm", "tokenizer": tokenizer.fingerprint}
        export_model(workspace.model(name), shape, initialise(shape, seed), tokenizer, made_from, {})
    return workspace


@pytest.fixture(scope="module")
def service(workspace):
    service = Service(workspace)
    yield service
    service.close()


def continued(workspace, model, prompt, max_tokens) -> str:
    """What `generate` writes."""
    parts = stream(workspace.model(model), prompt, Sampling(max_tokens, temp=0), Recorder())
    return "".join(part.text for part in parts)


def test_models_are_listed_and_found_by_name(service):
    status, body = service.raw("GET", "/v1/models")
    assert status == 200 and [m["id"] for m in json.loads(body)["data"]] == ["other", "positions", "slm"]
    assert json.loads(service.raw("GET", "/v1/models/slm")[1])["id"] == "slm"
    for name in ("nobody", "/etc", "../x", "mlx-community/Qwen3-0.6B-4bit", "x" * 5000):
        status, body = service.post(model=name, prompt="x")
        assert status == 404 and "served: other, positions, slm" in body["error"]["message"]
        assert len(body["error"]["message"]) < 400
    status, body = service.post(prompt="x")
    assert status == 400 and "name one of other, positions, slm" in body["error"]["message"]


PROMPTS = ["", "Return", "a</s>b", "</s>", "<unk>", " lead\r\n\ttab   runs ", "\U0001f389\u6f22 e\u0301", "\x00\x07"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_goes_on_as_generate_does(prompt, service, workspace):
    assert service.text(prompt, max_tokens=8, temperature=0) == continued(workspace, "slm", prompt, 8)
    status, body = service.post(
        "/v1/chat/completions",
        model="slm",
        messages=[{"role": "system", "content": prompt}, {"role": "user", "content": [{"type": "text", "text": ""}]}],
        max_tokens=8,
        temperature=0,
    )
    assert status == 200
    assert (body["choices"][0]["message"]["content"] or "") == continued(workspace, "slm", prompt, 8)


def test_special_tokens_in_a_prompt_are_text(service):
    _, plain = service.post(model="slm", prompt="ab", max_tokens=1)
    _, written = service.post(model="slm", prompt="a</s>b", max_tokens=1)
    assert plain["usage"]["prompt_tokens"] <= 3
    assert written["usage"]["prompt_tokens"] >= plain["usage"]["prompt_tokens"] + 3, "</s> is not one token"


BAD = [
    {"prompt": None},
    {"prompt": ["a", "b"]},
    {"prompt": [1, 2]},
    {"prompt": 5},
    {},
    {"prompt": "a", "stream": True, "logprobs": 2},
    {"prompt": "a", "model": "other", "logit_bias": {"420": 1}},
    *({"prompt": "a", key: value} for key, values in {
        "stop": [5, [1], [None], [""], ["x"] * 17, {"a": 1}],
        "top_k": [-1, 0.5, "x", [1]],
        "top_p": [-0.1, 1.5, "x"],
        "min_p": [-1, 2],
        "temperature": [-1, 1e9, "hot", [0], True, 10**400],
        "prompt": ["\ud83d"],
        "max_tokens": [0, -1, 0.5, "8", [8]],
        "seed": [-1, 10**21, 0.5, "x"],
        "logit_bias": [{"400": 1}, {"-1": 1}, {"x": 1}, {"5": 1e30}, [1], {"10000000000000000000000000000000": 1}],
        "repetition_context_size": [10**30, -1, 0.5],
        "repetition_penalty": [-1, 1e9, "x", 1e-40],
        "presence_penalty": [1e9, "x"],
        "frequency_context_size": [10**30],
        "logprobs": [12, -1, "x"],
        "stream": ["yes", 1],
        "stream_options": [5],
        "n": [2],
        "best_of": [3],
        "echo": [True],
        "model": [5, ["slm"]],
        "draft_model": ["slm", "/etc"],
        "adapters": ["/etc", "x"],
    }.items() for value in values),
]  # fmt: skip


@pytest.mark.parametrize("body", BAD, ids=lambda body: json.dumps(body)[:50])
def test_a_bad_value_gets_a_sentence_and_ends_service_for_nobody(body, service):
    wanted = service.text("Return", max_tokens=4, temperature=0)
    status, answer = service.post(**({"model": "slm"} | body))
    assert status in (400, 404) and answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 300
    assert service.text("Return", max_tokens=4, temperature=0) == wanted
    assert service.raw("GET", "/health")[0] == 200 and not service.report.warnings


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        [5],
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "http://127.0.0.1:9"}]}],
        [{"role": "user", "content": "\udcff"}],
        [{"role": "user", "content": [{"type": "text", "x" * 10_000: "y"}]}],
    ],
)
def test_bad_messages_get_a_sentence(messages, service, monkeypatch):
    monkeypatch.setattr("mlx_lm.server.urlopen", lambda *_, **__: pytest.fail("something was fetched"))
    status, body = service.post("/v1/chat/completions", model="slm", messages=messages)
    assert status == 400 and "messages" in body["error"]["message"] and len(body["error"]["message"]) < 300
    assert service.raw("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "more",
    [
        {"top_logprobs": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True, "stream": True},
    ],
)
def test_what_a_chat_would_not_get_is_refused(more, service):
    status, body = service.post(
        "/v1/chat/completions", model="slm", messages=[{"role": "user", "content": "x"}], **more
    )
    assert status == 400 and next(iter(more)) in body["error"]["message"]


GOOD = [
    {"top_k": 10**6},
    {"top_k": 400},
    {"top_k": 399, "temperature": 1.0},
    {"seed": 7},
    {"logit_bias": {"5": 100, "399": -100}},
    {"repetition_penalty": 1.1, "repetition_context_size": 1 << 20},
    {"stop": []},
    {"logit_bias": {}},
    {"min_p": 0.5, "temperature": 1},
    {"min_p": 1e-46, "temperature": 1},
    {"top_p": 1e-46, "temperature": 1},
    {"top_p": 0, "temperature": 1},
    {"temperature": 1e-39},
    {"temperature": 0.001},
    {"repetition_penalty": 0.01},
    {"suffix": "", "echo": False, "user": "me", "stream_options": None},
]


@pytest.mark.parametrize("more", GOOD, ids=str)
def test_a_good_value_is_answered(more, service):
    status, body = service.post(model="slm", prompt="Return", max_tokens=3, **more)
    assert status == 200 and body["usage"]["completion_tokens"] <= 3


def test_prompt_and_tokens_fit_the_context_and_the_answer_says_so(service):
    status, body = service.post(model="slm", prompt="word " * 20_000)
    assert status == 200 and body["usage"]["prompt_tokens"] == CONTEXT // 2
    assert body["usage"]["completion_tokens"] <= CONTEXT // 2
    assert "the context of slm, 32 tokens: its last 15 were read" in body["warnings"][0] and len(body["warnings"]) == 1
    status, body = service.post(model="slm", prompt="Return", max_tokens=10**9)
    assert status == 200 and body["usage"]["total_tokens"] <= CONTEXT
    assert "max_tokens 1,000,000,000 was lowered to" in body["warnings"][0]
    assert "warnings" not in service.post(model="slm", prompt="Return", max_tokens=2)[1]


def test_a_gpt2_never_reads_behind_its_positions(service, workspace):
    """There the look-up of positions returns memory of somebody else: values of 1e34 and nan."""
    for prompt in ("", "a", "word " * 500):
        status, body = service.post(model="positions", prompt=prompt, max_tokens=10**6, logprobs=2)
        chances = body["choices"][0]["logprobs"]["token_logprobs"]
        assert status == 200 and body["usage"]["total_tokens"] <= CONTEXT
        assert np.isfinite(chances).all() and max(chances) <= 0
    assert len(continued(workspace, "positions", "word " * 500, 10**6)) > 0


def test_prompts_of_a_gpt2_that_come_together_look_up_its_positions_alone(service, workspace, monkeypatch):
    wanted = [service.text("Return " * n, "positions", max_tokens=8, temperature=0) for n in range(1, 7)]
    model = service.generation.model_provider._loaded["positions"][1].model
    table, look_up, seen = model.wpe, type(model.wpe).__call__, []

    def watched(self, places):
        if self is table:
            seen.append((places.min().item(), places.max().item()))
        return look_up(self, places)

    monkeypatch.setattr(type(table), "__call__", watched)
    with ThreadPoolExecutor(6) as pool:
        ask = lambda n: service.text("\n" + "Return " * n, "positions", max_tokens=8, temperature=0)  # noqa: E731
        texts = list(pool.map(ask, range(1, 7)))
    assert len(set(texts)) > 1 and len(wanted) == len(texts)
    assert min(low for low, _ in seen) >= 0 and max(high for _, high in seen) < CONTEXT


def test_rows_without_a_token_are_never_written(service, workspace):
    for seed in range(4):
        status, body = service.post(
            model="other", prompt="Return", max_tokens=25, temperature=100, seed=seed, logprobs=11
        )
        assert status == 200 and body["usage"]["completion_tokens"] >= 1
    assert not service.report.warnings


def test_bytes_of_tokens_are_those_of_the_text(service):
    messages = [{"role": "user", "content": "\U0001f600"}]
    for seed in range(3):
        how = {"max_tokens": 25, "temperature": 2.0, "seed": seed, "logprobs": True, "top_logprobs": 3}
        _, body = service.post("/v1/chat/completions", model="slm", messages=messages, **how)
        tokens = body["choices"][0]["logprobs"]["content"]
        if body["choices"][0]["finish_reason"] == "length":
            whole = b"".join(bytes(token["bytes"]) for token in tokens)
            assert whole.decode(errors="replace") == body["choices"][0]["message"]["content"]


def test_asking_again_with_the_answer_goes_on(service):
    """The prompt is then, token by token, one that lies in the cache."""
    first = service.text("Return", max_tokens=4, temperature=0)
    whole = service.text("Return", max_tokens=8, temperature=0)
    for _ in range(2):
        assert first + service.text("Return" + first, max_tokens=4, temperature=0) == whole


def test_who_may_ask(service, workspace):
    port = service.server.server_port
    own = [{}, {"Host": f"localhost:{port}"}, {"Host": "127.0.0.1"}, {"Host": f"[::1]:{port}"}, {"Host": "10.0.0.7"},
           {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}"}]  # fmt: skip
    for headers in own:
        assert service.raw("GET", "/v1/models", headers=headers)[0] == 200, headers
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "["}):
        for method, path in (("GET", "/v1/models"), ("GET", "/health"), ("POST", "/v1/completions"), ("OPTIONS", "/")):
            status, body = service.raw(method, path, b"{}" if method == "POST" else None, headers)
            assert status == 403 and "--allow-origin" in json.loads(body)["error"]["message"], (headers, method)
    opened = Service(workspace, ["slm"], ["https://ui.example"])
    try:
        assert opened.raw("GET", "/health", headers={"Origin": "https://ui.example"})[0] == 200
        assert opened.raw("GET", "/health", headers={"Origin": "https://evil.example"})[0] == 403
    finally:
        opened.close()


def test_requests_that_are_none(service):
    for body in (b"", b"{", b"[]", b"5", b"\xff\xfe", b"[" * 100_000):
        status, answer = service.raw("POST", "/v1/completions", body)
        assert status == 400 and json.loads(answer)["error"]["message"], body[:10]
    assert service.raw("POST", "/v1/nothing", b"{}")[0] == 404 and service.raw("GET", "/x")[0] == 404
    for method, path, headers, wanted in (
        ("PUT", "/v1/models", {}, 501),
        ("GET", "/health", {"Origin": "http://["}, 403),
        ("GET", "/v1/models/%73lm", {}, 200),
    ):
        status, answer = service.raw(method, path, None, headers)
        assert status == wanted and json.loads(answer), (method, path)
    status, answer = service.raw("POST", "/v1/completions", b"x" * (REQUEST_BYTES + 1))
    assert status == 413 and f"at most {REQUEST_BYTES:,}" in json.loads(answer)["error"]["message"]
    for request, wanted in (
        *(
            (f"POST /v1/completions HTTP/1.0\r\nContent-Length: {length}", status)
            for length, status in (("-1", 400), ("x", 411), ("10000000000", 413))
        ),
        ("GET http://[ HTTP/1.0", 400),
        ("HEAD /health HTTP/1.0", 501),
    ):
        with socket.create_connection(("127.0.0.1", service.server.server_port), timeout=30) as connection:
            connection.sendall(f"{request}\r\n\r\n".encode())
            answer = connection.makefile("rb").read().decode()
            assert f" {wanted} " in answer.splitlines()[0] and '"message"' in answer, request


def test_a_body_that_never_comes_to_an_end_is_given_up(monkeypatch):
    from mlx_slm.serving import handler

    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(handler.time, "monotonic", lambda: next(clock))
    slow = handler.Handler.__new__(handler.Handler)
    slow.rfile = type("Slow", (), {"read1": staticmethod(lambda _: b"x")})()
    with pytest.raises(TimeoutError):
        assert len(list(slow._parts(1000))) < handler.IDLE_SECONDS


def test_more_connections_than_are_held_are_closed(service, monkeypatch):
    monkeypatch.setattr(service.server, "_connections", threading.BoundedSemaphore(1))
    address = "127.0.0.1", service.server.server_port
    with socket.create_connection(address, 30) as first, socket.create_connection(address, 30) as second:
        assert second.recv(1) == b""
        first.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert first.recv(4096).startswith(b"HTTP/1.0 200")


def test_a_connection_that_is_silent_is_closed(service, monkeypatch):
    from mlx_slm.serving.handler import Handler

    monkeypatch.setattr(Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", service.server.server_port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(4096) == b""


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_is_the_whole_answer(seed, service):
    asked = {"model": "slm", "prompt": "\U0001f600", "max_tokens": 25, "temperature": 2.0, "seed": seed}
    whole = service.text(**asked)
    chunks = service.streamed(**asked, stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == whole
    assert chunks[-1]["usage"]["completion_tokens"] <= 25


def test_a_stop_string_ends_the_text_wherever_it_lies(service):
    whole = service.text("Return", max_tokens=20, temperature=0)
    for start in range(1, len(whole) - 3, 2):
        stop = whole[start : start + 3]
        wanted = whole[: whole.index(stop)]
        _, body = service.post(model="slm", prompt="Return", max_tokens=20, temperature=0, stop=[stop, "\x00never"])
        assert body["choices"][0]["text"] == wanted and body["choices"][0]["finish_reason"] == "stop"
        chunks = service.streamed(model="slm", prompt="Return", max_tokens=20, temperature=0, stop=stop)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted


def test_the_openai_client(service):
    openai = pytest.importorskip("openai", reason="needs the openai client (extra: peers)")
    client = openai.OpenAI(base_url=f"http://{service.server.address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["other", "positions", "slm"]
    answer = client.completions.create(model="slm", prompt="Return", max_tokens=6, temperature=0, logprobs=3)
    chances = answer.choices[0].logprobs
    assert len(chances.tokens) == len(chances.token_logprobs) == len(chances.top_logprobs) == 6
    assert "".join(chances.tokens) == answer.choices[0].text
    for chance, top in zip(chances.token_logprobs, chances.top_logprobs, strict=True):
        assert chance == pytest.approx(max(top.values()), abs=1e-5), "the likeliest token was taken"
    messages = [{"role": "user", "content": "Return"}]
    chat = client.chat.completions.create(
        model="slm", messages=messages, max_completion_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].message.content == answer.choices[0].text
    content = chat.choices[0].logprobs.content
    assert [entry.token for entry in content] == chances.tokens and len(content[0].top_logprobs) == 2
    parts = client.chat.completions.create(model="slm", messages=messages, max_tokens=6, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.choices[0].text
    with pytest.raises(openai.NotFoundError, match="served: other, positions, slm"):
        client.completions.create(model="gpt-4", prompt="x")


def test_many_clients_three_models_one_leaves_one_sends_garbage(service):
    wanted = {name: service.text("Return", name, max_tokens=8, temperature=0) for name in ("slm", "other", "positions")}

    def ask(i: int) -> bool:
        name = ("slm", "other", "positions")[i % 3]
        if i == 10:
            with socket.create_connection(("127.0.0.1", service.server.server_port)) as connection:
                body = json.dumps({"model": name, "prompt": "x", "stream": True, "max_tokens": 30})
                head = f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall((head + body).encode())
                connection.recv(10)
            return True
        if i == 20:
            return service.raw("POST", "/v1/completions", b"\x00garbage")[0] == 400
        return service.text("Return", name, max_tokens=8, temperature=0) == wanted[name]

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(ask, range(64)))
    assert service.raw("GET", "/health")[0] == 200 and not service.report.warnings


def test_more_than_can_be_in_work_are_told_to_come_back(service, monkeypatch):
    monkeypatch.setattr(service.server, "slots", threading.BoundedSemaphore(1))
    service.server.slots.acquire()
    connection = http.client.HTTPConnection("127.0.0.1", service.server.server_port, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps({"model": "slm", "prompt": "x"}))
    answer = connection.getresponse()
    assert answer.status == 503 and answer.headers["Retry-After"] == "1"
    service.server.slots.release()
    assert service.text("Return", max_tokens=1)


def test_the_generation_starts_again_after_a_failure(workspace, monkeypatch):
    service = Service(workspace, ["slm"])
    try:
        wanted = service.text("Return", max_tokens=4, temperature=0)
        from mlx_lm import server

        real = server.BatchGenerator.next
        failures = iter([RuntimeError("no more memory")])

        def fails_once(self):
            if error := next(failures, None):
                raise error
            return real(self)

        monkeypatch.setattr(server.BatchGenerator, "next", fails_once)
        status, body = service.post(model="slm", prompt="Return", max_tokens=4)
        assert status == 500 and "no more memory" in body["error"]["message"]
        assert service.text("Return", max_tokens=4, temperature=0) == wanted
        assert any("no more memory" in line for line in service.report.warnings)

        def nobody_reads(_):
            raise BrokenPipeError

        monkeypatch.setattr(service.report, "warn", nobody_reads)
        failures = iter([RuntimeError("once more")])
        assert service.post(model="slm", prompt="Return", max_tokens=4)[0] == 500
        assert service.text("Return", max_tokens=4, temperature=0) == wanted
    finally:
        service.close()


def test_models_are_dropped_where_there_is_no_room(workspace, monkeypatch):
    from mlx_slm.serving import provider

    monkeypatch.setattr(provider, "LOADED", 1)
    service = Service(workspace)
    try:
        texts = [service.text("Return", name, max_tokens=6, temperature=0) for name in ("slm", "other", "slm", "other")]
        assert texts[:2] == texts[2:] and texts[0] != texts[1]
        provider_ = service.generation.model_provider
        assert list(provider_._loaded) == ["other"]
        assert provider_.model_key == ("other", 4, None), "of each load, so that no cache outlives its model"
    finally:
        service.close()


def test_a_port_in_use_and_a_host_that_is_none(workspace, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = call(capsys, workspace, "serve", "slm", "--port", port)
        assert code == 1 and f"--port {port}: something listens there already" in err and err.count("\n") == 1
    for host in ("no.such.host.invalid", "300.1.1.1", "192.0.2.1"):
        code, _, err = call(capsys, workspace, "serve", "slm", "--host", host, "--port", "0")
        assert code == 1 and f"--host {host}" in err and err.count("\n") == 1, err
    code, _, err = call(capsys, workspace, "serve", "nobody")
    assert code == 1 and "no model 'nobody'" in err


def test_an_address_of_ipv6_is_written_in_brackets(service):
    try:
        listening = listen("::1", 0)
    except SlmError:
        pytest.skip("no IPv6 here")
    with Server(listening, "::1", service.generation, [], service.report) as server:
        assert re.fullmatch(r"\[::1\]:\d+", server.address)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_the_middle_of_a_stream(number, workspace):
    command = [sys.executable, "-m", "mlx_slm", "serve", "slm", "--workspace", str(workspace.root), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = int(re.search(r":(\d+)/v1", process.stdout.readline())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"model": "slm", "prompt": "Return", "stream": True, "max_tokens": 30, "seed": 1}
        connection.request("POST", "/v1/completions", json.dumps(body))
        assert connection.getresponse().read(1)
        os.kill(process.pid, number)
        code, said = process.wait(60), process.stderr.read()
        assert code == 0 and "Traceback" not in said, said


def test_two_models_of_one_name_are_refused(workspace, tmp_path):
    copy = copy_of(workspace, tmp_path / "again")
    with pytest.raises(SlmError, match="two of the models are called slm"):
        served(workspace, ["slm", str(copy.model("slm"))])
    with pytest.raises(SlmError, match="no model in"):
        serve(type("P", (), {"workspace": type(workspace)(tmp_path / "none"), "report": Recorder()})())
