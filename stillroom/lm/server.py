"""A teacher behind any OpenAI-compatible server, `openai:URL#model`: concurrent, retried, resumable, and nothing paid for twice.

Every answer goes into a journal (JSON lines) under the hash of its request before it is handed on; a request that the journal answers is
never sent again, whatever happened to the process in between, and equal requests at the same time are sent once. The key goes to the
server that was named and nowhere else: a redirect is an error.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError
from stillroom.lm.traces import Messages

LARGEST = 64 << 20
"""Bytes of an answer that are read at most."""
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


@dataclass(frozen=True)
class Reply:
    """One answer of the server; `finished` is False when it stopped at its token limit."""

    text: str
    finished: bool


class Server:
    """Chat completions of one model on one server.

    spec: openai:URL#model, such as openai:http://localhost:8000/v1#smollm. journal: the file of answers. The key is read from
    OPENAI_API_KEY and only sent, never written. timeout: seconds from connecting to the last byte of an answer. UserError when the spec is
    not of this form, and for a journal with a broken line.
    """

    def __init__(self, spec: str, journal: Path, *, concurrency: int = 8, retries: int = 6, timeout: float = 120.0, patience: float = 1.0):
        kind, _, rest = spec.partition(":")
        self.url, _, self.model = rest.partition("#")
        if kind != "openai" or not self.url.startswith(("http://", "https://")) or not self.model:
            raise UserError(f"{spec!r} names no server: write openai:URL#model, such as openai:http://localhost:8000/v1#my-model.")
        self.journal, self.concurrency, self.retries, self.timeout, self.patience = journal, concurrency, retries, timeout, patience
        self._lock, self._answers = threading.Lock(), _read(journal)
        self._asked: dict[str, Future[dict[str, Any]]] = {}

    def reply(
        self, chats: Sequence[Messages], *, samples: int = 1, temperature: float = 1.0, top_p: float = 1.0, max_new_tokens: int = 512,
        stop: Sequence[str] = (), seed: int = 0, opening: Sequence[str] | None = None,
    ) -> list[list[Reply]]:  # fmt: skip
        """`samples` replies to every chat, one group per chat, in order. `opening[i]` begins the i-th reply, which the server continues
        (it is sent as an open assistant message with continue_final_message, as vLLM understands it).

        UserError when a request is refused or still fails after all retries; the answers that came are in the journal.
        """
        jobs = []
        for i, chat in enumerate(chats):
            messages = [{"role": m["role"], "content": m["content"]} for m in chat]
            body: dict[str, Any] = {"model": self.model, "temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens}
            if stop:
                body["stop"] = list(stop)
            if opening is not None and opening[i]:
                messages.append({"role": "assistant", "content": opening[i]})
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            for sample in range(samples):
                jobs.append(body | {"messages": messages, "seed": seed + sample})
        with ThreadPoolExecutor(self.concurrency) as pool:
            pending = [pool.submit(self._answer, job) for job in jobs]
            try:
                replies = [future.result() for future in pending]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is on its way still lands in the journal
                raise
        firsts = [opening[i] if opening is not None else "" for i in range(len(chats)) for _ in range(samples)]
        replies = [Reply(first + r.text, r.finished) for first, r in zip(firsts, replies)]
        return [replies[i : i + samples] for i in range(0, len(replies), samples)]

    def _answer(self, body: dict[str, Any]) -> Reply:
        key = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()[:32]
        with self._lock:
            if key in self._answers:
                return Reply(**self._answers[key])
            first, asked = key not in self._asked, self._asked.setdefault(key, Future())
        if first:
            try:
                answer = self._ask(body)
                with self._lock:
                    self._write(key, answer)
                    self._answers[key] = answer
                asked.set_result(answer)
            except BaseException as error:
                asked.set_exception(error)
            finally:
                with self._lock:
                    del self._asked[key]
        return Reply(**asked.result())

    def _write(self, key: str, answer: dict[str, Any]) -> None:
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with self.journal.open("a") as file:
            file.write(json.dumps({"key": key, **answer}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        complaint, delay = "", self.patience
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(2 * delay, 60.0)
            try:
                code, wait, text = self._post(body)
                if 200 <= code < 300:
                    return _answer_of(text)
                complaint = f"it answered {code}: {text[:500].decode(errors='replace').strip()}"
                if code not in RETRIED:
                    raise UserError(f"{self.url} refused a request for {self.model}: {complaint}")
                delay = max(delay, min(float(wait), 300.0)) if wait.replace(".", "", 1).isdigit() else delay
            except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                complaint = "it answered something that is no chat completion"
            except (OSError, http.client.HTTPException) as error:
                complaint = f"no answer ({getattr(error, 'reason', None) or error or type(error).__name__})"
        raise UserError(
            f"{self.url}: {complaint}, after {self.retries + 1} attempts. The {len(self._answers)} answers so far are kept in "
            f"{self.journal}; run the same command again to go on from there."
        )

    def _post(self, body: dict[str, Any]) -> tuple[int, str, bytes]:
        """(status, Retry-After, body). OSError or HTTPException when they did not come within the timeout."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        with _Deadline(self.timeout) as deadline:
            try:
                answer = urllib.request.build_opener(_NoRedirect, _Timed(deadline), _TimedTLS(deadline)).open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                where = f" (to {answer.headers.get('Location')})".encode() if 300 <= answer.status < 400 else b""
                text = answer.read(LARGEST + 1)
            deadline.check()
        if len(text) > LARGEST:
            raise ValueError
        return answer.status, answer.headers.get("Retry-After", ""), where or text


