"""Models by their names, alone, with an adapter merged into them, and with several beside them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.base.errors import DataError, UsageError
from engine.formats.source import open_source
from engine.model.adapter import AdapterConfig
from engine.output.folder import RUN
from engine.serving import models
from engine.serving.models import find_tokenizer_of_state, load_adapted, load_model
from tests.helpers.adapters import write_adapter
from tests.helpers.run import worst
from tests.helpers.small_model import small_model, write_model, write_tokenizer

CPU = torch.device("cpu"), torch.float32
TOKENS = torch.arange(30) * 97 % 3000


@torch.no_grad()
def logits(model):
    return model.logits(model(TOKENS))


def edit(folder, **changes):
    raw = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(raw))


@pytest.fixture
def adapters(tmp_path):
    """Two adapters of the small model, without tokenizers, as PEFT writes them."""
    return [write_adapter(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]


def test_an_adapters_folder_stands_for_its_base_with_it(adapters):
    by_name, by_flag = load_model(str(adapters[0]), *CPU), load_model(str(small_model()), *CPU, adapter_dir=adapters[0])
    base = load_model(str(small_model()), *CPU)
    assert logits(by_name[0]).equal(logits(by_flag[0]))
    assert worst(logits(by_name[0]) - logits(base[0])) > 0.1
    assert by_name[0].adapter is None and by_name[1].encode("A word") == base[1].encode(
        "A word"
    )  # the base's tokenizer


def test_a_damaged_tokenizer_of_an_adapter_is_not_passed_over_for_the_bases(adapters):
    write_tokenizer(adapters[0])
    (adapters[0] / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_model(str(adapters[0]), *CPU)


def test_an_adapter_is_asked_in_its_own_runs_style(tmp_path):
    """The run that trained it wrote a tokenizer and run.json; the base's style counts for an adapter without them."""
    base = tmp_path / "base"
    base.mkdir()
    write_model(base)
    folder = write_adapter(tmp_path / "own", base=base)
    (base / RUN).write_text(json.dumps({"config": {"prompt_style": "alpaca"}}))
    assert load_model(str(folder), *CPU)[2] == "alpaca"
    write_tokenizer(folder)
    (folder / RUN).write_text(json.dumps({"config": {"prompt_style": "chatml"}}))
    assert load_model(str(folder), *CPU)[2] == "chatml"
    assert [style for *_, style in load_adapted(str(base), [str(folder)], *CPU)] == ["alpaca", "chatml"]


def test_several_adapters_share_the_weights_of_one_base(adapters):
    """Each model's logits are those of its merge; the weights are in memory once."""
    base, *others = load_adapted(str(small_model()), [str(folder) for folder in adapters], *CPU)
    assert logits(base[0]).equal(logits(load_model(str(small_model()), *CPU)[0]))
    kept = {name: p.data_ptr() for name, p in base[0].named_parameters()}
    for (model, tokenizer, _), folder in zip(others, adapters, strict=True):
        merged, *_ = load_model(str(folder), *CPU)
        assert worst(logits(model) - logits(merged)) < 1e-4 * worst(logits(merged))
        found = dict(model.named_parameters())
        assert {name: found[name].data_ptr() for name in kept} == kept
        assert len(found) > len(kept) and tokenizer.encode("A word") == base[1].encode("A word")
    first, second = (dict(model.named_parameters()) for model, *_ in others)
    assert not {p.data_ptr() for n, p in first.items() if n not in kept} & {p.data_ptr() for p in second.values()}


