"""Other people's clients against engine.serve, in environments made for them: OpenAI's, LangChain's, and web pages'.

python -m scripts.serving.clients [--model smollm2-135m] [--json benchmarks/serving_clients.json]

Needs a network or an index of packages, and npm for OpenAI's JavaScript client, which is left out without it. Exits 1
if a client gets what it does not expect. What each feature wants is in scripts/serving/clients/.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kernels.base.commands import run_command
from scripts.base.environment import make_environment
from scripts.base.results import new_parser, today, write_json
from scripts.serving.server import serve_model

PROGRAMS = Path(__file__).with_name("clients")
OF_PYTHON = {"openai": "with_openai.py", "langchain-openai": "with_langchain.py", "web pages": "with_web_pages.py"}
PACKAGES = ("openai==3.57.0", "langchain-openai==1.7.4", "httpx>=0.28")
OF_NPM = "openai@6"


def make_node(folder: Path) -> tuple[str, dict[str, str]]:
    """Install OpenAI's JavaScript client beside our program; return the program's path and the version."""
    folder.mkdir()
    program = shutil.copy(PROGRAMS / "with_openai_js.mjs", folder)
    subprocess.run(["npm", "install", "--silent", "--prefix", folder, OF_NPM], check=True)
    package = json.loads((folder / "node_modules" / "openai" / "package.json").read_text())
    return str(program), {"openai-js": package["version"]}


def run_client(name: str, command: list[str]) -> list[dict]:
    """Run one client's program; return what it said of each feature, and one more line if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = [{"client": name, **json.loads(line)} for line in done.stdout.splitlines()]
    if done.returncode:
        told.append({"client": name, "feature": "the program itself", "right": False, "got": done.stderr[-600:]})
    for line in told:
        print(f"{line['client']:18} {line['feature']:26} {'ok' if line['right'] else 'WRONG':6} {line['got']}")
    return told


def main() -> int:
    """Print a line for each client and feature, and count those that are right."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="what is served (default: smollm2-135m)")
    parser.add_argument("--json", help="write the figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands, installed = make_environment(folder / "python", PACKAGES)
        programs = {name: [str(commands / "python"), str(PROGRAMS / file)] for name, file in OF_PYTHON.items()}
        versions = {name: installed[name] for name in OF_PYTHON if name in installed}
        if shutil.which("npm"):
            program, of_node = make_node(folder / "node")
            programs["openai-js"], versions = ["node", program], versions | of_node
        else:
            print("openai-js is left out: there is no npm", file=sys.stderr)
        with serve_model(("--model", args.model, "--max-length", "512"), folder / "log") as served:
            told = [line for name, command in programs.items() for line in run_client(name, [*command, served.url])]
    n_right = sum(line["right"] for line in told)
    print(f"{n_right} of {len(told)} as the clients expect, {', '.join(f'{n} {v}' for n, v in versions.items())}")
    if args.json:
        write_json(args.json, {"date": today(), "model": args.model, "versions": versions, "lines": told})
    return int(n_right < len(told))


if __name__ == "__main__":
    run_command(main)
