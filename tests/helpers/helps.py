"""The help of many commands from one process: each import of torch is paid for once."""

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import contextlib, io, json, os, runpy, sys
from pathlib import Path

root, helps = Path(sys.argv[1]).resolve(), {}
sys.path.insert(0, str(root))  # -I: neither the current folder nor PYTHONPATH
os.environ["COLUMNS"] = "160"
for command in sys.argv[2:]:
    sys.argv, printed = [command, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        code = "none: it goes on after the help"
    except SystemExit as done:
        code = done.code or 0
    if code != 0:
        sys.exit(f"{command} --help: exit code {code}")
    helps[command] = printed.getvalue()
ours = {path.name for path in root.iterdir()}
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ours and getattr(module, "__file__", None):
        assert Path(module.__file__).resolve().is_relative_to(root), f"{name} comes from {module.__file__}"
print(json.dumps(helps))
"""


def read_helps(modules: list[str], root: Path, cwd: Path) -> dict[str, str]:
    """Return what --help of each module prints. Everything of ours is imported from the folder root, or it fails."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", CODE, str(root), *modules], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