def test_weights_that_are_trained_whole_are_each_adapters_own(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_model(base, tied=False)
    config = AdapterConfig(r=2, targets=("q_proj",), saved=("lm_head",))
    folders = [str(write_adapter(tmp_path / name, seed, base, config)) for seed, name in enumerate(("a", "b"))]
    plain, *others = load_adapted(str(base), folders, *CPU)
    outputs = [model.output for model, *_ in (plain, *others)]
    assert len({p.data_ptr() for p in outputs}) == 3
    for (model, *_), folder in zip(others, folders, strict=True):
        merged = load_model(folder, *CPU)[0]
        assert worst(logits(model) - logits(merged)) < 1e-4 * worst(logits(merged))


def test_an_adapter_on_other_weights_is_told(adapters, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    write_model(other, norm_eps=1e-5)
    load_model(str(adapters[0]), *CPU)
    assert "warning" not in capsys.readouterr().err
    weights = load_file(other / "model.safetensors")
    save_file({name: t * 1.5 for name, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    load_model(str(other), *CPU, adapter_dir=str(adapters[0]))
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1 and f"{adapters[0]}: trained beside other weights than those of {other}" in told
    load_adapted(str(other), [str(folder) for folder in adapters], *CPU)
    assert capsys.readouterr().err.count("trained beside other weights") == 2


def test_a_base_that_cannot_be_read_is_told_with_what_to_do(adapters):
    edit(adapters[0], base_model_name_or_path="meta-llama/Llama-3.1-8B")
    wanted = f"{adapters[0]}: the adapter's base cannot be read (model meta-llama/Llama-3.1-8B: no such folder or file"
    with pytest.raises(DataError, match=re.escape(wanted)) as caught:
        load_model(str(adapters[0]), *CPU)
    assert "name it by --model, and this folder by --adapter-dir" in str(caught.value)
    edit(adapters[0], base_model_name_or_path=None)
    with pytest.raises(DataError, match="base_model_name_or_path is None; name the base by --model"):
        load_model(str(adapters[0]), *CPU)
    load_model(str(small_model()), *CPU, adapter_dir=str(adapters[0]))


def test_an_adapter_whose_base_is_itself_is_refused(adapters):
    edit(adapters[0], base_model_name_or_path=str(adapters[0]))
    with pytest.raises(DataError, match="cannot be read"):
        load_model(str(adapters[0]), *CPU)


def test_several_adapters_want_a_base(adapters):
    with pytest.raises(UsageError, match="several adapters want one base, and this is a state or an adapter itself"):
        load_adapted(str(adapters[0]), [str(adapters[1])] * 2, *CPU)


def test_an_adapter_of_another_shape_is_refused(adapters, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_model(other, hidden_dim=112)
    with pytest.raises(DataError, match=r"is it of another base or rank\?"):
        load_model(str(other), *CPU, adapter_dir=str(adapters[0]))
    assert open_source(other).config.hidden_dim == 112


def test_every_model_runs_the_kernels_that_are_asked_for(adapters):
    for impl in ("ref", "native"):
        loaded = load_adapted(str(small_model()), adapters, *CPU, impl)
        assert [model.impl for model, *_ in loaded] == [impl] * 3
    assert load_model(str(adapters[0]), *CPU, "native")[0].impl == "native"


@pytest.mark.parametrize(
    ("of_run", "name", "asked"),
    [
        ("toks", "mine", ("mine", Path("toks"))), ("", "mine", ("mine", Path("base"))),
        (None, "mine", ("mine", Path("base"))),
        ("toks", "", ("toks", None)), ("", "", ("", Path("base"))), (None, "", None),
    ],
)  # fmt: skip
def test_a_states_tokenizer_is_compared_with_that_of_its_run(of_run, name, asked, monkeypatch):
    found = []
    monkeypatch.setattr(models, "find_tokenizer", lambda config, *which: found.append(which))
    state = SimpleNamespace(tokenizer=of_run, base=Path("base"), config="its shape",
                            checkpoint=SimpleNamespace(folder="checkpoint-9"))  # fmt: skip
    if asked is None:
        with pytest.raises(UsageError, match=r"checkpoint-9: its run has no tokenizer at hand \(no run.json beside"):
            find_tokenizer_of_state(state, name)
    else:
        find_tokenizer_of_state(state, name)
    assert found == ([] if asked is None else [asked])


def test_a_tokenizer_and_a_style_are_those_of_the_folder_that_is_asked(monkeypatch, tmp_path):
    """A name goes before them; an adapter's folder without a tokenizer leaves both to its base."""
    asked = []

    def find(config, name, path):
        asked.append((config, name, path))
        if path == tmp_path and not name:
            raise DataError("none here")
        return f"of {name or path.name}"

    monkeypatch.setattr(models, "find_tokenizer", find)
    monkeypatch.setattr(models, "read_prompt_style", lambda path: f"style of {path.name}")
    monkeypatch.setattr(models, "find_tokenizer_of_state", lambda state, name: f"of the state, or {name}")
    base = models.Source(Path("base"), "hf", "its shape", torch.float32, {}, {})
    merged = models.MergedSource(base, SimpleNamespace(path=tmp_path))
    state = object.__new__(models.TrainingState)
    monkeypatch.setattr(models.TrainingState, "prompt_style", "style of its run", raising=False)
    assert models.find_tokenizer_of(base) == ("of base", "style of base")
    assert models.find_tokenizer_of(base, "mine") == ("of mine", "style of base")
    assert models.find_tokenizer_of(merged, "mine") == ("of mine", f"style of {tmp_path.name}")
    assert models.find_tokenizer_of(merged) == ("of base", "style of base")
    assert models.find_tokenizer_of(state, "mine") == ("of the state, or mine", "style of its run")
    assert {config for config, *_ in asked} == {"its shape"}
    (tmp_path / "tokenizer_config.json").touch()
    for name in ("", "mine"):
        monkeypatch.setattr(models, "find_tokenizer", lambda *_: find("its shape", "", tmp_path))
        with pytest.raises(DataError, match="none here"):
            models.find_tokenizer_of(merged, name)
