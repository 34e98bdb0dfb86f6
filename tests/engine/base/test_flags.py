"""The command line: every problem at once, the nearest name, Stanford's own command."""

import dataclasses
import shlex
from dataclasses import dataclass

import pytest

from engine.base.flags import flag, parse_flags, shorten_word, suggest_nearest
from engine.model.config import MODELS, ModelConfig
from engine.training.config import EMBEDDED_DEFAULTS, GROUPS, FinetuneConfig
from engine.training.stanford_flags import translate_stanford_flags

STANFORD = """--model_name_or_path tiny --data_path ./alpaca_data.json --bf16 True --output_dir out/x
--num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8
--evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 1 --learning_rate 2e-5
--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --fsdp "full_shard auto_wrap"
--fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --tf32 True --model_max_length 512"""


def parse(text):
    return parse_flags(FinetuneConfig, shlex.split(text), translate_stanford_flags, EMBEDDED_DEFAULTS)


def problems(text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(text)
    assert stop.value.code == 2
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


def test_no_arguments_is_the_embedded_run():
    config, notes = parse("")
    assert (config.model, config.data, notes) == ("smollm2-135m", ("orders",), [])


def test_the_defaults_are_the_alpaca_recipe():
    config, _ = parse("--model smollm2-135m --data x.json")
    recipe = {
        "epochs": 3, "global_batch_size": 128, "max_length": 512, "lr": 2e-5, "lr_schedule": "cosine",
        "warmup_ratio": 0.03, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8, "grad_clip": 1.0,
        "seed": 42, "shuffle": True, "prompt_style": "alpaca", "train_on_prompt": False, "loss_norm": "token",
        "keep": 2,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in recipe} == recipe


def test_dashes_underscores_equals_signs_and_booleans():
    a, _ = parse("--model smollm2-135m --data a b --global_batch_size 8 --no-shuffle --skip-bad-rows True --lr=1e-4")
    b, _ = parse("--model=smollm2-135m --data a b --global-batch-size=8 --shuffle false --skip_bad_rows --lr 0.0001")
    assert a == b and a.data == ("a", "b") and not a.shuffle and a.skip_bad_rows


def test_stanfords_command():
    config, notes = parse(STANFORD + " --random-init")
    want = {
        "model": "tiny", "data": ("./alpaca_data.json",), "dtype": "bf16", "out": "out/x", "epochs": 3,
        "micro_batch_size": 4, "global_batch_size": 32, "eval_every": "off", "save_every": "2000", "keep": 1,
        "lr": 2e-5, "weight_decay": 0.0, "warmup_ratio": 0.03, "lr_schedule": "cosine", "log_every": 1,
        "max_length": 512,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in want} == want
    for name in ("--fsdp ", "--fsdp-transformer-layer-cls-to-wrap ", "--tf32 ", "--per-device-eval-batch-size "):
        assert sum(note.startswith(name) for note in notes) == 1


def test_every_problem_is_told_at_once(capsys):
    found = problems(
        "--modle x --lr abc --lr-schedule cosin --epochs 0 --warmup-ratio 3 --eval-fraction 0.1 --eval-data z", capsys
    )
    assert found == [
        "unknown flag --modle; did you mean --model?",
        "--lr is 'abc', wanted a finite number",
        "--lr-schedule is 'cosin', wanted one of cosine, linear, constant; did you mean cosine?",
        "--epochs is 0, wanted 1 or more",
        "--warmup-ratio is 3.0, wanted at least 0 and under 1",
        "--eval-data and --eval-fraction exclude each other",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("stray", "'stray' is no flag; flags begin with --"),
        ("--seed", "--seed wants one value, got 0"),
        ("--seed 1 2", "--seed wants one value, got 2: 1 2"),
        ("--model x --data", "--data wants one value or more"),
        ("--seed 1.5", "--seed is '1.5', wanted a whole number"),
        ("--batch-size 4", "unknown flag --batch-size; --global-batch-size does that"),
        ("--gradient_checkpointing maybe", "--gradient-checkpointing is 'maybe', wanted True or False"),
        ("--gradient_checkpointing --recompute cheap", "--gradient-checkpointing contradicts --recompute cheap"),
        ("--optim sgd", "--optim is 'sgd', wanted one of adamw_torch"),
        ("--warmup_steps 10", "--warmup-steps 10: pass --warmup-ratio, the share of all steps"),
        ("--lr_scheduler_kwargs {'min_lr':1}", "the schedules here have no settings; leave it out"),
        ("--report_to mlflow", "--tracker is 'mlflow', wanted one of off, tensorboard, wandb, trackio"),
        ("--shuffle maybe", "--shuffle is 'maybe', wanted true or false"),
        ("--no-lr", "unknown flag --no-lr"),
        ("--out=", "--out is empty, wanted a folder"),
        ("--model llama-7b --data x", "--model llama-7b is a shape without weights"),
        ("--model lama-7b --random-init --data x", "did you mean llama-7b?"),
        ("--model smollm2-135m", "--data is missing"),
        ("--data x", "--model is missing"),
        ("--micro-batch-tokens 100", "an example must fit one forward"),
        ("--save-every often", "--save-every is 'often', wanted off, end, epoch, or a number of steps"),
        ("--bf16 True --dtype fp32", "--bf16 True contradicts --dtype fp32"),
        ("--bf16 perhaps", "--bf16 is 'perhaps', wanted True or False"),
        ("--gradient_accumulation_steps 2 --global-batch-size 4", "say the same thing; give one"),
        ("--save_strategy sometimes", "--save-strategy is 'sometimes', wanted no, steps or epoch"),
        ("--save-every 5 --save_strategy no", "--save-every and --save-strategy say the same thing; give one"),
        ("--kernels magic", "--kernels is 'magic', wanted one of auto, triton, native, ref"),
        ("--lr nan", "--lr is 'nan', wanted a finite number"),
        ("--lr 1e300", "--lr is '1e300', wanted a finite number of at most 1e+38"),
        ("--seed 1e19", "--seed is '1e19', wanted a whole number of at most 1e+18"),
        ("--seed " + "9" * 5000, f"--seed is '{'9' * 80}...', wanted a whole number"),
        (f"--save_strategy steps --save_steps {'9' * 5000}", "--save-steps is '9999"),
        (f"--save-every {'9' * 5000}", "wanted off, end, epoch, or a number of steps"),
    ],
    ids=lambda text: text[:60],
)
def test_bad_flags(text, problem, capsys):
    assert any(problem in line for line in problems(text, capsys))


