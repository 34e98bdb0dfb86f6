"""What flags are where they are not given, and the least and the most that each may be."""

import dataclasses
import math

import pytest

from engine.base.flags import name_to_flag
from engine.chat import ChatConfig
from engine.estimate import SHARED_FLAGS, EstimateConfig
from engine.evaluate import EvaluateConfig
from engine.export import ExportConfig
from engine.generate import GenerateConfig
from engine.serve import ServeConfig
from engine.training.config import FinetuneConfig

NOTHING = ("''", "()", "None", "False", "'auto'")  # the defaults of the flags that are not listed here
SAMPLED = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "batch_size": 8}
DEFAULTS = {
    FinetuneConfig: {
        "out": "out/finetune", "epochs": 3, "global_batch_size": 128, "packing": True, "share_prefix": True,
        "max_length": 512, "lr": 2e-05, "lr_schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.0,
        "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-08, "grad_clip": 1.0, "seed": 42, "shuffle": True,
        "rank_timeout": 600.0, "prompt_style": "alpaca", "adapter": "none", "lora_r": 16, "lora_alpha": 32.0,
        "lora_dropout": 0.0, "lora_targets": ("all-linear",), "loss_norm": "token", "master_weights": "split",
        "recompute": "cheap", "eval_fraction": 0.0, "eval_every": "epoch", "score_answers": 0, "sample_every": "off",
        "sample_tokens": 64, "save_every": "end", "keep": 2, "max_shard_bytes": 5_000_000_000, "tracker": "off",
        "max_skips": 3, "spike_threshold": 6.0, "log_every": 1,
    },
    EvaluateConfig: SAMPLED | {
        "model": ("smollm2-135m",), "out": "out/evaluate", "max_length": 512, "micro_batch_tokens": 4096,
        "max_new_tokens": 512,
    },
    GenerateConfig: SAMPLED | {"model": "smollm2-135m", "max_new_tokens": 256},
    ServeConfig: {
        "votes": "votes.jsonl", "host": "127.0.0.1", "port": 8000, "max_concurrency": 8, "max_queue": 64,
        "max_length": 2048, "max_body_bytes": 2**20, "timeout": 30.0,
    },
    ChatConfig: {
        "model": "smollm2-135m", "max_new_tokens": 512, "max_length": 2048, "temperature": 0.7, "top_p": 1.0, "seed": 0
    },
    ExportConfig: {"model": "smollm2-135m", "layout": "hf", "max_shard_bytes": 5_000_000_000},
}  # fmt: skip
DEFAULTS[EstimateConfig] = {"gpu": "H100", "gpus": 1} | {
    name: value for name, value in DEFAULTS[FinetuneConfig].items() if name in SHARED_FLAGS
}

