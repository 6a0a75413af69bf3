"""The server over a real loopback socket, with a model of a few lines: shapes, refusals, limits, waiting, stopping."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from tunesmith.data.kinds import Message
from tunesmith.errors import ModelError, RunError
from tunesmith.serve import protocol
from tunesmith.serve.protocol import Answer, Limits, RequestError, Written
from tunesmith.serve.server import ModelServer


class Echo:
    """Says what it was asked; `pause` keeps it busy, `fails` makes it raise."""

    name, kind = "echo", "language"

    def __init__(self, kind="language"):
        self.kind, self.pause, self.fails, self.at_once, self.most = kind, 0.0, None, 0, 0
        self.asked = []

    def complete(self, ask):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        time.sleep(self.pause)
        self.at_once -= 1
        if self.fails is not None:
            raise self.fails
        self.asked.append(ask)
        texts = ask.texts or [m.content for m in ask.messages[-1:]]
        return Answer(tuple(Written(f"{t}!", 2, ended=True) for t in texts for _ in range(ask.draw.n)), 3)

    def label(self, texts):
        return [{"text": text, "answer": "yes", "probabilities": {"yes": 1.0}} for text in texts]

    def score(self, rows):
        return [{"score": float(len(row["response"]))} for row in rows]


@contextmanager
def running(served, **limits):
    said = []
    server = ModelServer(served, "127.0.0.1", 0, limits=Limits(**limits), say=said.append)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server, said
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server, method, path, body=None, headers=None):
    """(status, JSON, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"} if headers is None else headers)
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text) if text else None, dict(reply.getheaders())


