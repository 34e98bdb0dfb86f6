"""Processes of their own in a fraction of a second: forked from one that has imported engine and data_gen, no more.

Signals, exit codes, locks, threads and files are those of any other process; `python -c` would first import torch.
"""

import atexit
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
COMMANDS = [
    "engine.finetune", "engine.export", "engine.generate", "engine.serve", "data_gen.generate", "data_gen.judge",
]  # fmt: skip
LATE = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.run", "numpy.random"]  # of a sharded model: 1 s
FORKS.set_forkserver_preload([*COMMANDS, *LATE, "openai", "tests.helpers.interpreter", "tests.helpers.forks"])


class Started:
    """`python -c CODE ARGS` in ROOT, with the parts of subprocess.Popen that tests use. log: file of all it says."""

    def __init__(self, code, *args, env=None, log=None):
        session = os.environ.get("XDG_CACHE_HOME")  # conftest.py removes it, also after a test that failed
        self.folder = tempfile.TemporaryDirectory(prefix="process-", dir=session)
        self.files = [str(log or Path(self.folder.name, name)) for name in ("out", "err")]
        arguments = code, ["-c", *map(str, args)], dict(os.environ if env is None else env), self.files
        self.process = FORKS.Process(target=run, args=arguments)
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate

    def poll(self):
        return self.process.exitcode

    def read_until(self, text):
        """Wait until stdout has a text, and return all of stdout."""
        while not Path(self.files[0]).exists() or text not in (said := Path(self.files[0]).read_text()):
            assert self.poll() is None, self.communicate()
            time.sleep(0.01)
        return said

    def communicate(self, timeout=None):
        """Wait until the process has ended and return (stdout, stderr)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
            raise subprocess.TimeoutExpired("python -c", timeout)
        return tuple(Path(file).read_text() for file in self.files)

    @property
    def returncode(self):
        return self.process.exitcode


FINETUNE = "import sys; from engine import finetune; from engine.base.errors import run_main\n"
FINETUNE += "sys.exit(run_main(finetune.main))"


def start_ranks(n, *args, code=FINETUNE):
    """Start n ranks, of engine.finetune or of other code, without torchrun."""
    shared = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Started(code, *args, env=shared | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)]


def ranks(n, *args, code=FINETUNE):
    """Run n ranks, of engine.finetune or of other code, without torchrun: return (exit codes, what all printed)."""
    started = start_ranks(n, *args, code=code)
    said = [text for process in started for text in process.communicate(timeout=200)]
    return [process.returncode for process in started], "".join(said)


# torchrun, whose ranks are forked from it instead of started: its own agent, rendezvous, signals, restarts, and ranks
# that are children of it, all without 4 CPU seconds of imports each. The real command is in test_launch.py.
TORCHRUN = """
import os, runpy, signal, subprocess, sys, traceback
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

class Forked(subprocess.Popen):
    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *_):
        self.pid, self._child_created = os.fork(), True
        if self.pid == 0:
            become(args[args.index("-u") + 1 :], env)

def become(argv, env):
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # torchrun handles them
            signal.signal(number, signal.SIG_DFL)
        os.closerange(3, 1000)  # torchrun's sockets
        os.environ.clear()
        os.environ.update(env)
        if argv[0] == "-m":
            sys.argv = list(argv[1:])
            del sys.modules[argv[1]]  # of the server; it is run as python -m runs it
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            exec(compile(open(argv[0]).read(), argv[0], "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)

subprocess_handler.Popen = Forked
run.main()
"""


def start_torchrun(*args, log=None, **variables):
    """Start `torchrun ARGS`, which name a Python file or -m and a module, on a machine without GPUs."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | variables
    return Started(TORCHRUN, *args, env=env, log=log)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(code, argv, env, files):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for fd, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), fd)
    sys.argv = argv
    atexit._clear()  # what the server has registered
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
