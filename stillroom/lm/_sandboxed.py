"""Runs inside the sandbox (standard library only): forks one confined child per snippet and relays its tool calls.

This process never runs foreign code. Each child limits itself (rlimits, then the system call filter, under which it can start no
process or thread, open no socket and signal nobody), restores the state it was given, and only then executes the snippet.
Lines of JSON: in comes {"code", "state"}; out go {"call", "args", "kwargs"} (answered by {"value"} or {"error"}) and one {"done": ...}.
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
import shutil
import signal
import sys
import time
import traceback
import types

MODULE = "__sandbox__"
LINE = 64 * 2**20  # no message of a child may be longer


class Printed(io.StringIO):
    """Standard output up to a number of characters; the rest is dropped."""

    def __init__(self, limit):
        super().__init__()
        self.left = limit

    def write(self, text):
        super().write(text[: self.left])
        self.left = max(0, self.left - len(text))
        return len(text)


def confine(config):
    """No way back: limits and filter hold for the rest of this process's life."""
    size = config["memory_mb"] * 2**20
    for limit, value in (
        (resource.RLIMIT_AS, size), (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(config["seconds"]) + 1),
    ):  # fmt: skip
        resource.setrlimit(limit, (value, value))

    class Program(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    bpf = base64.b64decode(config["filter"])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if libc.prctl(22, 2, ctypes.byref(Program(len(bpf) // 8, bpf)), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        os._exit(99)


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


def attend(child, out, into, config):
    """Relay the child's calls until it is done, dies or overruns; returns its outcome."""
    deadline, held = time.monotonic() + config["seconds"], b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([out], [], [], left)[0]:
            return {"error": f"TimeoutError: stopped after {config['seconds']:g} s"}
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
                    return {k: done[k] if done[k] is None else str(done[k]) for k in ("output", "error", "state")}
                call = {"call": str(message["call"]), "args": list(message["args"]), "kwargs": dict(message["kwargs"])}
            except (ValueError, KeyError, TypeError):
                return {"error": "the code broke the tool protocol"}
            started = time.monotonic()
            print(json.dumps(call), flush=True)
            answer = sys.stdin.readline().encode()
            deadline += time.monotonic() - started
            while answer:
                if not select.select([], [into], [], max(0.0, deadline - time.monotonic()))[1]:
                    return {"error": f"TimeoutError: stopped after {config['seconds']:g} s"}
                with contextlib.suppress(BrokenPipeError):
                    answer = answer[os.write(into, answer) :]
                    continue
                break


def serve(config):
    for line in sys.stdin:
        (out, child_out), (child_in, into) = os.pipe(), os.pipe()
        os.set_blocking(into, False)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 1)
            os.dup2(0, 2)
            os.close(out)
            os.close(into)
            os.chdir("/tmp")
            receive, stream = os.fdopen(child_in), os.fdopen(child_out, "w")

            def send(message, stream=stream):
                stream.write(json.dumps(message) + "\n")
                stream.flush()

            confine(config)
            try:
                execute(config, json.loads(line), receive, send)
            finally:
                os._exit(0)
        os.close(child_out)
        os.close(child_in)
        outcome = attend(child, out, into, config)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(out)
        os.close(into)
        for name in os.listdir("/tmp"):  # nothing of a candidate reaches the next one but the state its host hands on
            path = os.path.join("/tmp", name)
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
        print(json.dumps({"done": outcome}), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