NEEDED = {
    FinetuneConfig: {"model": "x", "data": ("x",)},
    EstimateConfig: {"model": "llama-7b"},
    EvaluateConfig: {"data": ("x",)},
    GenerateConfig: {"prompt": "x"},
    ServeConfig: {},
    ChatConfig: {},
    ExportConfig: {"out": "x"},
}
UNDER_1 = math.nextafter(1, 0)
OVER_1 = math.nextafter(1, 2)
LEAST = 5e-324  # over 0
COUNT, ANY, SHARE, POSITIVE = ((1,), (0,)), ((0,), (-1,)), ((0, UNDER_1), (-LEAST, 1)), ((LEAST,), (0,))
EVERY = (("off", "end", "epoch", "1"), ("0", "-1", "1.5", "often", ""))
NUMBERS = {"temperature": ((0,), (-LEAST,)), "top_p": ((LEAST, 1), (0, OVER_1))}
ENDS = {  # the values at the ends that are taken, and those beyond that are not
    FinetuneConfig: {
        **dict.fromkeys(
            ("epochs", "max_steps", "global_batch_size", "micro_batch_size", "keep", "max_shard_bytes", "sample_tokens",
             "log_every", "replicas", "rank_timeout", "lora_r"),
            COUNT,
        ),
        **dict.fromkeys(("lr", "weight_decay", "grad_clip", "spike_threshold"), ((0,), (-LEAST,))),
        **dict.fromkeys(("seed", "max_skips", "score_answers"), ANY),
        **dict.fromkeys(("warmup_ratio", "eval_fraction", "beta1", "beta2", "lora_dropout"), SHARE),
        **dict.fromkeys(("eval_every", "sample_every", "save_every"), EVERY),
        "micro_batch_tokens": ((512,), (511,)), "max_length": ((2,), (1,)), "adam_eps": POSITIVE,
        "lora_alpha": POSITIVE,
    },
    EstimateConfig: {
        "gpu_memory": POSITIVE, "gpu_tflops": POSITIVE, "gpu_bandwidth": POSITIVE, "host_bandwidth": POSITIVE,
        "price_per_hour": ((0,), (-LEAST,)), "gpus": ((1, 64), (0, 65)), "epochs": COUNT,
    },
    EvaluateConfig: NUMBERS | {
        "max_length": ((1, 4096), (0, 4097)), "micro_batch_tokens": ((512,), (511,)), "max_new_tokens": COUNT,
        "batch_size": COUNT,
    },
    GenerateConfig: NUMBERS | {"max_new_tokens": COUNT, "batch_size": COUNT},
    ServeConfig: {
        "port": ((0, 65535), (-1, 65536)), "max_concurrency": COUNT, "max_length": COUNT, "max_body_bytes": COUNT,
        "timeout": POSITIVE, "max_queue": ANY,
    },
    ChatConfig: NUMBERS | {"max_new_tokens": COUNT, "max_length": ((2,), (1,)), "seed": ANY},
    ExportConfig: {"max_shard_bytes": COUNT},
}  # fmt: skip


@pytest.mark.parametrize("config", DEFAULTS)
def test_defaults(config):
    found = {field.name: field.default for field in dataclasses.fields(config)}
    listed = DEFAULTS[config]
    assert {name: found[name] for name in listed} == listed
    for name in found.keys() - listed:
        assert repr(found[name]) in NOTHING, name


@pytest.mark.parametrize("config, name", [(config, name) for config, ends in ENDS.items() for name in ends])
def test_the_ends_of_what_a_flag_may_be(config, name):
    taken, refused = ENDS[config][name]
    others = NEEDED[config] | ({"adapter": "lora"} if name.startswith("lora") else {})
    others |= {"eval_fraction": 0.1} if name == "score_answers" else {}
    for value in taken:
        assert getattr(config(**others | {name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=rf"{name_to_flag(name)}|{name.removeprefix('lora_')}\b"):
            config(**others | {name: value})


@pytest.mark.parametrize("config", ENDS)
def test_no_number_is_without_ends(config):
    numbers = {f.name for f in dataclasses.fields(config) if str(f.type).split(" ")[0] in ("int", "float")}
    free = {EstimateConfig: set(SHARED_FLAGS) | {"replicas"}, EvaluateConfig: {"seed"}, GenerateConfig: {"seed"}}
    assert numbers - free.get(config, set()) <= ENDS[config].keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer_in_backward": True, "grad_clip": 1.0},
        {"optimizer_in_backward": True, "grad_clip": 0.0, "offload_optimizer": True},
        {"spike_rollback": True}, {"spike_rollback": True, "save_every": "off"},
        {"spike_rollback": True, "save_every": "9", "spike_threshold": 0.0},
        {"eval_fraction": 0.1, "eval_data": ("x",)}, {"score_answers": 1},
        {"score_answers": 1, "eval_fraction": 0.1, "train_on_prompt": True}, {"random_init": True}, {"lora_r": 8},
        {"adapter_dir": "x"}, {"adapter": "lora", "adapter_dir": ""}, {"adapter": "lora", "offload_optimizer": True},
        {"adapter": "qlora", "random_init": True, "model": "tiny"}, {"model": "tiny"}, {"out": ""}, {"data": ()},
    ],
    ids=str,
)  # fmt: skip
def test_flags_of_a_fine_tune_that_cannot_go_together_are_refused(changes):
    with pytest.raises(ValueError, match=name_to_flag(next(iter(changes)))):
        FinetuneConfig(**NEEDED[FinetuneConfig] | changes)
