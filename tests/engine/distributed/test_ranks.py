"""Several ranks are one run: torchrun with gloo on the CPU against one process: same rows, curve and weights."""

import dataclasses
import json
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import finetune as command
from engine.base.errors import UsageError, run_main
from engine.model.config import MODELS
from engine.training.config import FinetuneConfig
from engine.training.prepare import check_ranks
from tests.helpers.forks import Started, ranks, start_ranks, start_torchrun
from tests.helpers.run import BEFORE_CALL, PARTS_OF_A_RUN, events
from tests.helpers.small_model import small_model, write_model

STEPS = 6
COMMON = ("--device", "cpu", "--dtype", "fp32", "--lr", "1e-3", "--max-length", 64)


def several(n, *args):
    codes, said = ranks(n, *args)
    assert codes == [0] * n, said
    return said


def alone(*args):
    assert run_main(command.main, [str(a) for a in args]) == 0


def flags(rows, out, *more):
    data = "--data", rows, "--out", out, "--global-batch-size", 8, "--max-steps", STEPS
    return ("--model", small_model(), *COMMON, *data, *more)


def curve(out):
    return [(line["loss"], line["grad_norm"]) for line in events(out)]


def same(out, reference, weights=2e-5):
    for ours, theirs in zip(curve(out), curve(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    name = "adapter_model.safetensors" if (out / "adapter_config.json").exists() else "model.safetensors"
    a, b = (load_file(folder / name) for folder in (out, reference))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.dist(a[name], b[name]) <= weights * b[name].norm(), name


@pytest.fixture(scope="module")
def reference(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    alone(*flags(rows, out, "--eval-fraction", 0.2, "--eval-every", 2, "--sample-every", "end", "--sample-tokens", 4))
    return out


@pytest.mark.parametrize(
    "n, more",
    [
        (2, ()),
        (4, ("--replicas", 2, "--micro-batch-tokens", 64)),
        (3, ("--micro-batch-tokens", 64, "--recompute", "block", "--offload-optimizer")),
        (2, ("--micro-batch-tokens", 64, "--offload-optimizer")),
    ],
)
def test_ranks_give_one_curve(rows, reference, tmp_path, n, more, monkeypatch):
    if n == 2 and more:
        monkeypatch.setenv("CRIA_OPTIMIZER", "cpu")
    out = tmp_path / "out"
    said = several(n, *flags(
        rows, out, "--eval-fraction", 0.2, "--eval-every", 2, "--sample-every", "end", "--sample-tokens", 4, *more
    ))  # fmt: skip
    same(out, reference)
    assert "the model is in" in said
    assert ("updated by the CPU; gradients go there after backward" in said) == (n == 2 and more != ())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    theirs = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    for event in ("eval", "sample"):
        mine, other = ([line for line in found if line["event"] == event] for found in (lines, theirs))
        assert len(mine) == len(other) > 0
        for a, b in zip(mine, other, strict=True):
            assert a.get("text") == b.get("text") and a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
    for name in ("tokens", "examples", "loss_tokens"):
        mine, other = ([line[name] for line in found if line["event"] == "train"] for found in (lines, theirs))
        assert mine == other, name


# ---- faults: each run is a file that torchrun starts, with something that goes wrong on one rank --------------------

DRIVER = (
    PARTS_OF_A_RUN
    + """
from pathlib import Path
from engine.distributed import world as distributed

RANK = int(os.environ.get("RANK", "0"))
die, term, freeze = (lambda n=n: os.kill(os.getpid(), n) for n in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))
"""
)
RUN = "\nsys.exit(run_main(finetune.main, sys.argv[1:]))\n"


def patched(n, patch, *args):
    """Run n ranks under a patch, started by no torchrun: return (exit codes, what all printed)."""
    code = DRIVER + BEFORE_CALL + patch + RUN
    if n > 1:
        return ranks(n, *args, code=code)
    process = Started(code, *args)
    said = "".join(process.communicate(240))
    return [process.returncode], said


def start_driven(tmp_path, n, patch, *args, more=()):
    """Start n ranks under a patch by torchrun."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER + BEFORE_CALL + patch + RUN)
    return start_torchrun("--standalone", f"--nproc-per-node={n}", *more, script, *args)


SAVES = ("--eval-fraction", 0.2, "--eval-every", 2, "--save-every", 1)


def steps_of(out):
    return [line["step"] for line in events(out)]


def test_ranks_begin_with_the_random_weights_of_one_process(rows, tmp_path):
    named = "--model", "tiny", "--random-init", *COMMON, "--data", rows, "--global-batch-size", 2, "--max-steps", 1
    alone(*named, "--out", tmp_path / "one")
    several(2, *named, "--out", tmp_path / "two")
    same(tmp_path / "two", tmp_path / "one")


def test_two_ranks_then_one_then_four_are_one_run(rows, reference, tmp_path):
    """Stopped twice by a signal to one rank, and resumed on another number of ranks: one curve of the same rows."""
    out = tmp_path / "out"
    codes, said = patched(
        2, "if RANK == 1: before(step.Steps, 'compute_gradients', 2, term)", *flags(rows, out, *SAVES)
    )
    assert codes == [143, 143] and "stopped by a signal to another rank" in said and steps_of(out) == [1, 2], said
    codes, said = patched(1, "before(step.Steps, 'compute_gradients', 3, term)", *flags(rows, out, *SAVES))
    assert codes == [143] and "going on after step 2" in said and steps_of(out) == [1, 2, 3, 4], said
    said = several(4, *flags(rows, out, *SAVES))
    assert "going on after step 4" in said
    same(out, reference)


def test_an_adapter_of_two_ranks_then_of_one_is_one_run(rows, tmp_path):
    """Frozen weights are sharded and not saved; factors of odd ranks and a head that is trained whole, too."""
    base = tmp_path / "base"
    base.mkdir()
    write_model(base, tied=False)
    lora = (
        "--adapter", "lora", "--lora-r", 3, "--lora-targets", "q_proj", "v_proj", "down_proj",
        "--lora-rank-pattern", "down_proj=5", "--lora-save", "lm_head", "--lr", "1e-2", "--model", base,
    )  # fmt: skip
    args = (*flags(rows, tmp_path / "out", *SAVES)[2:], *lora)
    alone(*flags(rows, tmp_path / "one", *SAVES)[2:], *lora)
    codes, said = patched(2, "if RANK == 1: before(step.Steps, 'compute_gradients', 4, term)", *args)
    assert codes == [143, 143] and steps_of(tmp_path / "out") == [1, 2, 3, 4], said
    codes, said = patched(1, "", *args)
    assert codes == [0] and "going on after step 4" in said, said
    same(tmp_path / "out", tmp_path / "one")
    several(2, *flags(rows, tmp_path / "two", *SAVES)[2:], *lora)
    same(tmp_path / "two", tmp_path / "one")


def test_two_ranks_beside_weights_in_4_bits_are_one_run(rows, tmp_path):
    """Each rank holds all of the frozen weights."""
    base = tmp_path / "base"
    base.mkdir()
    write_model(base, tied=False)
    qlora = ("--adapter", "qlora", "--lora-r", 3, "--lr", "1e-2", "--model", base)
    alone(*flags(rows, tmp_path / "one", *SAVES)[2:], *qlora)
    several(2, *flags(rows, tmp_path / "two", *SAVES)[2:], *qlora)
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    "where",
    [
        "before(Transformer, 'loss', 6, die)",  # in step 4, when the state of step 2 is whole
        "before(evaluation, 'evaluate', 3, die)",  # after step 4; the other one is in the evaluation
        "before(saver, 'write_safetensors', 3, die)",  # in the writing of its shard
    ],
)
def test_a_rank_that_is_killed_ends_the_run_which_resumes(rows, reference, tmp_path, where):
    """No torchrun ends rank 0 here: it must see for itself that rank 1 is gone."""
    out = tmp_path / "out"
    codes, said = patched(2, f"if RANK == 1: {where}", *flags(rows, out, *SAVES))
    assert codes == [1, -signal.SIGKILL] and "another rank ended" in said, said
    assert "going on after step" in several(2, *flags(rows, out, *SAVES))
    same(out, reference)
    assert not list(out.glob(".tmp-*"))


def test_a_restart_by_torchrun_resumes_by_itself(rows, reference, tmp_path):
    out = tmp_path / "out"
    once = "mark = Path(sys.argv[sys.argv.index('--out') + 1]).parent / 'died'\n"
    once += (
        "if RANK == 1 and not mark.exists(): before(step.Steps, 'compute_gradients', 4, lambda: (mark.touch(), die()))"
    )
    process = start_driven(tmp_path, 2, once, *flags(rows, out, *SAVES), more=("--max-restarts", "1"))
    said = "".join(process.communicate(timeout=240))
    assert process.returncode == 0 and "going on after step" in said, said
    same(out, reference)


def test_a_rank_that_hangs_is_named_and_ends_the_run(rows, tmp_path):
    """A frozen process takes no signal but SIGKILL, which it gets here once rank 0, who told, has ended.

    Rank 0's clock goes on by 10 minutes a second after the other has begun to freeze. A rank 0 that has not looked at
    the last report by then takes it for news, and waits for real.
    """
    out, mark = tmp_path / "out", tmp_path / "frozen"
    patch = f"""
mark, clock = Path({str(mark)!r}), time.monotonic
def freeze_with_a_mark():
    if os.fork():
        freeze()
    time.sleep(1)
    mark.touch()
    os._exit(0)
if RANK == 1: before(step.Steps, 'compute_gradients', 4, freeze_with_a_mark)
distributed.BEATS, distributed.time = 100, type(sys)("a clock")
distributed.time.sleep, distributed.time.monotonic = time.sleep, lambda: clock() + 600 * mark.exists()
"""
    args = flags(rows, out, *SAVES, "--rank-timeout", 30)
    first, frozen = start_ranks(2, *args, code=DRIVER + BEFORE_CALL + patch + RUN)
    try:
        said = "".join(first.communicate(240))
    finally:
        frozen.kill()
    assert first.returncode == 1, said
    told = re.search(r"rank 1 has not been heard of for (\d+) s, last at (step|the [a-z]+)", said)
    assert told and int(told[1]) >= 30, said
    assert frozen.communicate(240) and frozen.returncode == -signal.SIGKILL
    names = {path.name for path in out.iterdir()}
    assert names & {"checkpoint-2", "checkpoint-3"}, "the third was being written when its writer froze"


def test_sigterm_to_torchrun_saves_once_and_resumes(rows, reference, tmp_path):
    out = tmp_path / "out"
    slow = """
from engine.base.signals import Signals
real_handle, signalled = Signals.handle, []
def handle(self, *args):
    signalled.append(args)
    real_handle(self, *args)
Signals.handle = handle
def wait_for_signal():
    while not signalled:
        time.sleep(0.01)
before(step.Steps, 'compute_gradients', 3, wait_for_signal)
"""
    process = start_driven(tmp_path, 2, slow, *flags(rows, out, *SAVES[:4]))
    end = time.monotonic() + 240
    while not (out / "metrics.jsonl").exists() or '"step": 2' not in (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    said = "".join(process.communicate(timeout=240))
    assert process.returncode != 0 and "stopped by SIGTERM after step" in said, said
    assert len(list(out.glob("checkpoint-*"))) == 1
    assert "going on after step" in several(2, *flags(rows, out, *SAVES[:4]))
    same(out, reference)


def test_out_of_memory_on_one_rank_ends_the_run_and_the_restart_halves(rows, reference, tmp_path):
    """The others wait in the step: it cannot be taken again with smaller micro-batches without them."""
    small = """
real = Transformer.loss
def loss(model, batch, *seed):
    if RANK == 1 and len(batch.tokens) > 64 and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no more.")
    return real(model, batch, *seed)
Transformer.loss = loss
"""
    out = tmp_path / "out"
    more = (*SAVES[:4], "--micro-batch-tokens", 128)
    codes, said = patched(2, small, *flags(rows, out, *more))
    assert codes == [1, 1], said
    assert said.count("out of memory with micro-batches of 128 tokens") == 1 and "goes on with 64" in said, said
    codes, said = patched(2, small, *flags(rows, out, *more))
    assert codes == [0, 0] and "micro-batches of 64 tokens: those of 128 ran out of memory" in said, said
    same(out, reference)
    assert not (out / "halved.json").exists()


def test_a_spike_is_undone_by_all_ranks(rows, tmp_path):
    """A loss that one rank tells as higher than it is: both go back to the same state, as one process does."""
    spiky = """
from engine.training import loss_spikes as spikes
spikes.LEAST, real_pass = 3, step.Steps.compute_gradients
def spiky(self, n, lr):
    batch, loss = real_pass(self, n, lr)
    return batch, loss + 9 if n == 5 and RANK == self.world.size - 1 else loss
step.Steps.compute_gradients = spiky
"""
    more = (*SAVES[:4], "--save-every", 3, "--spike-rollback")
    for n in (1, 2):
        codes, said = patched(n, spiky, *flags(rows, tmp_path / f"out{n}", *more))
        assert codes == [0] * n and "back to the state of step 3, the rows of 2 steps are left out" in said, said
    same(tmp_path / "out2", tmp_path / "out1")


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_failure_of_one_rank_is_told_once_by_that_rank(rows, tmp_path):
    patch = "if RANK == 1: sys.argv[sys.argv.index('--data') + 1] = 'nowhere.json'"
    codes, said = patched(2, patch, *flags(rows, tmp_path / "out"))
    assert codes == [3, 3] and said.count("error: ") == 1 and "nowhere.json" in said, said
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_dry_run_of_ranks_is_of_as_many_cards(rows, tmp_path):
    args = flags(rows, tmp_path / "out", "--dry-run")
    said = several(2, "--random-init", *(arg if arg != small_model() else "tiny" for arg in args))  # a named model
    assert "on each of 2 H100, sharded over 2" in said and "reduce-scatter" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_fails_before_the_others_read(rows, tmp_path, rank):
    patch = f"def no(*_): raise prepare.UsageError('nothing here')\nif RANK == {rank}: prepare.choose_device = no"
    codes, said = patched(2, patch, *flags(rows, tmp_path / "out"))
    assert codes == [2, 2] and said.count("error: ") == 1 and "error: nothing here" in said, said


def test_other_data_on_one_rank_is_refused(rows, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(rows.read_text())[:-1]))
    patch = f"if RANK == 1: sys.argv[sys.argv.index('--data') + 1] = {str(other)!r}"
    codes, said = patched(2, patch, *flags(rows, tmp_path / "out"))
    assert codes == [3, 3] and said.count("rank 1 has other data than rank 0") == 1, said


@pytest.mark.parametrize(
    "more, told",
    [
        ({"optimizer_in_backward": True, "grad_clip": 0}, "--optimizer-in-backward with 2 ranks"),
        ({"global_batch_size": 3}, "--global-batch-size 3 is under the 4 ranks"),
        (
            {"optimizer_states": "8bit", "replicas": 1},
            "on 4 shards would cut a block of 256 elements; wanted one of 1",
        ),
        ({"replicas": 3}, "--replicas 3 of 4 ranks; wanted one of 1, 2, 4"),
    ],
)
def test_what_ranks_cannot_do_is_told(more, told):
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), out="y", **more)
    shape = dataclasses.replace(MODELS["tiny"], dim=96, vocab_size=1002)
    with pytest.raises(UsageError, match=re.escape(told)):
        check_ranks(config, shape, SimpleNamespace(size=int(re.findall(r"(\d) (?:ranks|shards)", told)[0])))
    if config.replicas in (None, 1):
        check_ranks(config, shape, SimpleNamespace(size=1))


def test_a_loss_that_is_no_number_on_one_rank_updates_none(rows, tmp_path):
    """Every rank sees it, no rank updates, and the run ends with the rows of the step."""
    patch = """
if RANK == 1:
    real = Transformer.loss
    Transformer.loss = lambda self, batch, *seed: real(self, batch, *seed) * float("nan")
"""
    out = tmp_path / "out"
    codes, said = patched(2, patch, *flags(rows, out, "--max-skips", 1))
    assert codes == [4, 4] and said.count("2 steps in a row had no finite loss") == 1, said
    skipped = [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"skip"' in line]
    assert len(skipped) == 2 and "rows.json:" in skipped[0]


def test_a_base_that_is_not_finite_is_told_once(rows, tmp_path):
    """Of two ranks both may hold rows of the tensor; one tells, all exit with 3."""
    model = tmp_path / "model"
    shutil.copytree(small_model(), model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][-1, -1] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    _, _, *args = flags(rows, tmp_path / "out")
    codes, said = patched(2, "", "--model", model, *args)
    assert codes == [3, 3] and said.count("model.layers.0.mlp.down_proj.weight holds NaN or an infinity") == 1, said


def test_ranks_that_end_without_a_finite_loss_save_what_was_before(rows, tmp_path):
    patch = """
real = Transformer.loss
calls = []
def loss(self, batch, *seed):
    calls.append(1)
    return real(self, batch, *seed) * (float("nan") if len(calls) > 2 and RANK == 1 else 1)
Transformer.loss = loss
"""
    out = tmp_path / "out"
    codes, said = patched(2, patch, *flags(rows, out, "--max-skips", 99))
    assert codes == [4, 4] and said.count("had no finite loss or gradient, so no model is written") == 1, said
    assert len(list(out.glob("checkpoint-*"))) >= 1 and not (out / "model.safetensors").exists()
