"""The export command: layouts round trip to the same bytes, a training state gives those that its run would have
written, bad requests cost nothing."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from engine import export as command
from engine import finetune
from engine.base.errors import DataError, Stopped, UsageError, run_main
from engine.formats.adapters import MergedSource
from engine.formats.save import save_hf
from engine.formats.source import open_source
from engine.model.config import ModelConfig, RopeScaling
from engine.model.llama import new_model
from engine.output import checkpoint
from engine.serving.models import load_model
from engine.text.tokenizer_files import load_tokenizer
from engine.training import fine_tuning
from tests.helpers.run import ROOT, export, generate
from tests.helpers.small_model import VOCAB_SIZE, small_model
from tests.helpers.training_states import cut, flip, save_checkpoint, save_together


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_layout_holds_the_same_model(tmp_path):
    """Hugging Face -> Meta -> Hugging Face, sharded on the way: the same logits, and the same bytes again."""
    hf, again, meta, back = (tmp_path / name for name in ("hf", "again", "meta", "back"))
    export("--model", small_model(), "--out", hf, "--max-shard-bytes", 500_000)
    assert len(list(hf.glob("model-*.safetensors"))) > 1
    export("--model", hf, "--out", again, "--max-shard-bytes", 500_000)
    assert files(again) == files(hf)
    export("--model", hf, "--out", meta, "--layout", "meta")
    export("--model", meta, "--out", back, "--max-shard-bytes", 500_000)
    weights = {name: content for name, content in files(hf).items() if "safetensors" in name}
    assert {name: files(back)[name] for name in weights} == weights

    tokens = torch.arange(40) * 997 % VOCAB_SIZE
    documents = torch.tensor([[0, 40, 0, 0]], dtype=torch.int32)
    with torch.no_grad():
        ours, tokenizer, _ = load_model(str(meta), torch.device("cpu"), torch.float32)
        logits = ours.logits(ours(tokens, torch.arange(40), documents))
        theirs = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
        theirs = theirs(tokens[None]).logits[0]
        assert (logits - theirs).abs().max() < 1e-5 * theirs.abs().max()
    text = "Hello  world\n 12 <|im_end|> \U0001f999"
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    assert tokenizer.encode(text) == their_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def test_a_gguf_in_bf16_and_sharded(tmp_path):
    path = tmp_path / "model.gguf"
    export("--model", small_model(), "--out", path, "--layout", "gguf", "--gguf-type", "q8_0")
    export("--model", path, "--out", tmp_path / "bf16", "--dtype", "bf16", "--max-shard-bytes", 500_000)
    assert len(list((tmp_path / "bf16").glob("model-*.safetensors"))) > 1
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "bf16")
    assert theirs.dtype == torch.bfloat16
    ours, _, _ = load_model(str(path), torch.device("cpu"), torch.bfloat16)
    assert ours.tok_embeddings.equal(theirs.model.embed_tokens.weight)
    assert ours.layers[-1].w2.equal(theirs.model.layers[-1].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "--out is missing"),
        (("--out", "."), 2, "exists and is not empty"),
        (("--out", "new", "--layout", "metta"), 2, "did you mean meta?"),
        (("--out", "new", "--model", "/nonexistent"), 3, "no such folder or file"),
    ],
)
def test_bad_requests(args, code, message):
    done = export(*args, check=False)
    assert done.returncode == code and message in done.stderr and not (ROOT / "new").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"out": "x", "layout": "gguf"}, "a GGUF is a file whose name ends in .gguf"),
        ({"out": "x.gguf"}, "a GGUF is a file whose name ends in .gguf"),
        ({"out": "x.gguf", "layout": "meta"}, "a GGUF is a file whose name ends in .gguf"),
        ({"out": "x", "gguf_type": "f16"}, "--gguf-type is for --layout gguf"),
        ({"out": "x.gguf", "layout": "gguf", "dtype": "bf16"}, "--dtype is for folders"),
        ({"out": "x", "max_shard_bytes": 0}, "--max-shard-bytes is 0, wanted 1 or more"),
        ({"out": "x", "adapter_dir": ""}, "--adapter-dir is empty, wanted a folder"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        command.ExportConfig(**flags)


def test_what_is_there_is_never_written_over(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    for name in ("full/notes.txt", "a.gguf", "file"):
        (tmp_path / name).write_text("mine")
    for flags in (("full",), ("file",), ("a.gguf", "--layout", "gguf")):
        here("--model", small_model(), "--out", tmp_path / flags[0], *flags[1:], code=2)
        assert "exists and is not empty; choose another name" in capsys.readouterr().err
    assert files(tmp_path) == {"a.gguf": b"mine", "file": b"mine"} and files(tmp_path / "full") == {
        "notes.txt": b"mine"
    }
    here("--model", small_model(), "--out", tmp_path / "new", "--merge", code=2)
    assert f"--merge: {small_model()} is no adapter" in capsys.readouterr().err and not (tmp_path / "new").exists()


N_BYTES = {"f32": 4, "fp32": 4, "f16": 2, "fp16": 2, "bf16": 2, "q8_0": 34 / 32}


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "f32", "f16", "q8_0"])
def test_the_disk_is_asked_for_what_will_be_written(kind, tmp_path, monkeypatch):
    """Before anything is, in a folder that is made for it."""
    asked = []

    def refuse(folder, n_bytes, remedy):
        asked.append((folder, n_bytes, folder.is_dir()))
        raise UsageError("no space")

    monkeypatch.setattr(command, "require_disk_space", refuse)
    is_gguf = not kind.startswith("fp") and kind != "bf16"
    out = tmp_path / "new" / ("a.gguf" if is_gguf else "a")
    how = ("--layout", "gguf", "--gguf-type", kind) if is_gguf else ("--dtype", kind)
    here("--model", small_model(), "--out", out, *how, code=2)
    n = open_source(small_model()).config.n_parameters
    assert asked == [(out.parent if is_gguf else out, int(n * N_BYTES[kind]), True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", ["auto", "f16", "f32"])
def test_an_adapter_is_written_as_it_is_unless_it_is_said(wanted, dtype, tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(command, "save_gguf_adapter", lambda *args: written.append(args))
    factors = {"a": torch.ones(2, 3, dtype=dtype)}
    adapter = SimpleNamespace(config="its updates", read_factors=lambda shape: factors)
    source, out = MergedSource(SimpleNamespace(config="the shape"), adapter), tmp_path / "new" / "a.gguf"
    command.write_adapter(out, source, command.ExportConfig(out=str(out), layout="gguf", gguf_type=wanted))
    kept = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(dtype, "f32")
    assert written == [(out, "the shape", "its updates", factors, kept if wanted == "auto" else wanted)]
    assert out.parent.is_dir() and "an adapter of 0.00M parameters" in capsys.readouterr().out


# ---- a training state -----------------------------------------------------------------------------------------------

OF_A_RUN = {"run.json", "metrics.jsonl", "report.html", ".lock"}
SHAPE = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=VOCAB_SIZE, norm_eps=1e-5,
    rope_theta=500000.0, rope_scaling=RopeScaling(factor=32.0),
)  # fmt: skip


def here(*args, main=command.main, code=0):
    """A command in this process."""
    assert run_main(main, [str(a) for a in args]) == code


def exported(folder, out, *more):
    here("--model", folder, "--out", out, *more)
    return files(out)


@pytest.fixture
def base(tmp_path):
    """A model with all that a state must not lose: scaled RoPE, a head of its own, settings of generation."""
    model, tokenizer = new_model(SHAPE, "cpu", torch.float32), load_tokenizer(small_model())
    model.init_weights(0)
    sampled = {"do_sample": True, "temperature": 0.6}
    save_hf(tmp_path / "base", model, bos_id=1, eos_ids=(2, 0), generation_config=sampled)
    tokenizer.save(tmp_path / "base")
    return tmp_path / "base"


def begun_with(base, kind):
    if kind == "random":
        return "--model", "tiny", "--random-init"
    return "--model", base, "--tokenizer", small_model(), "--dtype", "bf16", "--master-weights", "fp32"


def of_two_writers(state, out):
    """The same state as two ranks write it."""
    out.mkdir()
    shutil.copy(state.parent / "run.json", out)
    of_layout = ("format", "step", "files")
    facts = {key: value for key, value in checkpoint.read_manifest(state).items() if key not in of_layout}
    two = save_together(out, 2, cut(load_file(state / checkpoint.STATE), 2), facts=facts)[0].folder
    assert checkpoint.read_manifest(two)["format"] == 2 and len(list(two.glob("state-*"))) == 2
    return two


@pytest.mark.parametrize("kind", ["random", "base"])
def test_a_state_gives_the_model_that_its_run_writes(kind, base, rows_file, tmp_path, monkeypatch):
    """From what the run began with while it is under way, and from what it wrote when it is done."""
    out, state = tmp_path / "out", tmp_path / "out" / "checkpoint-2"
    settings = *begun_with(base, kind), "--data", rows_file, "--out", out, "--max-steps", 2, "--save-every", 1
    settings = *settings, "--global-batch-size", 4, "--lr", "1e-2", "--warmup-ratio", 0

    def killed(*args):
        raise Stopped("before the model was written")

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "write_model", killed)
        here(*settings, main=finetune.main, code=143)
    assert state.is_dir() and not (out / "config.json").exists()
    early = exported(state, tmp_path / "early")
    two = of_two_writers(state, tmp_path / "two")
    assert exported(two, tmp_path / "early-two") == early
    first = exported(state.with_name("checkpoint-1"), tmp_path / "first")
    assert first["model.safetensors"] != early["model.safetensors"] and first["config.json"] == early["config.json"]

    here(*settings, main=finetune.main)
    theirs = {name: content for name, content in files(out).items() if name not in OF_A_RUN}
    assert early == theirs and (b"0.6" in theirs["generation_config.json"]) == (kind == "base")
    shutil.rmtree(base)
    assert exported(state, tmp_path / "late") == theirs
    meta = exported(out, tmp_path / "meta", "--layout", "meta")
    shutil.move(two, out / "checkpoint-20")
    assert "params.json" in meta
    assert exported(out / "checkpoint-20", tmp_path / "late-meta", "--layout", "meta") == meta


def broken(path, *keys, **changes):
    """A JSON file with other values in the object at keys; None removes one."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys:
        inner = inner[key]
    inner |= changes
    for key in [key for key, value in changes.items() if value is None]:
        del inner[key]
    path.write_text(json.dumps(content))