def raw(server, data):
    """What the server says to these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


@pytest.fixture
def echo():
    with running(Echo(), max_tokens=512, body_bytes=4096) as (server, said):
        server.said = said
        yield server


def test_health_and_models(echo):
    status, health, _ = ask(echo, "GET", "/health")
    assert (status, health["status"], health["model"], health["kind"]) == (200, "ok", "echo", "language")
    assert health["peak_memory_bytes"] > 0
    assert ask(echo, "GET", "/v1/models")[1]["data"][0]["id"] == "echo"
    assert ask(echo, "HEAD", "/health")[:2] == (200, None)


def test_completions_in_openais_shape(echo):
    asked = {"model": "echo", "prompt": ["a", "b"], "n": 2, "max_tokens": 9, "temperature": 0, "top_p": 0.5,
             "stop": "x", "seed": 7, "stream": False, "user": "me", "frequency_penalty": 0.0}  # fmt: skip
    status, found, _ = ask(echo, "POST", "/v1/completions", asked)
    assert status == 200 and found["object"] == "text_completion" and found["id"].startswith("cmpl-")
    assert [c["text"] for c in found["choices"]] == ["a!", "a!", "b!", "b!"]
    assert [c["index"] for c in found["choices"]] == [0, 1, 2, 3]
    assert found["choices"][0]["finish_reason"] == "stop" and found["seed"] == 7
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    draw = echo.served.asked[0].draw
    assert (draw.max_tokens, draw.temperature, draw.top_p, draw.n, draw.seed, draw.stop) == (9, 0, 0.5, 2, 7, ("x",))


def test_chat_in_openais_shape(echo):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    status, found, _ = ask(echo, "POST", "/v1/chat/completions", {"messages": turns, "max_completion_tokens": 5})
    assert status == 200 and found["object"] == "chat.completion"
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "hi!"}
    asked = echo.served.asked[0]
    assert asked.messages == (Message("system", "be brief"), Message("user", "hi")) and asked.draw.max_tokens == 5


BAD = [
    ({}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 513}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "9"}, "max_tokens"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "n": 17}, "n"),
    ({"prompt": ["a"] * 9, "n": 2}, "n"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
    ({"prompt": "a", "stop": [""]}, "stop"),
    ({"prompt": "a", "stream": True}, "stream"),
    ({"prompt": "a", "temprature": 1}, "temprature"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_a_body_that_makes_no_sense_is_400_and_names_the_key(body, param, echo):
    status, found, _ = ask(echo, "POST", "/v1/completions", body)
    assert status == 400 and found["error"]["param"] == param and f"`{param}`" in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [None, [], "hi", ["hi"], [{"role": "judge", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 1}],
     [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "assistant", "content": "x"}]],
    ids=str,
)  # fmt: skip
def test_messages_that_make_no_sense_are_400(messages, echo):
    status, found, _ = ask(echo, "POST", "/v1/chat/completions", {"messages": messages})
    assert status == 400 and "messages" in found["error"]["param"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 4000, b'"x"', b'{"prompt": "\\ud800"}'],
    ids=lambda b: repr(b[:6]),
)
def test_what_is_no_json_object_is_400(body, echo):
    status, found, _ = ask(echo, "POST", "/v1/completions", body)
    assert (status, found["error"]["code"]) == (400, "invalid_json")


def test_the_wrong_place_method_type_size_or_host(echo):
    assert ask(echo, "GET", "/nowhere")[0] == 404
    assert "/v1/completions" in ask(echo, "POST", "/v2/x", {})[1]["error"]["message"]
    status, found, headers = ask(echo, "GET", "/v1/completions")
    assert status == 405 and headers["Allow"] == "POST" and found["error"]["message"]
    assert ask(echo, "DELETE", "/health")[2]["Allow"] == "GET"
    assert ask(echo, "POST", "/v1/completions", {"prompt": "a"}, {"Content-Type": "text/plain"})[0] == 415
    assert ask(echo, "POST", "/v1/completions", b'{"prompt": "' + b"a" * 9000 + b'"}')[0] == 413
    assert (
        ask(echo, "POST", "/v1/completions", {"prompt": "a", "model": "gpt"})[1]["error"]["code"] == "model_not_found"
    )
    rebound = {"Content-Type": "application/json", "Host": "evil.example:80"}
    assert ask(echo, "POST", "/v1/completions", {"prompt": "a"}, rebound)[0] == 403
    local = {"Content-Type": "application/json", "Host": "localhost:1"}
    assert ask(echo, "POST", "/v1/completions", {"prompt": "a"}, local)[0] == 200
    assert ask(echo, "POST", "/predict", {"text": "a"})[0] == 404


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 505),
        (b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (HEAD + b"\r\n", 411),
        (HEAD + b"Content-Length: -4\r\n\r\n{}", 400),
        (HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n{}", 413),
        (HEAD + b"Content-Length: 50\r\n\r\n{}", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    ],
    ids=lambda x: str(x)[:30],
)
def test_broken_requests_are_answered_in_json(data, status, echo):
    reply = raw(echo, data)
    assert reply.startswith(f"HTTP/1.1 {status} ".encode()), reply
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert ask(echo, "GET", "/health")[0] == 200, "it is still there"


def test_silence_and_a_client_that_leaves_do_no_harm(capfd):
    with running(Echo(), read_seconds=0.2) as (server, _):
        assert raw(server, b"") == b""
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as connection:
            connection.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")
            assert b"408" in connection.makefile("rb").read()
        server.served.pause = 0.2
        body = b'{"prompt": "a"}'
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.4)
        assert ask(server, "GET", "/health")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_errors_of_the_model_are_400_or_500_and_the_server_lives(echo, capfd):
    echo.served.fails = ModelError("prompt 0 is too long")
    assert ask(echo, "POST", "/v1/completions", {"prompt": "a"})[1]["error"]["message"] == "prompt 0 is too long"
    echo.served.fails = ZeroDivisionError("secret detail")
    status, found, _ = ask(echo, "POST", "/v1/completions", {"prompt": "a"})
    assert status == 500 and "secret" not in json.dumps(found) and "secret detail" in capfd.readouterr().err
    echo.served.fails = None
    assert ask(echo, "POST", "/v1/completions", {"prompt": "a"})[0] == 200


def test_a_request_too_large_for_memory_is_503_and_the_server_lives(echo, capfd):
    echo.served.fails = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    status, found, _ = ask(echo, "POST", "/v1/completions", {"prompt": "a"})
    assert (status, found["error"]["code"]) == (503, "out_of_memory") and "fewer tokens" in found["error"]["message"]
    assert "Traceback" not in capfd.readouterr().err and any("out of memory" in line for line in echo.said)
    echo.served.fails = None
    assert ask(echo, "POST", "/v1/completions", {"prompt": "a"})[0] == 200


def test_one_request_at_a_time_and_no_more_than_may_wait():
    served = Echo()
    served.pause = 0.3
    with running(served, waiting=3) as (server, _):
        found = []
        ask_once = lambda: found.append(ask(server, "POST", "/v1/completions", {"prompt": "a"}))  # noqa: E731
        threads = [threading.Thread(target=ask_once) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert served.most == 1
    assert sorted(status for status, _, _ in found) == [200] * 3 + [503] * 3
    assert all(headers["Retry-After"] == "1" for status, _, headers in found if status == 503)


def test_connections_are_limited():
    with running(Echo(), connections=1) as (server, _):
        with socket.create_connection(("127.0.0.1", server.server_address[1])):
            time.sleep(0.1)
            assert raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 503")
        deadline = time.monotonic() + 10
        while ask(server, "GET", "/health")[0] != 200:
            assert time.monotonic() < deadline


def test_stopping_finishes_what_is_being_answered():
    served, found = Echo(), []
    served.pause = 0.5
    with running(served) as (server, _):
        thread = threading.Thread(target=lambda: found.append(ask(server, "POST", "/v1/completions", {"prompt": "a"})))
        thread.start()
        time.sleep(0.2)
    thread.join()
    assert found[0][0] == 200


def test_the_log_has_what_was_asked_and_not_what_it_held(echo):
    ask(echo, "POST", "/v1/completions?key=abc", {"prompt": "private"})
    ask(echo, "GET", "/no%1b[31m")
    time.sleep(0.1)
    assert any(line.startswith("POST /v1/completions 200 ") for line in echo.said)
    assert not any("private" in line or "abc" in line or "\x1b" in line for line in echo.said)


def test_predict_labels_and_scores():
    with running(Echo("classifier")) as (server, _):
        assert ask(server, "POST", "/predict", {"text": "a"})[1]["predictions"][0]["answer"] == "yes"
        assert len(ask(server, "POST", "/predict", {"texts": ["a", "b"]})[1]["predictions"]) == 2
        for body in ({}, {"texts": []}, {"texts": [1]}, {"text": None}, {"text": "a", "texts": ["b"]}, {"x": "a"}):
            assert ask(server, "POST", "/predict", body)[0] == 400, body
        assert ask(server, "POST", "/v1/chat/completions", {"messages": []})[0] == 404
    with running(Echo("reward")) as (server, _):
        assert ask(server, "POST", "/predict", {"prompt": "a", "response": "bc"})[1]["predictions"] == [{"score": 2.0}]
        rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}]
        assert [r["score"] for r in ask(server, "POST", "/predict", {"rows": rows})[1]["predictions"]] == [1.0, 0.0]
        for body in ({"prompt": "a"}, {"rows": [{"prompt": "a"}]}, {"rows": "x"}):
            assert ask(server, "POST", "/predict", body)[0] == 400, body


def test_an_address_that_is_taken_is_said_plainly():
    with running(Echo()) as (server, _), pytest.raises(RunError, match=r"cannot listen on 127\.0\.0\.1 port"):
        ModelServer(Echo(), "127.0.0.1", server.server_address[1], say=print)
    with pytest.raises(RunError, match="cannot listen"):
        ModelServer(Echo(), "no.such.host.invalid", 0, say=print)


def test_a_seed_is_drawn_when_none_is_named():
    limits = Limits()
    drawn = {protocol.parse_completion({"prompt": "a"}, limits, "m").draw.seed for _ in range(3)}
    assert len(drawn) == 3
    assert protocol.parse_completion({"prompt": "a", "temperature": None}, limits, "m").draw.temperature == 1.0
    with pytest.raises(RequestError):
        protocol.parse_json(b"{" * 100_000)
