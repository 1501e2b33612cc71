"""Hostile snippets: none gets through, the sandbox and its host survive; and honest ones compute."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stillroom.core.errors import UserError
from stillroom.lm.sandbox import IMPORTS, Limits, Sandbox

SYSTEM = [
    *IMPORTS,
    "os",
    "sys",
    "socket",
    "subprocess",
    "threading",
    "ctypes",
    "signal",
    "resource",
    "pathlib",
    "shutil",
    "gc",
    "inspect",
    "fcntl",
    "struct",
]
THROUGH = "GOT" + "THROUGH"


@pytest.fixture(scope="module")
def box():
    """With every dangerous module allowed: the import list is comfort, the system must hold alone."""
    try:
        with Sandbox({"look": {"a": 3}.__getitem__, "big": lambda: "x" * 2**20}, imports=SYSTEM, limits=Limits(1.0, 300)) as sandbox:
            sandbox.run("1")
            yield sandbox
    except UserError as wrong:
        pytest.skip(str(wrong))


def to_all(statement, before=""):
    """Code that does something to each of its open files but the standard ones."""
    return f"import os\n{before}\nfor fd in range(3, 64):\n    try:\n        {statement}\n    except OSError: pass\n"


HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "one fork": f"import os\nos.fork()\nprint('{THROUGH}')",
    "threads": f"import threading\nthreading.Thread(target=print).start()\nprint('{THROUGH}')",
    "infinite loop": "while True: pass",
    "loop that swallows everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "huge allocation": f"x = bytearray(2**32)\nprint('{THROUGH}')",
    "growing allocation": "x = []\nwhile True: x.append(' ' * 10**6)",
    "endless output": "while True: print('y' * 10**6)",
    "huge power": f"x = 10 ** 10 ** 10\nprint('{THROUGH}')",
    "deep recursion": f"def f(): return f()\nf()\nprint('{THROUGH}')",
    "home folder": f"import os\nprint(os.listdir({str(Path.home())!r}), '{THROUGH}')",
    "root's files": f"print(open('/etc/passwd').read(), '{THROUGH}')",
    "this repository": f"print(open({__file__!r}).read(), '{THROUGH}')",
    "other processes": f"import os\nprint(os.listdir('/proc'), '{THROUGH}')",
    "environment": "import os\nassert 'STILLROOM_CANARY' in os.environ\nprint('" + THROUGH + "')",
    "writing outside": f"open('/usr/evil', 'w').write('x')\nprint('{THROUGH}')",
    "writing to the root": f"open('/evil', 'w').write('x')\nprint('{THROUGH}')",
    "filling the disk": f"f = open('big', 'wb')\nfor _ in range(500): f.write(b'x' * 2**20)\nprint('{THROUGH}')",
    "socket": f"import socket\nsocket.socket()\nprint('{THROUGH}')",
    "connecting": f"import socket\nsocket.create_connection(('127.0.0.1', 80), 1)\nprint('{THROUGH}')",
    "shell": f"import subprocess\nprint(subprocess.run(['/bin/ls', '/'], capture_output=True), '{THROUGH}')",
    "exec": f"import os\nos.execv('/bin/echo', ['echo', '{THROUGH}'])",
    "killing the parent": f"import os\nos.kill(os.getppid(), 9)\nprint('{THROUGH}')",
    "killing everything": f"import os\nos.kill(-1, 9)\nprint('{THROUGH}')",
    "killing by number": f"import os\nos.kill(1, 15)\nprint('{THROUGH}')",
    "raising its limits": f"import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('{THROUGH}')",
    "new namespace": f"import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nprint('{THROUGH}')",
    "mounting": f"import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0\nprint('{THROUGH}')",
    "tracing the parent": f"import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0\nprint('{THROUGH}')",
    "introspection to a shell": (
        "subs = ().__class__.__base__.__subclasses__()\n"
        "found = [c for c in subs if c.__name__ == '_wrap_close'][0].__init__.__globals__['system'](\"echo x\")\n"
        f"assert found == 0\nprint('{THROUGH}')"
    ),
    "introspection to a file": (
        "loader = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'FileLoader'][0]\n"
        f"print(loader('x', {__file__!r}).get_data({__file__!r}), '{THROUGH}')"
    ),
    "real import through builtins": f"import builtins, os\nos.system('echo {THROUGH}')",
    "forging its outcome": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"call\": \"nothing\", \"args\": [], \"kwargs\": {}}\\n')\n"
        "    except OSError: pass\nraise SystemExit"
    ),
    "garbage on the tool line": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'garbage\\n')\n    except OSError: pass",
    "closing every file": "import os, time\nos.closerange(0, 64)\ntime.sleep(1000)",
    "not reading an answer": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"call\": \"big\", \"args\": [], \"kwargs\": {}}\\n')\n"
        "    except OSError: pass\nwhile True: pass"
    ),
    "owning its pipes": to_all(
        "for command, value in OWNING:\n            try: fcntl.fcntl(fd, command, value); print(THROUGH)\n            except OSError: pass",
        f"import fcntl\nTHROUGH = {THROUGH!r}\nOWNING = (8, os.getppid()), (10, 9), (4, os.O_ASYNC), (4, os.O_NONBLOCK), (1031, 4096)",
    ) + "raise SystemExit",
    "owning its pipes by ioctl": to_all(
        "for command in (0x8901, 0x8902, 0x5452, 0x5421):\n"
        "            try: fcntl.ioctl(fd, command, b'\\1\\0\\0\\0'); print(THROUGH)\n            except OSError: pass",
        f"import fcntl\nTHROUGH = {THROUGH!r}",
    ) + "raise SystemExit",
    "deep nesting": to_all("os.write(fd, b'[' * 200_000 + b'\\n')") + "while True: pass",
    "deep call": to_all(
        "os.write(fd, line)", "line = b'{\"call\": \"look\", \"args\": ' + b'[' * 300 + b']' * 300 + b', \"kwargs\": {}}\\n'"
    ) + "while True: pass",
    "a long line": to_all("while True: os.write(fd, b'x' * 2**20)"),
    "a huge number": to_all("os.write(fd, b'9' * 100_000 + b'\\n')") + "while True: pass",
    "endless calls": "while True: look('a')",
    "a long forged outcome": to_all(
        "os.write(fd, line)", "line = b'{\"done\": {\"output\": \"' + b'x' * 100_000 + b'\", \"error\": \"e\", \"state\": \"\"}}\\n'"
    ) + "while True: pass",
    "unreadable folders": "import os\nos.mkdir('a', 0o300)\nopen('a/b', 'w').close()\nraise SystemExit",
    "many files": f"for i in range(100_000): open(str(i), 'w').close()\nprint('{THROUGH}')",
    "an unreadable folder at its end": "import os\nos.mkdir('left', 0o300)\nopen('left/file', 'w').close()\nos._exit(0)",
    "exiting": "import os\nos._exit(0)",
    "raising exit": "raise SystemExit",
    "crashing": "import ctypes\nctypes.string_at(0)",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_does_not_get_through(box, name, monkeypatch):
    monkeypatch.setenv("STILLROOM_CANARY", "secret")
    zygote, started = box._process.pid, time.monotonic()
    outcome = box.run(HOSTILE[name])
    assert outcome.error is not None
    assert THROUGH not in outcome.output
    assert len(outcome.output) <= 10_000
    assert time.monotonic() - started < 20
    assert box.run("import os\nprint(6 * 7, os.listdir())").output == "42 []\n"
    assert box._process.pid == zygote
    assert not Path("/usr/evil").exists()
    assert os.getpid()


def test_state_goes_on_and_back(box):
    first = box.run("import math\nclass Box: pass\nx, log, made = 1, [], Box()\nmade.size = 5\ndef double(n): return 2 * n * x")
    assert first.error is None
    tried = box.run("x = 10\nlog.append('tried')\nprint(double(4), made.size, math.floor(2.5))", first.state)
    assert tried.output == "80 5 2\n"
    assert box.run("print(x, log)", first.state).output == "1 []\n"
    assert box.run("print(x, log)", tried.state).output == "10 ['tried']\n"


def test_errors_keep_what_was_done_before_them_and_later_code_runs(box):
    failed = box.run("y = 3\nfrom math import nothing_like_this\nz = 4")
    assert failed.error.startswith("ImportError: cannot import name 'nothing_like_this' from 'math'")
    assert failed.error.endswith("(line 2)")
    assert box.run("print(y)", failed.state).output == "3\n"
    assert "NameError" in box.run("print(z)", failed.state).error
    assert box.run("def f(:").error.startswith("SyntaxError")


def test_files_live_in_one_folder_and_for_one_snippet(box):
    assert box.run("import os\nopen('note', 'w').write('x')\nprint(open(os.getcwd() + '/note').read())").output == "x\n"
    assert "FileNotFoundError" in box.run("open('note')").error
    assert "FileNotFoundError" in box.run("open('/dev/shm/note', 'w')").error


def test_tools_run_on_the_host_and_their_failures_are_python_errors(box):
    good = box.run("print(look('a') + 1)")
    assert (good.output, good.calls) == ("4\n", (("look", ("a",), {}, 3),))
    assert "RuntimeError: look: 'b'" in box.run("look('b')").error
    assert box.run("print(len(big()))").output == f"{2**20}\n"


def test_imports_outside_the_list_are_named():
    with Sandbox() as sandbox:
        assert "importing os is not allowed here" in sandbox.run("import os").error
        assert sandbox.run("from json import loads\nprint(loads('[1]'))").output == "[1]\n"


def test_a_package_outside_the_standard_library():
    pytest.importorskip("sympy")
    with Sandbox(imports=["sympy"], limits=Limits(30, 1000)) as sandbox:
        assert sandbox.run("import sympy\nprint(sympy.factorint(60))").output == "{2: 2, 3: 1, 5: 1}\n"


def test_output_is_cut(box):
    assert len(box.run("print('y' * 50_000)").output) == 10_000


def test_without_bubblewrap_it_refuses(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bubblewrap"):
        Sandbox()


def test_a_sandbox_that_falls_silent_or_ends_costs_the_snippet_alone(monkeypatch):
    """Whatever silences it: here another program stands in for the supervisor."""
    monkeypatch.setattr("stillroom.lm.sandbox.GRACE", 0.3)
    ready = "import sys, time\nsys.stdin.readline()\nprint('{\"failed\": null}', flush=True)\nsys.stdin.readline()\n"
    with Sandbox(limits=Limits(seconds=0.2)) as sandbox:
        good = sandbox._command
        for rest, message in (
            ("time.sleep(60)", "gave no answer for 0.5 s"),
            ("sys.exit()", "ended the sandbox's process"),
            ("print('[' * 100_000, flush=True)\ntime.sleep(60)", "broke the sandbox's protocol"),
        ):
            sandbox._command = [sys.executable, "-c", ready + rest]
            assert message in sandbox.run("1").error
            sandbox._command = good
            assert sandbox.run("print(1)").output == "1\n"
            sandbox.close()
        sandbox._command = [sys.executable, "-c", "import time\ntime.sleep(60)"]
        with pytest.raises(UserError, match="cannot isolate code on this system: it did not start"):
            sandbox.run("1")
        sandbox._command = [sys.executable, "-c", 'print(\'{"failed": "no seccomp"}\')']
        with pytest.raises(UserError, match="cannot isolate code on this system: no seccomp"):
            sandbox.run("1")


def test_limits_of_the_user_that_are_lower_stay():
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from stillroom.lm.sandbox import Sandbox\n"
        "with Sandbox() as box:\n"
        "    print(box.run(\"print('y' * 5000, file=open('x', 'w'), flush=True)\").error)\n"
        "    print(box.run(\"print('fine')\").output)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "File too large" in done.stdout, done.stderr
    assert "fine" in done.stdout
