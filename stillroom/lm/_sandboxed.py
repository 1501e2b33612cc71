"""Runs inside the sandbox (standard library only): forks one confined child per snippet and relays its tool calls.

This process never runs foreign code, and trusts nothing that a child writes: not its length, depth, form or number. Each child takes a
mount namespace with an empty folder of its own, limits itself (rlimits, no capabilities, then the system call filter, under which it can
start no process or thread, open no socket and signal nobody), restores the state it was given, and only then executes the snippet.
Lines of JSON: first in comes the config and out goes {"failed": reason or null}; then in comes {"code", "state"}, and out go
{"call", "args", "kwargs"} (answered by {"value"} or {"error"}) and one {"done": ...}.
"""

import ast
import base64
import builtins
import contextlib
import ctypes
import io
import json
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
import types

MODULE = "__sandbox__"
LINE = 16 * 2**20  # no message of a child may be longer,
DEPTH = 50  # deeper,
CALLS = 1000  # or one of more tool calls
FOLDER = b"size=64m,nr_inodes=4096,mode=0777"


class Printed(io.StringIO):
    """Standard output up to a number of characters; the rest is dropped."""

    def __init__(self, limit):
        super().__init__()
        self.left = limit

    def write(self, text):
        super().write(text[: self.left])
        self.left = max(0, self.left - len(text))
        return len(text)


