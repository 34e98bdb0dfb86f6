"""NaN and infinity: flags and models that hold them are refused, and nothing that holds them is written."""

import hashlib
import importlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.base.errors import DataError, NotFiniteError
from engine.formats.save import save_hf, save_meta
from engine.formats.tensor_files import is_finite, write_safetensors
from tests.helpers.checkpoints import BASE, make_theirs, random_model, read_model, write_gguf, write_meta
from tests.helpers.forks import Started
from tests.helpers.run import environment, events, export, finetune, generate
from tests.helpers.small_model import small_model

BAD = (math.nan, math.inf, -math.inf)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": f"Count to {i}.", "output": "1 2 3"} for i in range(8)]))
    return path


def run(rows, *more, model=None, check=False):
    out = rows.parent / "out"
    done = finetune(
        "--model", model or small_model(), "--data", rows, "--out", out, "--device", "cpu", "--dtype", "fp32",
        *more, check=check,
    )  # fmt: skip
    return done, out


def poison(folder, name, value=math.nan, element=-1):
    """Copy the small model with one element of one tensor replaced."""
    shutil.copytree(small_model(), folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[element] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_bad_element_anywhere_shows(dtype):
    for n in (1, 7, 64, 33_001):
        sound = torch.full((n,), torch.finfo(dtype).max, dtype=dtype)  # a sum of these would overflow
        assert is_finite(sound) and is_finite(-sound)
        for value in BAD:
            for at in {0, n // 3, n - 1}:
                bad = sound.clone()
                bad[at] = value
                assert not is_finite(bad), (n, at, value)
    assert is_finite(torch.empty(0, 4)) and is_finite(torch.tensor([2**62])) and is_finite(torch.tensor(1.0))


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999", "Infinity"])
@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("finetune", "lr"), ("finetune", "grad_clip"), ("finetune", "weight-decay"), ("finetune", "adam-eps"),
        ("finetune", "spike-threshold"), ("finetune", "rank-timeout"), ("finetune", "learning_rate"),
        ("estimate", "gpu-tflops"), ("estimate", "price-per-hour"), ("generate", "temperature"),
    ],
)  # fmt: skip
def test_a_flag_that_is_not_finite_is_a_usage_error(module, flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"engine.{module}").main([f"--{flag}={value}"])
    assert stop.value.code == 2
    assert f"is {value!r}, wanted a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "flag"), [("kernels.bench", "--minutes"), ("data_gen.generate", "--temperature")])
