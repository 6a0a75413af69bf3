"""The HTTP side: one thread a connection, one request at a time through the model, every error a JSON object.

Standard library alone. A connection serves one request and is closed; reading is bounded in bytes and seconds, the
number of connections and of waiting requests is bounded too, and a loopback server answers loopback names alone, so
that a page in a browser cannot reach it through a name of its own.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from tunesmith.engine.signals import StopSignals
from tunesmith.errors import RunError, TunesmithError, lacks_memory, printable
from tunesmith.plan.hardware import memory_story, peak_memory_bytes
from tunesmith.serve import protocol
from tunesmith.serve.protocol import Answer, Ask, Limits, RequestError

Json = dict[str, Any]
Say = Callable[[str], None]
_DRAINED_BYTES = 4 << 20
_METHODS = ("GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


class Served(Protocol):
    """A model that answers. `kind` is `language`, `classifier` or `reward`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    def complete(self, ask: Ask) -> Answer: ...
    def label(self, texts: list[str]) -> list[Json]: ...
    def score(self, rows: list[dict[str, str]]) -> list[Json]: ...


class ModelServer(ThreadingHTTPServer):
    """Listens from its construction on; `RunError` when the address cannot be had. `port` 0 takes a free one."""

    daemon_threads = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, served: Served, host: str, port: int, *, limits: Limits | None = None, say: Say) -> None:
        self.served, self.limits, self.say = served, limits or Limits(), say
        self.model_lock = threading.Lock()
        self.counting = threading.Lock()
        self.slots = threading.BoundedSemaphore(self.limits.connections)
        self.num_waiting = self.num_answered = 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RunError(
                f"cannot listen on {host} port {port} ({error}); choose another with --port or --host"
            ) from None
        self.loopback = _is_loopback(str(self.server_address[0]))

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread a connection, up to the limit; beyond it a short refusal."""
        if self.slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = json.dumps(_busy().as_json()).encode()
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        with suppress(OSError):
            request.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            traceback.print_exc()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The model for one request, the others waiting; RequestError 503 when too many wait already."""
        with self.counting:
            if self.num_waiting >= self.limits.waiting:
                raise _busy()
            self.num_waiting += 1
        try:
            with self.model_lock:
                yield
        finally:
            with self.counting:
                self.num_waiting -= 1
                self.num_answered += 1


def _busy() -> RequestError:
    return RequestError(503, "too many requests are waiting; try again in a moment", code="busy")


