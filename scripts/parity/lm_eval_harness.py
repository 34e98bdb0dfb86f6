"""lm-eval on an exported folder, offline: its log-likelihoods of answers against the engine's of the same tokens.

python -m scripts.parity.lm_eval_harness --model out/exported --json benchmarks/lm_eval.json

The seed tasks are the questions. lm-eval (EleutherAI's lm-evaluation-harness) is installed into an environment of its
own, and run as its users run it: a task of a few lines, `--model hf`, fp32. Exits 1 if one log-likelihood differs by
more than 1e-4 of itself.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from data_gen.api.prompt import read_seed_tasks
from engine.model.batch import MicroBatch
from engine.serving.models import load_model
from kernels.base.commands import run_command
from scripts.base.environment import make_environment
from scripts.base.results import new_json_parser, today, write_json

PACKAGES = ("lm_eval==0.4.13", "torch>=2.11,<2.14", "transformers>=5,<6", "accelerate")
CLOSE = 1e-4  # of a log-likelihood: fp32 sums of some thousand logits, in another order
TASK = """task: answers
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def make_rows(n: int) -> list[dict[str, str]]:
    """Return {"prompt", "answer"} of the first n seed tasks without an input.

    lm-eval counts white space at a prompt's end to the answer, so it stands there from the start.
    """
    tasks = [task for task in read_seed_tasks() if not task["input"]][:n]
    prompts = [f"### Instruction:\n{task['instruction']}\n\n### Response:" for task in tasks]
    return [{"prompt": prompt, "answer": f"\n{task['output']}"} for prompt, task in zip(prompts, tasks, strict=True)]


def run_harness(python: str, model: str, rows: Sequence[dict[str, str]], folder: Path) -> list[float]:
    """Return the log-likelihood of each row's answer, as the lm-eval beside a Python finds it. folder is for its files.

    Raises subprocess.CalledProcessError if lm-eval fails.
    """
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "answers.yaml").write_text(TASK.format(rows=path))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [
        python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
        "--tasks", "answers", "--include_path", str(folder), "--device", "cpu", "--batch_size", "1", "--log_samples",
        "--output_path", str(folder / "out"),
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, **offline})
    (samples,) = (folder / "out").glob("*/samples_answers_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return [float(line["filtered_resps"][0][0]) for line in sorted(lines, key=lambda line: line["doc_id"])]


@torch.no_grad()
def score_answers(model_path: str, rows: Sequence[dict[str, str]]) -> list[float]:
    """Return the log-likelihood of each row's answer behind its prompt, as the engine finds it, in fp32."""
    model, tokenizer, _ = load_model(model_path, torch.device("cpu"), torch.float32, "ref")
    found = []
    for row in rows:
        start = len(tokenizer.encode(row["prompt"]))
        ids = torch.tensor(tokenizer.encode(row["prompt"] + row["answer"]))
        targets = torch.arange(start, len(ids))
        documents = torch.tensor([[0, len(ids), 0, 0]], dtype=torch.int32)
        batch = MicroBatch(ids, torch.arange(len(ids)), documents, targets - 1, ids[targets])
        found.append(-float(model.loss(batch)))
    return found


def main() -> int:
    """Print the largest difference, and write the figures."""
    parser = new_json_parser(__doc__)
    parser.add_argument("--model", required=True, help="a folder that engine.export or engine.finetune wrote")
    parser.add_argument("--rows", type=int, default=40, help="answers that are compared (default: 40)")
    args = parser.parse_args()
    rows = make_rows(args.rows)
    with tempfile.TemporaryDirectory() as folder:
        commands, versions = make_environment(Path(folder) / "environment", PACKAGES)
        theirs = run_harness(str(commands / "python"), str(Path(args.model).resolve()), rows, Path(folder))
    ours = score_answers(args.model, rows)
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(differences)
    result = {
        "date": today(), "model": Path(args.model).name, "answers": len(rows), "lm_eval": versions["lm_eval"],
        "transformers": versions["transformers"], "torch": torch.__version__, "largest_relative_difference": worst,
        "log_likelihood": {"ours": sum(ours), "lm_eval": sum(theirs)},
    }  # fmt: skip
    write_json(args.json, result)
    print(f"{len(rows)} answers: {sum(ours):.3f} and {sum(theirs):.3f} of lm-eval, one differs by {worst:.1e} at most")
    return int(worst > CLOSE)


if __name__ == "__main__":
    run_command(main)