def limit(**most):
    """Lower this process's limits; one that is lower already stays."""
    for name, value in most.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def confine(config):
    """No way back: folder, limits and filter hold for the rest of this process's life. OSError when the system refuses one of them."""
    libc = ctypes.CDLL(None, use_errno=True)

    class Program(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    def must(what, result):
        if result != 0:
            raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")

    must("no mount namespace", libc.unshare(0x20000))  # CLONE_NEWNS: the folder ends with this process
    must("no temporary folder", libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 6, FOLDER))  # MS_NOSUID | MS_NODEV
    os.chdir("/tmp")
    nobody = (ctypes.c_uint32 * 6)()
    must("capabilities stay", libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), nobody))
    size = config["memory_mb"] * 2**20
    limit(AS=size, FSIZE=size, NOFILE=64, CORE=0, CPU=int(config["seconds"]) + 1)
    bpf = base64.b64decode(config["filter"])
    must("privileges stay", libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    must("no seccomp", libc.prctl(22, 2, ctypes.byref(Program(len(bpf) // 8, bpf)), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def tool(name, receive, send):
    def call(*args, **kwargs):
        send({"call": name, "args": args, "kwargs": kwargs})
        answer = json.loads(receive.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    call.__name__ = name
    return call


def restore(space, state):
    """Definitions first (as source), then values (pickled here, in a process as confined as this one)."""
    if state:
        definitions, values = pickle.loads(base64.b64decode(state))
        for source in definitions:
            exec(source, space)
        space.update(pickle.loads(values))
        return definitions
    return []


def snapshot(space, given, definitions):
    values = {}
    for name, value in space.items():
        if name not in given and not isinstance(value, type | types.ModuleType | types.FunctionType):
            with contextlib.suppress(Exception):
                pickle.dumps(value)
                values[name] = value
    return base64.b64encode(pickle.dumps((definitions, pickle.dumps(values)))).decode()


def names(node):
    """What a definition or import binds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names} - {"*"}
    return {node.name}


def execute(config, request, receive, send):
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    space, printed = module.__dict__, Printed(config["output"])
    allowed, load = set(config["imports"]), builtins.__import__

    def importing(name, globals=None, locals=None, fromlist=(), level=0):
        if (globals or {}).get("__name__") == MODULE and name.partition(".")[0] not in allowed:
            raise ImportError(f"importing {name} is not allowed here; allowed are {', '.join(sorted(allowed))}")
        return load(name, globals, locals, fromlist, level)

    builtins.__import__ = importing
    for name in config["tools"]:
        space[name] = tool(name, receive, send)
    error, definitions, mine = None, [], []
    sys.stdout = sys.stderr = printed
    given = dict.fromkeys(space)
    try:
        definitions = restore(space, request["state"])
        tree = ast.parse(request["code"])
        kept = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
        mine = [node for node in tree.body if isinstance(node, kept)]
        exec(compile(tree, "<code>", "exec"), space)
    except BaseException as wrong:
        frames = [f.lineno for f in traceback.extract_tb(wrong.__traceback__) if f.filename == "<code>"]
        line = getattr(wrong, "lineno", None) if isinstance(wrong, SyntaxError) else frames[-1] if frames else None
        error = f"{type(wrong).__name__}: {wrong}" + (f" (line {line})" if line else "")
    definitions = definitions + [ast.unparse(node) for node in mine if names(node) <= space.keys()]  # a failed one bound nothing
    send({"done": {"output": printed.getvalue(), "error": error and error[:2000], "state": snapshot(space, given, definitions)}})


def shallow(value, depth=DEPTH):
    """Whether lists and dicts are nested at most so deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(shallow(each, depth - 1) for each in inner)


def attend(child, out, into, config):
    """Relay the child's calls until it is done, dies or overruns; returns its outcome."""
    deadline, held, calls = time.monotonic() + config["seconds"], b"", 0
    late = {"error": f"TimeoutError: stopped after {config['seconds']:g} s"}
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([out], [], [], left)[0]:
            return late
        part = os.read(out, 2**20)
        if not part:
            os.kill(child, signal.SIGKILL)  # it may only have closed its end
            status = os.waitpid(child, 0)[1]
            return {"error": f"the code ended its own process ({status})"}
        held += part
        if len(held) > LINE:
            return {"error": "the code wrote too much"}
        while b"\n" in held:
            line, _, held = held.partition(b"\n")
            try:
                message = json.loads(line)
                if "done" in message:
                    done = message["done"]
                    most = {"output": config["output"], "error": 2000, "state": LINE}
                    return {k: done[k] if done[k] is None else str(done[k])[: most[k]] for k in most}
                call = {"call": str(message["call"]), "args": list(message["args"]), "kwargs": dict(message["kwargs"])}
                if not shallow(call):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError, MemoryError):
                return {"error": "the code broke the tool protocol"}
            calls += 1
            if calls > CALLS:
                return {"error": f"the code called tools more than {CALLS} times"}
            started = time.monotonic()
            print(json.dumps(call), flush=True)
            answer = sys.stdin.readline().encode()
            deadline += time.monotonic() - started
            while answer:
                if not select.select([], [into], [], max(0.0, deadline - time.monotonic()))[1]:
                    return late
                with contextlib.suppress(BrokenPipeError):
                    answer = answer[os.write(into, answer) :]
                    continue
                break


def snippet(config, line, child_in, child_out):
    """The child's whole life."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(0, 2)
    receive, stream = os.fdopen(child_in), os.fdopen(child_out, "w")

    def send(message):
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    try:
        confine(config)
        execute(config, json.loads(line), receive, send)
    finally:
        os._exit(0)


def run(config, line):
    (out, child_out), (child_in, into) = os.pipe(), os.pipe()
    os.set_blocking(into, False)
    child = os.fork()
    if child == 0:
        os.close(out)
        os.close(into)
        snippet(config, line, child_in, child_out)
    os.close(child_out)
    os.close(child_in)
    try:
        return attend(child, out, into, config)
    except MemoryError:
        return {"error": "the code wrote too much"}
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(out)
        os.close(into)


def refusal(config):
    """What keeps a child of this process from being confined; None when nothing does."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            confine(config)
        except Exception as wrong:
            os.write(into, str(wrong).encode())
        os._exit(0)
    os.close(into)
    reason = os.read(out, 2000).decode()
    os.close(out)
    status = os.waitpid(child, 0)[1]
    return reason or (f"its first process died ({status})" if status else None)


def serve(config):
    """The host stops at the first answer when it names a reason."""
    limit(AS=(config["memory_mb"] + 512) * 2**20, CORE=0)
    print(json.dumps({"failed": refusal(config)}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"done": run(config, line)}), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
