"""A teacher behind any OpenAI-compatible server, `openai:URL#model`: concurrent, retried, resumable, and nothing paid for twice.

Every answer goes into a journal (JSON lines) under the hash of its request before it is handed on; a request that the journal answers is
never sent again, whatever happened to the process in between.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.core.errors import UserError
from stillroom.lm.traces import Messages

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


@dataclass(frozen=True)
class Reply:
    """One answer of the server; `finished` is False when it stopped at its token limit."""

    text: str
    finished: bool


class Server:
    """Chat completions of one model on one server.

    spec: openai:URL#model, such as openai:http://localhost:8000/v1#smollm. journal: the file of answers. The key is read from
    OPENAI_API_KEY and only sent, never written. UserError when the spec is not of this form.
    """

    def __init__(self, spec: str, journal: Path, *, concurrency: int = 8, retries: int = 6, timeout: float = 120.0, patience: float = 1.0):
        kind, _, rest = spec.partition(":")
        self.url, _, self.model = rest.partition("#")
        if kind != "openai" or not self.url.startswith(("http://", "https://")) or not self.model:
            raise UserError(f"{spec!r} names no server: write openai:URL#model, such as openai:http://localhost:8000/v1#my-model.")
        self.journal, self.concurrency, self.retries, self.timeout, self.patience = journal, concurrency, retries, timeout, patience
        self._lock, self._answers = threading.Lock(), _read(journal)

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
            known = self._answers.get(key)
        if known is None:
            known = self._ask(body)
            with self._lock:
                self._answers[key] = known
                self.journal.parent.mkdir(parents=True, exist_ok=True)
                with self.journal.open("a") as file:
                    file.write(json.dumps({"key": key, **known}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return Reply(known["text"], known["finished"])

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        complaint, delay = "", self.patience
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(2 * delay, 60.0)
            try:
                choice = json.loads(self._post(body))["choices"][0]
                return {"text": str(choice["message"]["content"] or ""), "finished": choice.get("finish_reason") != "length"}
            except urllib.error.HTTPError as error:
                said = error.read(500).decode(errors="replace").strip()
                complaint = f"it answered {error.code}: {said}"
                if error.code not in RETRIED:
                    raise UserError(f"{self.url} refused a request for {self.model}: {complaint}") from None
                wait = error.headers.get("Retry-After", "")
                delay = max(delay, min(float(wait), 300.0)) if wait.replace(".", "", 1).isdigit() else delay
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError):
                complaint = "it answered something that is no chat completion"
            except (OSError, http.client.HTTPException) as error:
                complaint = f"no answer ({getattr(error, 'reason', None) or error or type(error).__name__})"
        raise UserError(
            f"{self.url}: {complaint}, after {self.retries + 1} attempts. The {len(self._answers)} answers so far are kept in "
            f"{self.journal}; run the same command again to go on from there."
        )

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read().decode()


def _read(journal: Path) -> dict[str, dict[str, Any]]:
    """The journal's answers by request. A last line torn by a kill is cut off; a broken one before it is refused, for it was paid for."""
    answers: dict[str, dict[str, Any]] = {}
    if not journal.exists():
        return answers
    lines = journal.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            answers[row["key"]] = {"text": row["text"], "finished": row["finished"]}
            if not line.endswith(b"\n"):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(
                    f"{journal}, line {number} is broken: repair or delete that line (its request is then sent again)."
                ) from None
            with journal.open("r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
    return answers