def _too_large() -> RequestError:
    what = "there is not enough memory for this request; ask for fewer tokens, completions or texts at once"
    return RequestError(503, what, code="out_of_memory")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_until_stopped(server: ModelServer) -> None:
    """Answer until SIGINT or SIGTERM; what is being answered then is finished. A second Ctrl-C leaves at once."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="serve", daemon=True)
    with StopSignals() as stop:
        thread.start()
        while thread.is_alive() and not stop.requested:
            time.sleep(0.1)
        server.say(f"{stop.name}: finishing what is being answered" if stop.requested else "stopped")
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = default_request_version = "HTTP/1.1"
    server_version, sys_version = "tunesmith", ""

    @property
    def owner(self) -> ModelServer:
        return cast(ModelServer, self.server)

    def setup(self) -> None:
        self.request.settimeout(self.owner.limits.read_seconds)
        self.began = time.perf_counter()
        super().setup()

    def answer(self) -> None:
        """Whatever was asked by whatever method."""
        self.close_connection = True
        try:
            self._send(200, self._route())
        except RequestError as error:
            self._send(error.status, error.as_json())
        except TunesmithError as error:
            self._send(400, RequestError(400, str(error)).as_json())
        except ConnectionError:
            raise
        except Exception as error:
            if lacks_memory(error):
                self.owner.say(memory_story(error))
                self._send(503, _too_large().as_json())
                return
            traceback.print_exc()
            self._send(500, RequestError(500, "an error of the server's own; its log has it").as_json())

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = answer

    def _route(self) -> Json:
        self._refuse_foreign()
        path = urlsplit(self.path).path.rstrip("/") or "/"
        kind = self.owner.served.kind
        gets = {"/health": self._health, "/v1/models": self._models}
        if path not in gets and path not in _POSTS:
            known = ", ".join([*gets, *_POSTS])
            raise RequestError(404, f"there is nothing at {printable(path)[:200]}; this server has {known}")
        method = "GET" if path in gets else "POST"
        if self.command != method and (self.command, method) != ("HEAD", "GET"):
            self.allowed = method
            raise RequestError(405, f"{path} is asked with {method}, not {self.command}")
        if method == "GET":
            return gets[path]()
        body = self._body()
        wanted = ("classifier", "reward") if path == "/predict" else ("language",)
        if kind not in wanted:
            other = "/predict" if path != "/predict" else "/v1/completions or /v1/chat/completions"
            raise RequestError(404, f"{path} is not for this model, which is a {kind} model; ask {other}")
        return _POSTS[path](self.owner, protocol.parse_json(body))

    def _health(self) -> Json:
        server = self.owner
        return {"status": "ok", "model": server.served.name, "kind": server.served.kind, "waiting": server.num_waiting,
                "answered": server.num_answered, "peak_memory_bytes": peak_memory_bytes()}  # fmt: skip

    def _models(self) -> Json:
        return protocol.models_json(self.owner.served.name)

    def _refuse_foreign(self) -> None:
        """On loopback the Host is loopback too: a name that resolves there is a page of someone else's."""
        host = urlsplit(f"//{self.headers.get('Host') or ''}").hostname or ""
        if self.owner.loopback and not _is_loopback(host):
            raise RequestError(403, "this server answers on loopback names alone (localhost, 127.0.0.1)")

    def _body(self) -> bytes:
        limit = self.owner.limits.body_bytes
        if self.headers.get_content_type() != "application/json":
            raise RequestError(415, "send the body as Content-Type: application/json")
        length = self.headers.get("Content-Length")
        if length is None or "Transfer-Encoding" in self.headers:
            raise RequestError(411, "send the body whole, with its Content-Length")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(400, "Content-Length is not a number of bytes")
        if int(length[:20]) > limit:
            self._drain(int(length[:20]))
            raise RequestError(413, f"the body has {int(length[:20]):,} bytes; at most {limit:,} are read")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise RequestError(408, "the body did not arrive in time") from None
        if len(body) < int(length):
            raise RequestError(400, f"the body ends after {len(body):,} of {int(length):,} bytes")
        return body

    def _drain(self, length: int) -> None:
        """Read what a client is still sending, within reason, so that it gets to read the answer."""
        left = min(length, _DRAINED_BYTES)
        try:
            while left > 0 and (part := self.rfile.read(min(left, 1 << 16))):
                left -= len(part)
        except OSError:
            return

    def _send(self, status: int, value: Mapping[str, Any]) -> None:
        body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if status == 405:
            self.send_header("Allow", getattr(self, "allowed", ", ".join(_METHODS)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself: a broken request line, headers, a method unheard of."""
        self.close_connection = True
        status = 405 if code == 501 else code
        self._send(status, RequestError(status, f"this is no request that can be read: {message or code}").as_json())

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """One line a request: what was asked, the status, the seconds; never what it held."""
        asked = printable(f"{self.command or '-'} {urlsplit(getattr(self, 'path', '-')).path}")[:120]
        number = getattr(code, "value", code)
        self.owner.say(f"{asked} {number} {time.perf_counter() - self.began:.3f} s")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing else is written."""


def _complete(server: ModelServer, body: Json) -> Json:
    return _written(server, protocol.parse_completion(body, server.limits, server.served.name))


def _chat(server: ModelServer, body: Json) -> Json:
    return _written(server, protocol.parse_chat(body, server.limits, server.served.name))


def _written(server: ModelServer, ask: Ask) -> Json:
    with server.turn():
        answer = server.served.complete(ask)
    return protocol.completion_json(ask, answer, server.served.name)


def _predict(server: ModelServer, body: Json) -> Json:
    served = server.served
    if served.kind == "reward":
        rows = protocol.parse_answers(body, server.limits, served.name)
        with server.turn():
            return protocol.predictions_json(served.score(rows), served.name)
    texts = protocol.parse_texts(body, server.limits, served.name)
    with server.turn():
        return protocol.predictions_json(served.label(texts), served.name)


_POSTS: dict[str, Callable[[ModelServer, Json], Json]] = {
    "/v1/completions": _complete,
    "/v1/chat/completions": _chat,
    "/predict": _predict,
}
