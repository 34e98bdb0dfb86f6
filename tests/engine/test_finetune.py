"""The whole command against a plain transformers loop, and against itself cut up differently."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from engine import finetune as command
from engine.base.errors import UsageError, run_main
from engine.distributed.world import World
from engine.formats.source import open_source
from engine.model.config import RopeScaling
from engine.output.state_as_model import open_training_state
from scripts.parity.transformers_loop import TransformersLoop, encode_rows
from tests.helpers.checkpoints import logits, read_model, their_logits
from tests.helpers.own_rows import write_alpaca
from tests.helpers.run import events, finetune
from tests.helpers.small_model import SEED_TASKS, VOCAB_SIZE, write_model, write_tokenizer

STEPS, BATCH, MAX_LENGTH, LR = 6, 8, 256, 1e-3  # no row is cut so far that it has no response


def run(*args):
    """The command in this process."""
    code = run_main(command.main, [str(a) for a in args])
    assert code == 0, f"exit code {code}"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Make a small LLaMA with grouped queries, llama3 RoPE scaling and an untied head, as transformers writes it."""
    folder = tmp_path_factory.mktemp("small")
    write_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=VOCAB_SIZE, max_position_embeddings=512, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def transformers_curve(folder, rows, micro=BATCH, loss_norm="token", steps=STEPS):
    """(loss, gradient norm) of each step of a LlamaForCausalLM under torch's AdamW, on padded batches."""
    loop = TransformersLoop(folder, lr=LR, total_steps=steps, exact_norm=True)
    examples = encode_rows(rows[: steps * BATCH], transformers.AutoTokenizer.from_pretrained(folder), MAX_LENGTH)
    return [loop.step(examples[i * BATCH : (i + 1) * BATCH], micro, loss_norm) for i in range(steps)]


def our_curve(folder, data, out, *more, steps=STEPS):
    run(
        "--model", folder, "--data", data, "--out", out, "--max-steps", steps, "--global-batch-size", BATCH,
        "--no-shuffle", "--dtype", "fp32", "--device", "cpu", "--lr", LR, "--max-length", MAX_LENGTH, *more,
    )  # fmt: skip
    return [(line["loss"], line["grad_norm"]) for line in events(out)]


def assert_same(ours, theirs, steps=STEPS):
    assert len(ours) == len(theirs) == steps
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        assert a == pytest.approx(b, rel=1e-4), f"step {step}"


def read(path):
    text = path.read_text()
    return path, json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "steps", "cuts"),
    [
        ("made rows", 12, [("--micro-batch-size", n) for n in (8, 1)]),
        (
            "seed tasks",
            4,
            [  # each pair of packing, sharing and size once
                ("--micro-batch-size", 4),
                ("--micro-batch-tokens", 260),
                ("--micro-batch-tokens", 2048, "--no-share-prefix"),
                ("--micro-batch-tokens", 2048, "--no-packing"),
                ("--micro-batch-tokens", 260, "--no-packing", "--no-share-prefix"),
            ],
        ),
    ],
    ids=["made rows", "seed tasks"],
)
def test_one_loss_curve(small, tmp_path, name, steps, cuts):
    """fp32: transformers with padding, and ours however the same global batch is cut into forwards."""
    path, rows = read(SEED_TASKS if name == "seed tasks" else write_alpaca(tmp_path))
    theirs = transformers_curve(small, rows, steps=steps)
    assert theirs[-1][0] < theirs[0][0] - 0.025 * steps, "the loss must move, or equal curves prove little"
    for i, cut in enumerate(cuts):
        assert_same(our_curve(small, path, tmp_path / str(i), *cut, steps=steps), theirs, steps=steps)


def test_block_recompute_changes_nothing(small, tmp_path):
    path, _ = read(SEED_TASKS)
    plain = our_curve(small, path, tmp_path / "a", steps=3)
    assert our_curve(small, path, tmp_path / "b", "--recompute", "block", steps=3) == plain


def test_micro_mean_is_the_2023_trainer(small, tmp_path):
    path, rows = read(SEED_TASKS)
    ours = our_curve(small, path, tmp_path, "--loss-norm", "micro-mean", "--micro-batch-size", 2, steps=4)
    assert_same(ours, transformers_curve(small, rows, micro=2, loss_norm="micro-mean", steps=4), steps=4)
    token = our_curve(small, path, tmp_path / "token", "--micro-batch-size", 2, steps=4)
    assert max(abs(a[0] - b[0]) for a, b in zip(ours, token, strict=True)) > 1e-3, "the two norms must differ here"


def test_bf16_follows_fp32(small, tmp_path):
    path, _ = read(SEED_TASKS)
    fp32 = our_curve(small, path, tmp_path / "fp32", steps=4)
    run(
        "--model", small, "--data", path, "--out", tmp_path / "bf16", "--max-steps", 4, "--bf16", "True",
        "--global-batch-size", BATCH, "--no-shuffle", "--device", "cpu", "--lr", LR, "--max-length", MAX_LENGTH,
    )  # fmt: skip
    bf16 = [line["loss"] for line in events(tmp_path / "bf16")]
    assert bf16 != [loss for loss, _ in fp32]
    assert bf16[-1] == pytest.approx(fp32[-1][0], rel=0.01)