@pytest.mark.parametrize("value", ["inf", "nan", "1e999"])
def test_other_commands_refuse_it_too(module, flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main([f"{flag}={value}"])
    assert stop.value.code == 2 and value in capsys.readouterr().err


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
def test_a_base_that_is_not_finite_is_named_by_every_command(rows, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    model = poison(tmp_path / "bad", name, value)
    for done in (
        run(rows, model=model)[0],
        export("--model", model, "--out", tmp_path / "exported", check=False),
        generate("--model", model, "--prompt", "Hi", check=False),
    ):
        assert done.returncode == 3 and f"model.safetensors: {name} holds NaN or an infinity" in done.stderr, done
    assert not list(tmp_path.glob("*/*.tmp*")) and not (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "exported").iterdir())


def test_a_tensor_of_every_format_is_named(tmp_path):
    theirs = make_theirs(BASE)
    with torch.no_grad():
        theirs.model.layers[1].self_attn.k_proj.weight[3, 5] = math.nan
    write_meta(tmp_path / "meta", theirs, BASE, 2)
    write_gguf(tmp_path / "x.gguf", theirs, BASE)
    for path, name in (("meta", "layers.1.attention.wk.weight"), ("x.gguf", "blk.1.attn_k.weight")):
        with pytest.raises(DataError, match=f"{name} holds NaN or an infinity"):
            read_model(tmp_path / path)


def test_weights_beyond_the_dtype_asked_for(tmp_path):
    model = poison(tmp_path / "large", "model.embed_tokens.weight", 1e6)
    done = export("--model", model, "--out", tmp_path / "fp16", "--dtype", "fp16", check=False)
    assert done.returncode == 3 and "has values beyond float16; choose another --dtype" in done.stderr, done.stderr
    export("--model", model, "--out", tmp_path / "bf16", "--dtype", "bf16")


def test_a_state_that_is_not_finite_is_named(rows, tmp_path):
    """A state of an earlier version may hold a NaN: neither a resume nor an export takes it."""
    _, out = run(rows, "--save-every", "1", "--epochs", 1, "--global-batch-size", 4, check=True)
    folder = out / "checkpoint-2"
    state = load_file(folder / "state.safetensors")
    name = next(name for name in state if name.startswith("param."))
    state[name].view(-1)[0] = math.nan
    save_file(state, folder / "state.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "state.safetensors").read_bytes()
    manifest["files"]["state.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = export("--model", folder, "--out", tmp_path / "exported", check=False)
    assert done.returncode == 3 and f"{name} holds NaN or an infinity; choose another checkpoint" in done.stderr
    (out / "run.json").write_text(json.dumps({"status": "stopped"}))
    done, _ = run(rows, "--save-every", "1", "--epochs", 1, "--global-batch-size", 4)
    assert done.returncode == 3 and f"{name} holds NaN or an infinity" in done.stderr, done.stderr


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [save_hf, save_meta])
def test_no_model_that_is_not_finite_is_written(tmp_path, write):
    model = random_model(BASE)
    write(tmp_path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.layers[1].wo.view(-1)[7] = math.inf
    with pytest.raises(NotFiniteError, match=r"layers\.1\..*holds NaN or an infinity as float32"):
        write(tmp_path, model)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(NotFiniteError):
        write_safetensors(tmp_path / "x", [("a", (1,), torch.float64, lambda: torch.tensor([math.nan]).double())])


@pytest.mark.parametrize("save_every", ["end", "1"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_rate_that_overflows_the_weights_ends_with_4(rows, epochs, save_every):
    """--lr 1e38 is finite and the first loss too. The update is not; of one step there is no second loss to show it."""
    done, out = run(rows, "--lr", "1e38", "--epochs", epochs, "--global-batch-size", 8, "--warmup-ratio", 0,
                    "--lr-schedule", "constant", "--save-every", save_every, "--adam-eps", "1e-30",
                    "--weight-decay", "1e3")  # fmt: skip
    assert done.returncode == 4, (done.stdout, done.stderr)
    assert not (out / "model.safetensors").exists() and not list(out.glob("checkpoint-*")), done.stderr
    assert json.loads((out / "run.json").read_text())["status"] == "failed"


# The loss of the last steps is made NaN, as an overflow in a forward would.
NAN_AFTER = """
import sys
from engine import finetune
from engine.base.errors import run_main
from engine.training import step
real = step.Steps.compute_gradients
def poisoned(self, n, lr):
    batch, loss = real(self, n, lr)
    return batch, loss * float("nan") if n > {last} else loss
step.Steps.compute_gradients = poisoned
sys.exit(run_main(finetune.main, sys.argv[1:]))
"""


@pytest.mark.parametrize("last", [0, 4])
def test_a_run_that_ends_in_steps_without_a_loss_ends_with_4_and_loses_nothing(rows, tmp_path, last):
    """Fewer steps than --max-skips allows. What was trained before them is saved, and a second start says the same."""
    out = tmp_path / "out"
    flags = ["--model", small_model(), "--data", rows, "--out", out, "--device", "cpu", "--dtype", "fp32",
             "--global-batch-size", "4", "--epochs", "3", "--max-skips", "9"]  # fmt: skip
    for again in range(2):
        process = Started(NAN_AFTER.format(last=last), *map(str, flags), env=environment())
        _, err = process.communicate(timeout=120)
        assert process.returncode == 4, err
        assert f"the last {6 - last} steps of 6 had no finite loss or gradient, so no model is written" in err
        assert not (out / "model.safetensors").exists()
        assert (out / "checkpoint-6").exists() == (last > 0) and len(events(out, "skip")) == 6 - last
        assert again or json.loads((out / "run.json").read_text())["status"] == "failed"
    if last:
        export("--model", out / "checkpoint-6", "--out", tmp_path / "exported")
