"""Runs programs in a client environment, each in a fork of this process, which has imported their packages.

A line of JSON on standard input is a program: `text`, `path` (its name in tracebacks, and `sys.argv[0]`), `arguments`
and `input`. The answer is a line too: `status`, `stdout` and `stderr`. Programs do not see each other's changes.
"""

import ast
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

LIMIT_SECONDS = 120


def import_packages(text):
    """Import what the program imports at its top. The program itself reports an import that fails."""
    for node in ast.parse(text).body:
        try:
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for name in node.names:
                    getattr(module, name.name, None)  # some packages import their parts when these are asked for
        except ImportError:
            pass


def run_forked(program):
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(program["input"].encode())
        given.seek(0)
        child = os.fork()
        if not child:
            for number, file in enumerate((given, out, err)):
                os.dup2(file.fileno(), number)
            os._exit(run(program))
        _, status = os.waitpid(child, 0)
        return {"status": os.waitstatus_to_exitcode(status), "stdout": read(out), "stderr": read(err)}


def run(program):
    signal.alarm(LIMIT_SECONDS)
    for name, mode, number in (("stdin", "r", 0), ("stdout", "w", 1), ("stderr", "w", 2)):
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
    sys.argv[:] = [program["path"], *program["arguments"]]
    sys.path[0] = str(Path(program["path"]).parent)
    main = sys.modules["__main__"] = type(sys)("__main__")
    try:
        exec(compile(program["text"], program["path"], "exec"), main.__dict__)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def read(file):
    file.seek(0)
    return file.read().decode()


answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # packages print when they are imported
for line in sys.stdin:
    program = json.loads(line)
    import_packages(program["text"])
    print(json.dumps(run_forked(program)), file=answers, flush=True)
os._exit(0)  # exit handlers of packages would wait for a network