def test_the_output_folder_is_complete_and_loads_elsewhere(small, tmp_path):
    path, _ = read(SEED_TASKS)
    out = tmp_path / "out"
    our_curve(
        small, path, out, "--eval-fraction", 0.1, "--eval-every", 3, "--sample-every", 3, "--sample-tokens", 8,
        "--save-every", 3, "--max-shard-bytes", 1_000_000,
    )  # fmt: skip
    names = {p.name for p in out.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "run.json",
        "metrics.jsonl",
        "report.html",
    } <= names
    assert {"model.safetensors.index.json", "checkpoint-3", "checkpoint-6"} <= names
    train = events(out)
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    keys = {
        "event", "step", "epoch", "loss", "lr", "grad_norm", "examples", "tokens", "computed_tokens", "loss_tokens",
        "step_seconds", "tokens_per_second", "mfu", "peak_memory_bytes",
    }  # fmt: skip
    assert all(set(line) == keys for line in train)
    assert [line["step"] for line in events(out, "eval")] == [0, 3, 6]
    assert [line["step"] for line in events(out, "sample")] == [0] * 3 + [3] * 3 + [6] * 3
    assert events(out, "end")[0]["status"] == "done"
    held = [line["loss"] for line in events(out, "eval")]
    assert held[2] < held[0]

    model = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("### Instruction:\nName a colour.\n\n### Response:", return_tensors="pt")["input_ids"]
    from engine.serving.models import load_model

    ours, our_tokenizer, _ = load_model(str(out), torch.device("cpu"), torch.float32)
    assert our_tokenizer.encode("### Instruction:\nName a colour.\n\n### Response:") == ids[0].tolist()
    documents = torch.tensor([[0, ids.shape[1], 0, 0]], dtype=torch.int32)
    with torch.no_grad():
        logits = ours.logits(ours(ids[0], torch.arange(ids.shape[1]), documents))
        assert (logits - model(ids).logits[0]).abs().max() < 1e-4


