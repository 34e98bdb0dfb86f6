"""Commands in which Triton compiles, each in a process of its own, forked from one that has imported what they need.

An import of torch, Triton and the kernels takes 3 CPU seconds, and about 30 commands of the tests need it. The process
has no TRITON_INTERPRET, so its kernels are those that compile. It ends when the tests do: nobody writes to its socket.
"""

import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED = [
    "pytest", "torch._dynamo", "torch.testing", "engine.output.checkpoint", "engine.training.fine_tuning",
    "kernels.base.commands", "kernels.compiled.records", "kernels.compiled.rules", "kernels.compiled.simulation",
    "kernels.measure.simulated_cases", "kernels.measure.simulated_records", "kernels.measure.tuner",
]  # fmt: skip


def run_compiler(module, *args, path=(), **environment):
    """Run python -m MODULE ARGS, or -c CODE ARGS, in which Triton compiles; return its subprocess.CompletedProcess.

    path: folders that go before this project's, another Triton's for example. environment: variables besides.
    """
    server, env = start_server(tuple(map(str, path))), clear_environment(path) | environment
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        request = json.dumps([module, list(map(str, args)), env]).encode()
        socket.send_fds(server, [len(request).to_bytes(4, "big")], [out.fileno(), err.fileno()])
        server.sendall(request)
        code = json.loads(server.makefile("rb").readline() or '"it has ended"')
        texts = [file.seek(0) or file.read().decode() for file in (out, err)]
    assert isinstance(code, int), f"the process that compiles: {code}"
    return subprocess.CompletedProcess([module, *args], code, *texts)


def clear_environment(path):
    """Return this process's variables for one in which Triton compiles."""
    left_out = "TRITON_INTERPRET", "PYTEST_ADDOPTS"
    env = {n: v for n, v in os.environ.items() if n not in left_out and not n.startswith("PYTEST_XDIST")}
    return env | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}


@cache
def start_server(path):
    """Start the process that has imported everything, once for each path, and return the socket to it."""
    ours, theirs = socket.socketpair()
    # torch.cuda.is_available() asks NVML: asking CUDA would begin it here, and no fork could use a GPU then.
    env = clear_environment(path) | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.compiler", str(theirs.fileno())],
        cwd=ROOT, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    return ours


def serve(connection):
    """Fork for each request, one after the other, and answer with the exit code: minus the number of a signal."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    while True:
        header, files, _, _ = socket.recv_fds(connection, 4, 2)
        if not header:
            return
        request = json.loads(connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL))
        child = os.fork()
        if not child:
            connection.close()
            run(*request, files)
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def run(module, args, env, files):
    """Become python -m MODULE ARGS, or -c CODE ARGS: run it and end the process."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
        sys.argv = [module, *args]
        if module == "-c":
            del sys.argv[1]
            exec(compile(args[0], "<code>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
