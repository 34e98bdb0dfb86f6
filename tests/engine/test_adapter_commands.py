"""The commands with an adapter: generate, chat, evaluate, export and serve answer as the merged model does."""

import io
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine import chat, evaluate, export, finetune, generate
from engine.base.errors import UsageError, run_main
from engine.formats.find import explain_no_model
from engine.serve import ServeConfig, load_services, name_models
from engine.serving.models import load_model
from tests.helpers.adapters import write_adapter
from tests.helpers.run import worst
from tests.helpers.small_model import small_model

TOKENS = torch.arange(30) * 97 % 3000
CPU = torch.device("cpu"), torch.float32


def run(main, *args, code=0):
    assert run_main(main, [str(a) for a in args]) == code


@torch.no_grad()
def logits_of(name, **more):
    model, *_ = load_model(str(name), *CPU, **more)
    return model.logits(model(TOKENS))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "mine")


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    """Return the folder that engine.export --merge writes of the adapter."""
    out = tmp_path_factory.mktemp("merged") / "merged"
    run(export.main, "--model", small_model(), "--adapter-dir", adapter, "--merge", "--out", out)
    return out


def test_merged_folders_hold_the_adapters_model_in_every_layout(adapter, merged, tmp_path):
    wanted = logits_of(small_model(), adapter_dir=adapter)
    assert worst(wanted - logits_of(small_model())) > 0.1
    assert logits_of(merged).equal(wanted)
    assert load_file(merged / "model.safetensors").keys() == load_file(small_model() / "model.safetensors").keys()
    assert not list(merged.glob("adapter*"))
    with torch.no_grad():
        theirs = transformers.LlamaForCausalLM.from_pretrained(merged)(TOKENS[None]).logits[0]
    assert worst(theirs - wanted) < 1e-4
    for layout, out in (("meta", tmp_path / "meta"), ("gguf", tmp_path / "mine.gguf")):
        run(export.main, "--model", adapter, "--merge", "--layout", layout, "--out", out)
        assert worst(logits_of(out) - wanted) < 1e-5, layout


def test_an_adapter_is_not_exported_without_a_word(adapter, tmp_path, capsys):
    for more in (("--model", adapter), ("--model", small_model(), "--adapter-dir", adapter)):
        run(export.main, *more, "--out", tmp_path / "out", code=2)
        assert f"{adapter} is an adapter: --merge writes its base with the updates" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_text_is_the_merged_models(adapter, merged, capsys, monkeypatch):
    told = []
    asked = "--prompt", "Name a fruit.", "--max-new-tokens", 8, "--dtype", "fp32"
    for model in (("--model", merged), ("--model", small_model(), "--adapter-dir", adapter), ("--model", adapter),
                  ("--model", small_model())):  # fmt: skip
        run(generate.main, *model, *asked)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2] != told[3]
    lines = []
    for model in (("--model", merged), ("--model", small_model(), "--adapter-dir", adapter)):
        monkeypatch.setattr("sys.stdin", io.StringIO("Name a fruit.\n"))
        run(chat.main, *model, "--max-new-tokens", 8, "--dtype", "fp32", "--temperature", 0)
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] != ""


def test_an_adapter_is_measured_beside_its_base(adapter, merged, rows_file, tmp_path):
    flags = "--data", rows_file, "--dtype", "fp32", "--max-length", 64
    run(evaluate.main, "--model", small_model(), "--adapter-dir", adapter, *flags, "--out", tmp_path / "a")
    run(evaluate.main, "--model", merged, *flags, "--out", tmp_path / "b")
    base, adapted = json.loads((tmp_path / "a" / "results.json").read_text())["results"]
    alone = json.loads((tmp_path / "b" / "results.json").read_text())["results"][0]
    assert (base["model"], adapted["model"]) == (small_model().name, "mine")
    assert adapted["loss"] == alone["loss"] != base["loss"]


@pytest.mark.parametrize("main", [generate.main, chat.main, evaluate.main, export.main, finetune.main])
def test_an_empty_folder_is_not_taken_for_none(main, rows_file, tmp_path, capsys):
    """As of --adapter-dir "$UNSET" in a script."""
    needed = {
        generate.main: ("--prompt", "hi"), evaluate.main: ("--data", rows_file), export.main: ("--out", tmp_path / "o"),
        finetune.main: ("--data", rows_file, "--adapter", "lora"),
    }  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(["--model", str(small_model()), "--adapter-dir", "", *map(str, needed.get(main, ()))])
    assert end.value.code == 2 and "--adapter-dir is empty, wanted a folder" in capsys.readouterr().err


def test_a_damaged_adapter_is_not_taken_for_a_damaged_base(adapter, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run(generate.main, "--model", tmp_path / "cut", "--prompt", "hi", code=3)
    told = capsys.readouterr().err
    assert "adapter_model.safetensors: not a sound" in told and "base cannot be read" not in told


def test_a_loss_that_is_no_number_ends_the_measuring(adapter, rows_file, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "huge")
    weights = load_file(tmp_path / "huge" / "adapter_model.safetensors")
    save_file({name: t * 1e18 for name, t in weights.items()}, tmp_path / "huge" / "adapter_model.safetensors")
    flags = "--data", rows_file, "--dtype", "fp32", "--max-length", 64, "--out", tmp_path / "out"
    run(evaluate.main, "--model", tmp_path / "huge", *flags, code=4)
    assert "the loss of the rows is nan" in capsys.readouterr().err and not (tmp_path / "out" / "results.json").exists()


def test_a_state_names_the_export_that_makes_a_model_of_it(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    for settings, wanted in (({"adapter": "lora"}, "--merge --out"), ({}, "checkpoint-1 --out")):
        (tmp_path / "checkpoint-1" / "manifest.json").write_text(json.dumps({"settings": settings}))
        assert wanted in explain_no_model(tmp_path)


# ---- serve ----------------------------------------------------------------------------------------------------------


def services(**flags):
    return load_services(ServeConfig(dtype="fp32", max_length=60, **flags))


@torch.no_grad()
def logits_by_name(found):
    return {service.name: service.model.logits(service.model(TOKENS)) for service in found}


def test_one_adapter_is_served_merged_under_its_own_name(adapter, merged):
    found = logits_by_name(services(model=str(small_model()), adapter_dir=(str(adapter),)))
    assert found.keys() == {"mine"} and found["mine"].equal(logits_of(merged))


def test_several_are_served_by_name_beside_their_base(adapter, tmp_path):
    other = write_adapter(tmp_path / "other", seed=5)
    loaded = services(model=str(small_model()), adapter_dir=(str(adapter), str(other)))
    found = logits_by_name(loaded)
    assert list(found) == [small_model().name, "mine", "other"]
    for folder in (adapter, other):
        assert worst(found[folder.name] - logits_of(folder)) < 1e-4
    pointers = [{n: p.data_ptr() for n, p in s.model.named_parameters() if ".lora." not in n} for s in loaded]
    assert pointers[0] == pointers[1] == pointers[2]


def test_names_that_clash_alone_become_paths(adapter):
    assert name_models(["base", str(adapter), "/other/mine"]) == ["base", str(adapter), "/other/mine"]
    with pytest.raises(UsageError, match="base is named twice"):
        name_models(["base", "base"])


def test_a_base_and_its_adapter_are_compared(adapter):
    loaded = services(model=str(small_model()), compare_with=(str(adapter),))
    assert [service.name for service in loaded] == [small_model().name, "mine"]
    assert logits_by_name(loaded)["mine"].equal(logits_of(adapter))