def test_stanfords_command_runs(tmp_path, rows_file):
    """Every flag of it, with its own values; only the two paths and the port are a user's."""
    done = finetune(
        "--model_name_or_path", "tiny", "--random-init", "--data_path", rows_file, "--bf16", "True",
        "--output_dir", tmp_path / "out", "--num_train_epochs", "3", "--per_device_train_batch_size", "4",
        "--per_device_eval_batch_size", "4", "--gradient_accumulation_steps", "8", "--evaluation_strategy", "no",
        "--save_strategy", "steps", "--save_steps", "2000", "--save_total_limit", "1", "--learning_rate", "2e-5",
        "--weight_decay", "0.", "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--logging_steps", "1",
        "--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "--tf32", "True",
    )  # fmt: skip
    assert "--fsdp is accepted and not needed" in done.stdout
    assert "step 3/3" in done.stdout and len(events(tmp_path / "out")) == 3
    assert done.stdout.endswith(f" -m engine.serve --model {tmp_path / 'out'}\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_dry_run_trains_nothing(tmp_path, rows_file):
    done = finetune("--model", "tiny", "--random-init", "--data", rows_file, "--out", tmp_path / "out", "--dry-run")
    assert "plan: 3 steps" in done.stdout and not (tmp_path / "out").exists()


def test_one_batch_is_learnt_by_heart(small, tmp_path, rows_file):
    rows_file.write_text(json.dumps(json.loads(rows_file.read_text())[:6]))
    run(
        "--model", small, "--data", rows_file, "--out", tmp_path / "out", "--epochs", 80,
        "--global-batch-size", 6, "--lr", 1e-2, "--device", "cpu",
    )  # fmt: skip
    losses = [line["loss"] for line in events(tmp_path / "out")]
    assert losses[0] > 7 and losses[-1] < 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": RopeScaling(kind="dynamic", factor=4.0), "max_seq_len": 64},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["dynamic RoPE past its length", "biases"],
)
def test_packed_and_shared_or_not_the_curve_is_one(changes, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_model(base, dim=32, hidden_dim=64, head_dim=8, **changes)
    rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i)))} for i in range(5, 80, 3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = (
        ("--save-every", 2, "--token-cache", "off"),
        ("--no-packing", "--no-share-prefix", "--micro-batch-size", 1),
    )
    curves = [
        our_curve(base, tmp_path / "rows.json", tmp_path / f"out{i}", *more, steps=3) for i, more in enumerate(options)
    ]
    assert_same(*curves, steps=3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out0", dtype=torch.float32)
    tokens = torch.arange(200)
    assert (logits(read_model(tmp_path / "out0"), tokens) - their_logits(theirs, tokens)).abs().max() < 1e-5
    state = open_training_state(tmp_path / "out0" / "checkpoint-2")
    assert state.config == open_source(base).config


# ---- the order of the command, its parts noted and not run -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Noted:
    """A plan, or its packing, of which only these are looked at."""

    max_tokens: int = 4096
    packing: "Noted | None" = None


@pytest.fixture
def noted(monkeypatch, tmp_path, capsys):
    """Return a function that runs the command and tells its parts in their order, with what each was given."""

    def note(*flags, finished=False, fits=True):
        told = []

        @contextlib.contextmanager
        def start_ranks(device, timeout):
            told.append(f"ranks {device} {timeout}")
            yield World()

        @contextlib.contextmanager
        def lock(out):
            told.append(f"lock {out.name}")
            try:
                yield
            finally:
                told.append("unlock")

        def require_disk_space(plan):
            told.append("disk")
            if not fits:
                raise UsageError("the disk is full")

        parts = {
            "start_ranks": start_ranks, "lock_output_folder": lock, "require_disk_space": require_disk_space,
            "prepare": lambda config, world, say: told.append("prepare") or Noted(packing=Noted()),
            "agree_on_plan": lambda plan, world: plan, "is_finished": lambda plan: finished,
            "find_start": lambda plan, say: SimpleNamespace(max_tokens=77),
            "fine_tune": lambda plan, world, signals, start: told.append(f"train {plan.packing.max_tokens}"),
            "describe_plan": lambda plan, world: told.append("describe") or "the plan", "Signals": lambda: None,
            "print_plan_estimate": lambda plan, world: told.append(f"estimate {plan.packing.max_tokens}"),
        }  # fmt: skip
        for name, part in parts.items():
            monkeypatch.setattr(command, name, part)
        words = ("--model", "m", "--data", "d", "--out", str(tmp_path / "out"), *flags)
        return told, run_main(command.main, list(words)), capsys.readouterr()

    return note


def test_everything_is_refused_and_locked_before_anything_is_trained(noted):
    words = ("--device", "cpu", "--rank-timeout", "7.5", "--tf32", "True")
    told, code, said = noted(*words)
    assert told == ["ranks cpu 7.5", "lock out", "prepare", "disk", "train 77", "unlock"] and code == 0
    assert "--tf32" in said.out, "what is done with a flag of Stanford's is told"
    assert noted(*words, fits=False)[:2] == (["ranks cpu 7.5", "lock out", "prepare", "disk", "unlock"], 2)
    told, code, said = noted(*words, finished=True)
    assert (told[-1], code) == ("unlock", 0) and "train 77" not in told and "holds this run, finished" in said.out
    assert noted(*words, "--dry-run")[0][3:] == ["disk", "describe", "estimate 77", "unlock"]


@pytest.mark.parametrize(
    ("on_cpu", "on_gpu", "dtype"), [(True, False, "bf16"), (True, True, "auto"), (False, False, "auto")]
)
def test_the_embedded_run_is_in_bf16_where_a_cpu_multiplies_it(on_cpu, on_gpu, dtype, monkeypatch):
    seen = []

    def parse_flags(cls, argv, translate, embedded):
        seen.append(embedded.get("dtype", "auto"))
        raise UsageError("enough")

    monkeypatch.setattr(command, "cpu_multiplies_bf16", lambda: on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(command, "parse_flags", parse_flags)
    assert run_main(command.main, []) == 2 and seen == [dtype]


@pytest.mark.parametrize("trial", [None, "a step takes 3 s"])
def test_a_dry_run_on_a_cpu_tries_a_step_and_else_estimates(trial, monkeypatch, capsys):
    asked, printed = {}, []

    def note(name, answer):
        return lambda *args: (asked.update({name: args}), answer)[1]

    parts = {"try_on_cpu": trial, "dataset_mix": "mix", "estimate_run": "found", "recipe_from_config": "recipe",
             "setting_from_config": "setting"}  # fmt: skip
    for name, answer in parts.items():
        monkeypatch.setattr(command, name, note(name, answer))
    monkeypatch.setattr(command.tables, "print_estimate", printed.append)
    config = command.FinetuneConfig(model="m", data=("d",), dtype="fp32")
    plan = SimpleNamespace(device=torch.device("cpu"), config=config, replicas=2, dtype=torch.float32, train="rows",
                           model_config="shape")  # fmt: skip
    command.print_plan_estimate(plan, World())
    said = capsys.readouterr().out
    assert printed == ([] if trial else ["found"])
    assert ("python -m engine.estimate --help" in said) == bool(trial) and (trial or "too little memory") in said
    world = SimpleNamespace(size=4)
    command.print_plan_estimate(plan, world)
    assert asked["setting_from_config"] == (dataclasses.replace(config, replicas=2), torch.float32, 4)
    assert asked["recipe_from_config"] == (dataclasses.replace(config, replicas=2), 4)
    assert asked["dataset_mix"] == ("rows", "recipe") and "on one H100" in capsys.readouterr().out
    assert asked["estimate_run"][0] == "shape" and asked["estimate_run"][2:] == ("mix", "recipe", "setting")
