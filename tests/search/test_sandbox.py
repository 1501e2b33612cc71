"""Programs that misbehave: each is stopped, says why, and leaves the next one unharmed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from stillroom.search import Limits, SandboxError, run_function
from stillroom.search.sandbox import cut_network


@pytest.mark.parametrize("value", [1, -2.5, "a\n'b\"", None, True, [1, [2, {"k": (3,)}]], "ü" * 100_000])
def test_plain_values_go_in_and_out(value):
    assert run_function("def f(x, y):\n    return [x, y]", "f", [value, 1]) == [value, 1]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("return undefined", "NameError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "no usable answer"),
        ("import os; os.kill(os.getpid(), 11)", "the program died"),
        ("return object()", "no usable answer"),
        ("import os; os.mkfifo('answer.txt'); os._exit(0)", "no usable answer"),
        ("import os; os.symlink('/dev/zero', 'answer.txt'); os._exit(0)", "no usable answer"),
        ("import os; os.symlink(__import__('sys').executable, 'answer.txt'); os._exit(0)", "no usable answer"),
        ("import os; os.truncate(os.open('answer.txt', 66, 0o600), 1 << 20); os._exit(0)", "no usable answer"),
        ("import os; os.remove('error.txt'); os.mkfifo('error.txt'); os._exit(3)", "the program died"),
        ("import os; os.mkdir('a', 0o300); open('a/b', 'w').close(); os._exit(1)", "the program died"),
        ("import os; os.kill(os.getppid(), 9); __import__('time').sleep(60)", "the waiting interpreter died"),
        ("import os; os.kill(os.getppid(), 19); __import__('time').sleep(60)", "the waiting interpreter died"),
        ("return eval('[' * 50 + ']' * 50)", None),
        ("return float('nan')", "no usable answer"),
        ("return 'x' * (1 << 30)", "MemoryError"),
        ("open('x', 'w').write('x' * (1 << 22))", "File too large"),
        ("while True: pass", "no answer after 0.5 s"),
        ("import time; time.sleep(60)", "no answer after 0.5 s"),
    ],
)
def test_what_goes_wrong_is_said(body, says, monkeypatch, tmp_path):
    monkeypatch.setattr("stillroom.search.sandbox._GRACE", 1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = Limits(seconds=0.5, memory_mb=256, file_mb=1, network=False)
    with pytest.raises(SandboxError, match=says) if says else nullcontext():
        run_function(f"def f():\n    {body}", "f", [], limits)
    assert not list(tmp_path.iterdir())
    assert run_function("def f():\n    return 'fine'", "f", []) == "fine"


def test_source_that_does_not_compile_and_functions_that_are_not_there():
    with pytest.raises(SandboxError, match="SyntaxError"):
        run_function("def f(:", "f", [])
    with pytest.raises(SandboxError, match="KeyError"):
        run_function("x = 1", "f", [])


def test_programs_share_nothing_and_see_little():
    assert run_function("import math\nmath.pi = 3\ndef f():\n    return math.pi", "f", []) == 3
    assert run_function("import math\ndef f():\n    return math.pi", "f", []) > 3.1
    seen = run_function("import os, sys\ndef f():\n    return [sorted(os.environ), os.listdir(), sys.path]", "f", [])
    assert set(seen[0]) <= {"PATH", "TMPDIR", "LC_CTYPE"}
    assert set(seen[1]) <= {"request.txt", "error.txt"}
    assert not any("site-packages" in path for path in seen[2])


def test_a_program_that_is_stopped_takes_its_children_along():
    source = "import os, time\ndef f():\n    child = os.fork()\n    if child == 0:\n        time.sleep(60)\n    return child"
    child = run_function(source, "f", [])
    for _ in range(200):
        try:
            with open(f"/proc/{child}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    break
        except FileNotFoundError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the program's child lives on")


def _in_a_child(call) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(0 if call() else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux") or not _in_a_child(cut_network), reason="no network namespaces here")
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = "import socket\ndef f(port):\n    socket.create_connection(('127.0.0.1', port), 2)\n    return 'connected'"
        port = server.getsockname()[1]
        with pytest.raises(SandboxError, match="unreachable"):
            run_function(source, "f", [port])
        assert run_function(source, "f", [port], Limits(seconds=5)) == "connected"


def test_a_waiting_interpreter_that_was_killed_is_replaced():
    from stillroom.search.sandbox import _server

    source = "def f():\n    return 'fine'"
    assert run_function(source, "f", []) == "fine"
    server = _server(os.getpid(), False)
    server.kill()
    server.wait()
    assert run_function(source, "f", []) == "fine"


def test_a_number_that_a_program_writes_is_never_signalled():
    """It can reach the waiting interpreter's output, for it runs as the same user; the line is not that of its call."""
    source = (
        "import os\ndef f(pid):\n    try:\n"
        "        with open(f'/proc/{os.getppid()}/fd/1', 'w') as out: out.write(f'{pid}\\n{pid} 1 0\\n')\n"
        "    except OSError: pass\n    return 'own'"
    )
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        assert run_function(source, "f", [bystander.pid]) == "own"
        assert run_function("def f(): return 'next'", "f", []) == "next"
        time.sleep(0.1)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_limits_of_the_user_that_are_lower_stay():
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from stillroom.search import Limits, SandboxError, run_function\n"
        'write = \'def f(n):\\n    print("y" * n, file=open("x", "w"), flush=True)\\n    return n\'\n'
        "print(run_function(write, 'f', [100]))\n"
        "try: run_function(write, 'f', [5000])\nexcept SandboxError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("100\n"), done.stderr
    assert "File too large" in done.stdout
