"""What command lines mean: the settings that they change, the notes on them, and why they are refused."""

import dataclasses
import shlex

import pytest

from engine.base.flags import parse_flags
from engine.chat import ChatConfig
from engine.evaluate import EvaluateConfig
from engine.export import ExportConfig
from engine.serve import ServeConfig
from engine.training.config import EMBEDDED_DEFAULTS, FinetuneConfig
from engine.training.stanford_flags import translate_stanford_flags

LINES = {
    "finetune": (FinetuneConfig, """

--model m
--data d
--model m --data d e --lr 1e-4 --no-shuffle --packing False --seed=7 --max_steps 9
--model m --data d --batch_size 4 --lr= --epochs 1.5 --seed x --shuffle maybe --dtype fp8
--model tiny --data d
--model llama-7b --data d --random_init --adapter lora
--model llama-9b --data d --random-init
--model m --data d --loss-norm micro-mean --micro-batch-tokens 100 --max-length 200
--model m --data d --optimizer-in-backward --offload-optimizer
--model m --data d --optimizer-in-backward --grad-clip 0
--model m --data d --spike-rollback
--model m --data d --spike-rollback --save-every 9 --spike-threshold 0
--model m --data d --eval-data e --eval-fraction 0.1 --score-answers 2 --train-on-prompt
--model m --data d --score-answers 2
--model m --data d --lora-r 4 --rslora --adapter-dir a
--model m --data d --adapter lora --adapter-dir '' --offload-optimizer --lora-targets
--model m --data d --adapter qlora --lora-r 4 --lora-rank-pattern down_proj=2 q_proj=x
--model m --data d --adapter lora --lora-alpha-pattern =3 --lora-save head --lora-dropout 1
--model m --data d --out ''
--model m --data d --kernels fast --resume never --keep 0 --log-every 0
--model_name_or_path m --data_path d --bf16 True --per_device_train_batch_size 4 --gradient_accumulation_steps 8
--model m --data d --bf16 False --per_device_train_batch_size 4 --fsdp "full_shard auto_wrap" --tf32 True
--model m --data d --bf16 yes --dtype fp32 --per_device_train_batch_size 0 --global-batch-size 8
--model m --data d --bf16 maybe --gradient_accumulation_steps 2 --micro-batch-size 3
--model m --data d --evaluation_strategy no --save_strategy steps --save_steps 2000 --save_total_limit 1
--model m --data d --eval_strategy steps --save_strategy epoch --eval_steps 7
--model m --data d --evaluation_strategy no --eval_strategy epoch --save_strategy best
--model m --data d --eval_steps 5 --save_strategy no --save_steps x
--model m --data d --eval_strategy epoch --eval-every 5 --save_steps 3 --save-every 2
--model m --data d --gradient_checkpointing --optim adamw_bnb_8bit --report_to tensorboard --warmup_steps 0
--model m --data d --gradient_checkpointing False --optim adamw_torch --report_to none --lr_scheduler_kwargs {}
--model m --data d --gradient_checkpointing True --recompute none --optim sgd --warmup_steps 10
--model m --data d --gradient_checkpointing perhaps --optim adamw_8bit --optimizer-states fp32
--model m --data d --lr_scheduler_kwargs '{"a": 1}'
--model m --data d --report_to wandb --tracker off --warmup_steps 0 --warmup-ratio 0.1 --run_name r --do_train
--model m --data d --logging_dir l --do_train --dataloader_num_workers 4 --per_device_eval_batch_size 2
--model m --data d --num_train_epochs 2 --learning_rate 1e-3 --lr_scheduler_type linear --model_max_length 99
--model m --data d stray --unknown 1 --losses 2 --num-epochs 3
"""),
    "serve": (ServeConfig, """

--port 65536 --max-queue -1 --max-length 0 --timeout 0
--host 0.0.0.0
--host 0.0.0.0 --api-key-env KEY
--adapter-dir a b --compare-with c
--adapter-dir a ''
--compare-with a b c
--compare-with a.json
--compare-with a.json b.json --prompts q
--compare-with c --prompts q --max-body-bytes 0 --max-concurrency 0
"""),
    "evaluate": (EvaluateConfig, """

--data d --max-length 0 --micro-batch-tokens 0 --max-new-tokens 0 --batch-size 0
--data d --max-length 5000
--prompts p --temperature -1
--prompts p --top-p 1.1
--data d --model a b --adapter-dir c
--data d --model x/a y/a.gguf
--data d --model a --adapter-dir b/a
--data d --adapter-dir ''
"""),
    "chat": (ChatConfig, """
--max-new-tokens 0
--max-length 1
--temperature inf --seed -1
--top-p 0 --adapter-dir ''
--temperature nan
--prompt-style vicuna
"""),
    "export": (ExportConfig, """

--out o.gguf
--out o --layout gguf --dtype bf16
--out o.gguf --layout gguf --dtype bf16
--out o --gguf-type f16
--out o.gguf --layout gguf --gguf-type q4_0
--out o --max-shard-bytes 0
"""),
}  # fmt: skip


@pytest.mark.parametrize("command", LINES)
def test_what_a_command_line_means(command, capsys, monkeypatch, snapshot):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cls, lines = LINES[command]
    extra = (translate_stanford_flags, EMBEDDED_DEFAULTS) if cls is FinetuneConfig else ()
    told = []
    for line in lines.split("\n")[1:-1]:
        told.append(f"$ {line}")
        try:
            config, notes = parse_flags(cls, shlex.split(line), *extra)
            changed = [f.name for f in dataclasses.fields(cls) if getattr(config, f.name) != f.default]
            told += [f"    {name} = {getattr(config, name)!r}" for name in changed]
            told += [f"    note: {note}" for note in notes]
        except SystemExit as ended:
            told.append(f"    => {ended.code}")
        told += [f"    {text}" for text in capsys.readouterr().err.splitlines()]
    assert "\n".join(told) == snapshot