@pytest.fixture
def state(tmp_path):
    """A training state of a run that was stopped, with the least of an optimizer."""
    model = new_model(SHAPE, "cpu", torch.bfloat16)
    model.init_weights(0)
    tensors = {f"param.{name}": p.detach() for name, p in model.named_parameters()} | {"m.norm": torch.ones(32)}
    facts = {
        "settings": {"model": str(tmp_path / "base"), "random_init": False},
        "dtype": "bfloat16",
        "model": dataclasses.asdict(SHAPE),
    }
    run = {"status": "stopped", "config": {"tokenizer": str(small_model())}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    return save_checkpoint(tmp_path / "out", 40, tensors, facts, keep=1)


def manifest(*keys, **changes):
    return lambda state: broken(state / "manifest.json", *keys, **changes)


REFUSED = {
    "bit flipped": (lambda state: flip(state / checkpoint.STATE), 3, "changed since it was written"),
    "manifest missing": (lambda state: (state / "manifest.json").unlink(), 3, "its save never finished"),
    "weights missing": (lambda state: (state / checkpoint.STATE).unlink(), 3, "state.safetensors: missing"),
    "no model": (manifest(model=None), 3, "model is missing"),
    "model odd": (manifest(model=[1]), 3, "its model are no object"),
    "no settings": (manifest(settings=None), 3, "settings is missing"),
    "no base": (manifest("settings", model=None), 3, "do not name the model"),
    "dtype odd": (manifest(dtype=["int8"]), 3, "dtype is"),
    "a field less": (manifest("model", rope_theta=None), 3, "model: rope_theta is missing"),
    "a field more": (manifest("model", experts=8), 3, "model: experts is not known to this version"),
    "a field odd": (manifest("model", tied="no", norm_eps=float("nan")), 3, "2 problems"),
    "scaling odd": (manifest("model", rope_scaling={"factor": 8.0}), 3, "3 problems"),
    "heads odd": (manifest("model", n_kv_heads=3), 3, "must be a multiple of n_kv_heads"),
    "too large": (manifest("model", n_layers=10**12), 3, "but there are only"),
    "huge": (manifest("model", dim=2**60, hidden_dim=2**62), 3, "but there are only"),
    "too small": (manifest("model", n_layers=1), 3, "6 tensors do not fit this model, first param.layers.1"),
    "of another width": (manifest("model", hidden_dim=95), 3, "4 tensors do not fit this model"),
    "no run": (lambda state: (state.parent / "run.json").unlink(), 2, "no run.json beside the state"),
    "no tokenizer": (lambda state: broken(state.parent / "run.json", "config", tokenizer=""), 2, "base: got neither"),
    "tokenizer gone": (lambda state: broken(state.parent / "run.json", "config", tokenizer="/no"), 2, "/no: no such"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_state_that_gives_no_model_is_refused(how, state, tmp_path, capsys):
    damage, code, message = REFUSED[how]
    damage(state)
    here("--model", state, "--out", tmp_path / "new", code=code)
    error = capsys.readouterr().err
    assert message in error and "checkpoint-40" in error and not (tmp_path / "new").exists()
    assert (code == 2) == ("pass --tokenizer" in error)


def test_where_the_tokenizer_is_from(state, tmp_path, monkeypatch):
    """The one named, else the run's: as run.json says, though the state is called by another name, or its model is
    gone. A state that was moved away has none."""
    given = exported(state, tmp_path / "given")
    monkeypatch.chdir(state)
    assert exported(".", tmp_path / "dot") == given
    broken(state.parent / "run.json", status="done")
    assert exported(state, tmp_path / "done") == given
    shutil.move(state, tmp_path / "alone")
    here("--model", tmp_path / "alone", "--out", tmp_path / "new", code=2)
    here("--model", tmp_path / "alone", "--out", tmp_path / "new", "--tokenizer", "/no", code=3)
    assert not (tmp_path / "new").exists()
    assert exported(tmp_path / "alone", tmp_path / "named", "--tokenizer", small_model()) == given
    for path in (tmp_path / "named").glob("tokenizer*"):
        path.unlink()
    without_one = tmp_path / "named"
    assert exported(without_one, tmp_path / "again", "--tokenizer", small_model()) == given


def test_a_state_answers_as_the_model_that_is_made_of_it(state, tmp_path):
    here("--model", state, "--out", tmp_path / "made")
    told = [
        generate("--model", model, "--prompt", "Hi", "--max-new-tokens", 8, "--raw").stdout
        for model in (state, tmp_path / "made")
    ]
    assert told[0] == told[1] and told[0].strip()
    (state.parent / "run.json").unlink()
    done = generate("--model", state, "--prompt", "Hi", check=False)
    assert done.returncode == 2 and "pass --tokenizer to engine.export" in done.stderr


def test_a_model_is_asked_under_the_day_that_its_run_was_trained_with(state, tmp_path):
    """The run's tokenizer has the checkpoint's template, which asks for today's; the run itself learned a fixed day."""
    shutil.copytree(small_model(), tmp_path / "dated")
    template = "{{ strftime_now('%d %b %Y') }}{% for message in messages %} {{ message['content'] }}{% endfor %}"
    broken(tmp_path / "dated" / "tokenizer_config.json", chat_template=template)
    broken(state.parent / "run.json", "config", tokenizer=str(tmp_path / "dated"))
    manifest("settings", prompt_style="template")(state)
    here("--model", state, "--out", tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "26 Jul 2024 Hi"


def test_who_wants_a_model_is_told_how_to_make_one(state, tmp_path):
    save_checkpoint(state.parent, 100, {"a": torch.ones(1)}, {}, keep=2)
    for path, message in (
        (state, f"a training state, not a model; python -m engine.export --model {state} --out DIR"),
        (state.parent, f"no model yet; python -m engine.export --model {state.parent}/checkpoint-100 --out DIR"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            open_source(path)
    here("--model", state.parent, "--out", tmp_path / "new", code=3)
    assert not (tmp_path / "new").exists()
