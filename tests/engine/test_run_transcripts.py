"""Whole runs of engine.finetune: all that is printed, logged and recorded."""

import dataclasses
import json

import pytest

from engine import finetune
from engine.base.errors import run_main
from engine.model.config import MODELS
from tests.helpers.small_model import VOCAB_SIZE, small_model
from tests.helpers.transcripts import describe_changes, describe_json, describe_printed, list_files, list_tensors

RUNS = {
    "looked at": "--eval-fraction 0.2 --score-answers 2 --save-every 2 --sample-every 2 --sample-tokens 3 "
    "--max-steps 3",
    "lora": "--adapter lora --lora-r 4 --lora-alpha 6 --lora-dropout 0.25 --lora-rank-pattern down_proj=2 "
    "--lora-alpha-pattern q_proj=3 --rslora --lora-targets q_proj down_proj --prompt-style llama2 --epochs 1 "
    "--eval-data {rows} --eval-every epoch --log-every 2 --lr-schedule linear --warmup-ratio 0.5 --save-every 2 "
    "--keep 1 --lr 0.001",
    "2023": "--loss-norm micro-mean --micro-batch-size 2 --micro-batch-tokens 99 --no-shuffle --grad-clip 0 "
    "--lr-schedule constant --weight-decay 0.1 --optimizer-states 8bit --epochs 1 --global-batch-size 8 "
    "--max-shard-bytes 400000 --no-share-prefix --train-on-prompt --seed 7",
    "in backward": "--random-init --model tiny --tokenizer {model} --optimizer-in-backward --grad-clip 0 --max-steps 2 "
    "--recompute block --master-weights fp32 --beta1 0.8 --beta2 0.98 --adam-eps 1e-5",
}  # fmt: skip


def run(words, folder, rows, code=0):
    """Run the command in this process, on rows of a folder."""
    more = words.format(rows=rows, model=small_model()).split()
    flags = ["--model", small_model(), "--data", rows, "--out", folder / "out", "--dtype", "fp32", "--device", "cpu",
             "--token-cache", folder / "tokens",
             "--global-batch-size", 4, "--max-length", 64, *more]  # fmt: skip
    assert run_main(finetune.main, list(map(str, flags))) == code


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_prints_logs_and_records(name, tmp_path, rows_file, capsys, close_snapshot, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(MODELS["tiny"], vocab_size=VOCAB_SIZE))
    run(RUNS[name], tmp_path, rows_file)
    out = tmp_path / "out"
    assert describe_printed(capsys.readouterr().out, tmp_path) == close_snapshot
    assert describe_json(out / "metrics.jsonl", tmp_path) == close_snapshot(name="metrics")
    assert describe_changes(out / "run.json", tmp_path) == close_snapshot(name="run")
    states = sorted(out.glob("checkpoint-*/manifest.json"))
    facts = [describe_json(path, tmp_path) for path in states[-1:]] or [
        json.dumps(json.loads((out / "run.json").read_text())["facts"] | {"data_sha256": "#"}, indent=1)
    ]
    assert facts[0].replace(str(small_model()), "MODEL") == close_snapshot(name="facts")
    tensors = [f"{path.name}\n{list_tensors(path, hashed=False)}" for path in sorted(out.rglob("*.safetensors"))]
    assert "\n\n".join([list_files(out), *tensors]) == close_snapshot(name="files")


def test_what_a_run_tells_that_goes_on_or_would_start_over(tmp_path, rows_file, capsys, close_snapshot):
    """Looked at beforehand, done, done again, gone on from a state, with other settings, started over."""
    said = []
    always = "--max-steps 3 --save-every 1 --keep 9 --lr-schedule constant"
    for code, more in (
        (0, "--dry-run"),
        (0, ""),
        (0, ""),
        (2, "--lr 0.001 --seed 3"),
        (2, "--lr 0.001 --resume auto --data {rows} {rows}"),
        (0, "--resume {out}/checkpoint-1"),
        (2, "--lr 0.001 --resume {out}/checkpoint-2"),
        (0, "--lr 0.001 --resume {out}/checkpoint-2 --allow-changed --log-every 2 --eval-fraction 0.2"),
        (0, "--resume never --max-steps 1 --save-every off"),
    ):
        run(f"{always} {more}".replace("{out}", str(tmp_path / "out")), tmp_path, rows_file, code)
        captured = capsys.readouterr()
        said += [f"$ {more}", captured.out, captured.err]
    assert describe_printed("\n".join(said), tmp_path) == close_snapshot
