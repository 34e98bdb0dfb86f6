"""What many commands print, from one process: each import of torch is paid for once."""

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import contextlib, io, json, os, runpy, sys
from pathlib import Path

root, found = Path(sys.argv[1]).resolve(), {}
sys.path.insert(0, str(root))  # -I: neither the current folder nor PYTHONPATH
os.environ["COLUMNS"] = "160"
for line in sys.argv[2:]:
    sys.argv, printed, code = line.split(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        if line.endswith(" --help"):
            code = "none: it goes on after the help"
    except SystemExit as done:
        code = done.code or 0
    if code != 0:
        sys.exit(f"{line}: exit code {code}")
    found[line] = printed.getvalue()
ours = {path.name for path in root.iterdir()}
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ours and getattr(module, "__file__", None):
        assert Path(module.__file__).resolve().is_relative_to(root), f"{name} comes from {module.__file__}"
print(json.dumps(found))
"""


def run_commands(lines: list[str], root: Path, cwd: Path) -> dict[str, str]:
    """Run each line, a module and its arguments, as python -m would, and return what each prints.

    Everything of ours is imported from the folder root, or it fails, as it does for an exit code that is not 0.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", CODE, str(root), *lines], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return json.loads(done.stdout)


def read_helps(modules: list[str], root: Path, cwd: Path) -> dict[str, str]:
    """Return what --help of each module prints. Everything of ours is imported from the folder root, or it fails."""
    printed = run_commands([f"{module} --help" for module in modules], root, cwd)
    return {line.removesuffix(" --help"): text for line, text in printed.items()}
