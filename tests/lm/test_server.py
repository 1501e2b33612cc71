"""The server teacher: against a flaky server in this process, and against `transformers serve` with a small real model."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stillroom.core.errors import UserError
from stillroom.lm.server import Reply, Server

CHATS = [[{"role": "user", "content": f"question {i}"}] for i in range(6)]


class Flaky(BaseHTTPRequestHandler):
    """Answers each request by the next trouble of `server.script`, then by echoing its last message."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            trouble = self.server.script.pop(0) if self.server.script else None
        if trouble == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if trouble in ("slow head", "slow body"):
            head = b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if trouble == "slow body" else b"X: ")
            with contextlib.suppress(OSError):
                self.wfile.write(head)
                for _ in range(200):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            return
        text = trouble if isinstance(trouble, str) else json.dumps(
            {"choices": [{"message": {"content": "echo " + body["messages"][-1]["content"]}, "finish_reason": "stop"}]}
        )  # fmt: skip
        self.send_response(trouble if isinstance(trouble, int) else 200)
        if isinstance(trouble, int) and 300 <= trouble < 400:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere")
        if trouble == 429:
            self.send_header("Retry-After", "0.01")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):  # where a followed redirect would arrive
        with self.server.lock:
            self.server.seen.append(dict(self.headers))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def flaky():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    server.script, server.seen, server.lock = [], [], threading.Lock()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def teacher(server, tmp_path, **how):
    url = f"openai:http://127.0.0.1:{server.server_address[1]}/v1#m"
    return Server(url, tmp_path / "journal.jsonl", patience=0.01, **how)


def test_troubles_pass_and_answers_keep_their_order(flaky, tmp_path):
    flaky.script = [429, 500, "garbage", '{"choices": []}', "hang up", 503]
    groups = teacher(flaky, tmp_path).reply(CHATS, samples=2)
    assert groups == [[Reply(f"echo question {i}", True)] * 2 for i in range(6)]
    assert len(flaky.seen) == 12 + 6
    assert {body["seed"] for body in flaky.seen} == {0, 1}


def test_nothing_is_paid_for_twice_even_after_a_torn_journal(flaky, tmp_path):
    teacher(flaky, tmp_path).reply(CHATS[:3])
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('{"key": "torn')
    assert teacher(flaky, tmp_path).reply(CHATS[:4]) == [[Reply(f"echo question {i}", True)] for i in range(4)]
    assert len(flaky.seen) == 4
    teacher(flaky, tmp_path).reply(CHATS[:1], temperature=0.5)
    assert len(flaky.seen) == 5


def test_a_server_that_goes_away_halfway_loses_nothing(flaky, tmp_path):
    flaky.script = [None, None, None] + ["hang up"] * 100
    with pytest.raises(UserError, match=r"no answer .*The 3 answers so far are kept in .*journal.jsonl"):
        teacher(flaky, tmp_path, concurrency=1, retries=2).reply(CHATS)
    flaky.script, before = [], len(flaky.seen)
    assert len(teacher(flaky, tmp_path).reply(CHATS)) == 6
    assert len(flaky.seen) == before + 3


def test_a_refusal_is_not_repeated(flaky, tmp_path):
    flaky.script = [401]
    with pytest.raises(UserError, match="refused a request for m: it answered 401"):
        teacher(flaky, tmp_path, concurrency=1).reply(CHATS[:1])
    assert len(flaky.seen) == 1