def test_of_a_flag_and_its_negation_the_last_counts():
    for words, shuffles in (("--shuffle --no-shuffle", False), ("--no-shuffle --shuffle", True)):
        assert parse(words)[0].shuffle == shuffles


def test_of_a_flag_given_twice_the_last_counts_and_is_named(capsys):
    config, _ = parse("--seed 1 --seed 2 --lr 1 --learning_rate 3 --shuffle")
    assert (config.seed, config.lr) == (2, 3.0)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: --seed is given twice; the last one counts",
        "warning: --lr is given twice (as --learning-rate); the last one counts",
    ]


def test_the_trainers_other_flags():
    config, notes = parse(
        "--gradient_checkpointing True --optim adamw_torch --report_to wandb --run_name x --logging_dir y "
        "--warmup_steps 0 --lr_scheduler_kwargs {} --do_train"
    )
    assert (config.recompute, config.tracker, config.warmup_ratio) == ("block", "wandb", 0.0)
    assert sum("not needed" in note for note in notes) == 4
    config, _ = parse("--gradient_checkpointing False --optim adamw_bnb_8bit --report_to none")
    assert (config.recompute, config.optimizer_states, config.tracker) == ("cheap", "8bit", "off")


@pytest.mark.parametrize("text", ["--zzz 1", "--val_size 0.1", "--preset x", "--push_to_hub True"])
def test_what_is_not_near_is_not_suggested(text, capsys):
    (line,) = problems(text, capsys)
    assert line == f"unknown flag {text.split()[0]}"


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    lines = capsys.readouterr().out
    text = " ".join(lines.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(FinetuneConfig):
        assert f"\n  --{field.name.replace('_', '-')}" in lines and " ".join(field.metadata["help"].split()) in text
        if field.default in (None, ""):
            default = "auto" if "auto" in field.metadata["help"] else "none"
            assert f"{' '.join(field.metadata['help'].split())} (default: {default}" in text
    assert "(default: 2e-05; also --learning-rate)" in text
    with pytest.raises(SystemExit) as stop:
        parse("--model x -h")
    assert (stop.value.code, capsys.readouterr().out) == (0, lines)


def test_help_has_groups_and_three_examples(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(":") and not line.startswith(" ")] == [
        *(f"{title}:" for title in GROUPS), "examples:"
    ]  # fmt: skip
    assert sum("engine.finetune" in line for line in lines[lines.index("examples:") :]) == 3
    assert lines.index("  --help") > lines.index("  --dry-run")
    assert lines.index("saving:") < lines.index("  --out") < lines.index("looking:") < lines.index("  --dry-run")


def test_named_models_have_the_parameters_they_are_known_for():
    sizes = {name: round(config.n_parameters / 1e6) for name, config in MODELS.items()}
    assert sizes == {
        "tiny": 3, "smollm2-135m": 135, "tinyllama-1.1b": 1100, "llama-7b": 6738, "llama-13b": 13016, "llama2-7b": 6738,
        "llama3-8b": 8030,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ({"dim": 10, "n_heads": 3}, "dim 10 must be a multiple of n_heads 3"),
        ({"n_heads": 4, "n_kv_heads": 3, "dim": 8}, "n_heads 4 must be a multiple of n_kv_heads 3"),
        ({"head_dim": 7}, "head_dim is 7, wanted an even number"),
        ({"vocab_size": 0, "n_layers": -1}, "n_layers is -1, wanted a positive number; vocab_size is 0"),
    ],
)
def test_impossible_shapes(shape, problem):
    with pytest.raises(ValueError, match=problem):
        ModelConfig(**shape)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("--lora", "; which one, --lora-r or --lora-alpha?"), ("--save", "; did you mean --save-every?"),
        ("--savee", ""), ("--save-evry", "; did you mean --save-every?"),
        ("--LORA", "; which one, --lora-r or --lora-alpha?"),
    ],
)  # fmt: skip
def test_the_flags_that_begin_alike_are_all_named(name, told):
    assert suggest_nearest(name, ["--lora-r", "--lora-alpha", "--save-every", "--seed"]) == told


@pytest.mark.parametrize("n", [80, 81])
def test_a_very_long_word_is_told_without_its_end(n):
    assert shorten_word("x" * n) == repr("x" * 80 + "..." * (n > 80))


@pytest.mark.parametrize("word", ["--no-packing=false", "--no-seed", "--no-no-packing"])
def test_a_flag_is_turned_off_without_a_value_and_only_where_it_can_be(word, capsys):
    with pytest.raises(SystemExit):
        parse_flags(Negated, [word])
    assert f"error: unknown flag {word.partition('=')[0]}" in capsys.readouterr().err
    assert not parse_flags(Negated, ["--no-packing"])[0].packing and parse_flags(Negated, ["--packing"])[0].packing


@dataclass(frozen=True)
class Negated:
    """Have a switch and a number."""

    packing: bool = flag(True, "a switch")
    seed: int = flag(0, "a number")