class _Deadline:
    """Ends a connection after so many seconds, however busy: a socket's own timeout starts anew with every byte."""

    def __init__(self, seconds: float):
        self.seconds, self.over = seconds, False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def watch(self, connected: socket.socket) -> None:
        self._sockets.append(connected)
        if self.over:
            self._end()

    def _end(self) -> None:
        self.over = True
        for each in self._sockets:
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # not the TLS layer's, which would wait for the other side

    def check(self) -> None:
        if self.over:
            raise TimeoutError(f"not whole within {self.seconds:g} s")

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._timer.cancel()
        if isinstance(error, OSError | http.client.HTTPException):
            self.check()


class _Timed(urllib.request.HTTPHandler):
    """http whose connections end with a deadline."""

    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.deadline = deadline

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_watched(http.client.HTTPConnection, self.deadline), request)


class _TimedTLS(urllib.request.HTTPSHandler):
    """The same for https."""

    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.deadline = deadline

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_watched(http.client.HTTPSConnection, self.deadline), request)


def _watched(kind: Any, deadline: _Deadline) -> Any:
    """A kind of connection whose socket the deadline knows."""

    class Connection(kind):
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    return Connection


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _answer_of(text: bytes) -> dict[str, Any]:
    """Text and end of a chat completion. ValueError, KeyError, IndexError or TypeError for anything else."""
    choice = json.loads(text)["choices"][0]
    content, reason = choice["message"]["content"], choice.get("finish_reason")
    if not isinstance(content, str | None) or not isinstance(reason, str | None):
        raise TypeError
    return {"text": content or "", "finished": reason != "length"}


def _read(journal: Path) -> dict[str, dict[str, Any]]:
    """The journal's answers by request. A last line torn by a kill is cut off, and completed where only its end is missing; a broken one
    before it is refused, for it was paid for."""
    answers: dict[str, dict[str, Any]] = {}
    if not journal.exists():
        return answers
    lines = journal.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key, answer = row["key"], {"text": row["text"], "finished": row["finished"]}
            if [type(key), type(answer["text"]), type(answer["finished"])] != [str, str, bool]:
                raise TypeError
            answers.setdefault(key, answer)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                raise UserError(
                    f"{journal}, line {number} is broken: repair or delete that line (its request is then sent again)."
                ) from None
            with journal.open("r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
            return answers
    if lines and not lines[-1].endswith(b"\n"):
        with journal.open("ab") as file:
            file.write(b"\n")
    return answers