def test_the_key_is_sent_and_not_written(flaky, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hush")
    teacher(flaky, tmp_path).reply(CHATS[:1])
    assert "hush" not in (tmp_path / "journal.jsonl").read_text()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(flaky, tmp_path, monkeypatch, code):
    monkeypatch.setenv("OPENAI_API_KEY", "hush")
    flaky.script = [code]
    with pytest.raises(UserError, match=rf"it answered {code}: .*elsewhere"):
        teacher(flaky, tmp_path).reply(CHATS[:1])
    assert len(flaky.seen) == 1


@pytest.mark.parametrize("where", ["slow head", "slow body"])
def test_an_answer_that_trickles_is_given_up(flaky, tmp_path, where):
    flaky.script, started = [where, where], time.monotonic()
    with pytest.raises(UserError, match=r"not whole within 0\.5 s"):
        teacher(flaky, tmp_path, retries=1, timeout=0.5).reply(CHATS[:1])
    assert time.monotonic() - started < 5
    assert teacher(flaky, tmp_path).reply(CHATS[:1]) == [[Reply("echo question 0", True)]]


def test_equal_requests_are_sent_once_and_answered_alike_ever_after(flaky, tmp_path):
    flaky.script = [500]
    first = teacher(flaky, tmp_path).reply(CHATS[:2] * 8)
    assert first == [[Reply(f"echo question {i}", True)] for i in (0, 1)] * 8
    assert len(flaky.seen) == 2 + 1
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2
    assert teacher(flaky, tmp_path).reply(CHATS[:2] * 8) == first
    flaky.script = [401]
    with pytest.raises(UserError, match="401"):
        teacher(flaky, tmp_path).reply(CHATS[2:3] * 8)


@pytest.mark.parametrize(
    "answer",
    [
        '{"choices": [{"message": {"content": ["a"]}}]}', '{"choices": [{"message": {"content": 3}}]}', '{"choices": {}}', "[]", "3",
        '{"choices": [{"message": {"content": "a"}, "finish_reason": 1}]}', '{"choices": [{"message": "a"}]}', "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_chat_completion_is_asked_for_again(flaky, tmp_path, answer):
    flaky.script = [answer]
    assert teacher(flaky, tmp_path).reply(CHATS[:1]) == [[Reply("echo question 0", True)]]
    assert len(flaky.seen) == 2


def test_a_last_line_that_lacks_only_its_end_is_completed(flaky, tmp_path):
    teacher(flaky, tmp_path).reply(CHATS[:2])
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 2):
        journal.write_bytes(whole[:-cut])
        before = len(flaky.seen)
        assert len(teacher(flaky, tmp_path).reply(CHATS[:2])) == 2
        assert len(flaky.seen) - before == (cut > 1)
        assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize("line", ['{"key": 1, "text": "b", "finished": true}', '{"key": "a", "text": null, "finished": true}',
                                  '{"key": "a", "text": "b", "finished": "no"}', "[]", "3"])  # fmt: skip
def test_a_whole_line_of_other_types_is_broken(tmp_path, line):
    (tmp_path / "j").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is broken"):
        Server("openai:http://localhost/v1#m", tmp_path / "j")


def test_an_opening_is_continued(flaky, tmp_path):
    group = teacher(flaky, tmp_path).reply(CHATS[:1], opening=["Thought: "])
    assert group == [[Reply("Thought: echo Thought: ", True)]]
    assert flaky.seen[0]["continue_final_message"] is True


def test_bad_specs_and_journals_are_explained(tmp_path):
    with pytest.raises(UserError, match="openai:URL#model"):
        Server("openai:localhost", tmp_path / "j")
    (tmp_path / "j").write_text('{"oops"\n{"key": "a", "text": "b", "finished": true}\n')
    with pytest.raises(UserError, match="line 1 is broken"):
        Server("openai:http://localhost/v1#m", tmp_path / "j")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`transformers serve` in its own process on loopback, with a two-layer Llama made from its config."""
    transformers = pytest.importorskip("transformers")
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("model")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["the quick brown fox"], trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>",
        chat_template="{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env=environment)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()
                    time.sleep(0.2)
            yield f"openai:http://127.0.0.1:{port}/v1#{folder}"
        finally:
            process.terminate()
            process.wait(20)


def test_a_real_server_with_a_real_model(served, tmp_path):
    server = Server(served, tmp_path / "journal.jsonl", concurrency=2)
    groups = server.reply(CHATS[:2], samples=2, max_new_tokens=8)
    assert [len(group) for group in groups] == [2, 2]
    assert all(isinstance(reply.text, str) for group in groups for reply in group)
    assert any(reply.text for group in groups for reply in group)
    assert not all(reply.finished for group in groups for reply in group)
    again = Server(served, tmp_path / "journal.jsonl")
    again._ask = None
    assert again.reply(CHATS[:2], samples=2, max_new_tokens=8) == groups
