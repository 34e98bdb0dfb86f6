"""Adapters in PEFT's folders: names and keys as peft 0.21 and its readers want them, read, written, merged, refused."""

import hashlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.base.errors import DataError
from engine.formats import adapters as peft
from engine.formats.adapters import (
    CONFIG,
    MergedSource,
    check_factors,
    config_from_peft,
    config_to_peft,
    describe_other_base,
    hash_base,
    list_factors,
    open_adapter,
    read_base_name,
    save_adapter,
)
from engine.formats.save import save_hf, save_meta
from engine.formats.source import open_source
from engine.model.adapter import ALL_LINEAR, AdapterConfig, list_updates
from engine.model.llama import new_model
from tests.helpers.checkpoints import BASE, logits, make_tokens, random_model, write_gguf
from tests.helpers.run import worst

# What peft 0.21.2 writes for LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "down_proj",
# "up_proj"], rank_pattern={"down_proj": 4}, alpha_pattern={"up_proj": 3}, modules_to_save=["lm_head"]).
PEFTS = {
    "alora_invocation_tokens": None, "alpha_pattern": {"up_proj": 3}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": ["lm_head"],
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {"down_proj": 4}, "revision": None, "target_modules": ["q_proj", "down_proj", "up_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None,
    "use_dora": False, "use_qalora": False, "use_rslora": True, "velora_config": None,
}  # fmt: skip
SHAPES_OF_PEFTS = {  # of the maps in a layer, and the tensor that is none's
    "mlp.down_proj.lora_A": [4, 96], "mlp.down_proj.lora_B": [32, 4], "mlp.up_proj.lora_A": [8, 32],
    "mlp.up_proj.lora_B": [96, 8], "self_attn.q_proj.lora_A": [8, 32], "self_attn.q_proj.lora_B": [32, 8],
}  # fmt: skip
PEFTS_TENSORS = {
    **{f"base_model.model.model.layers.{i}.{k}.weight": shape for i in (0, 1) for k, shape in SHAPES_OF_PEFTS.items()},
    "base_model.model.lm_head.weight": [64, 32],
}
SCALES = {"q_proj": 16 / 8**0.5, "up_proj": 3 / 8**0.5, "down_proj": 16 / 4**0.5}


def write_pefts(folder, change=lambda raw, tensors: None, dtype=torch.float32):
    """Write an adapter as PEFT does, after change(its keys, its tensors), and return its tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in PEFTS_TENSORS.items()}
    tensors, raw = {name: t.to(dtype) for name, t in tensors.items()}, json.loads(json.dumps(PEFTS))
    change(raw, tensors)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return tensors


def adapted(adapter, dtype=torch.float32, config=BASE):
    """Return random_model() with an adapter whose factors, B too, are far from 0."""
    model, base = new_model(config, "cpu", dtype, adapter=adapter), dict(random_model(config, dtype).named_parameters())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(base[name] if name in base else 0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def base(tmp_path):
    """Write the folder of random_model(BASE) and return it opened."""
    save_hf(tmp_path / "base", random_model(BASE), bos_id=1, eos_ids=[2])
    return open_source(tmp_path / "base")


def read_beside(source, adapter, dtype=torch.float64):
    model = new_model(source.config, "cpu", dtype, adapter=adapter.config)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))  # what is not read shows
    source.read_into(model)
    adapter.read_into(model)
    return model


# ---- reading --------------------------------------------------------------------------------------------------------


def test_an_older_file_beside_the_weights_is_not_read(tmp_path):
    write_pefts(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"old")
    assert {t.file for t in open_adapter(tmp_path / "a", BASE).stored.values()} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bin"])
def test_pefts_unfused_factors_are_stacked_into_merged_weights(kind, base, tmp_path):
    """y = W x + scale B A x for each of PEFT's maps; q's, alone of wqkv, and up's, the second of w13."""
    tensors = write_pefts(tmp_path / "a", dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "bin":
        torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
        (tmp_path / "a" / "adapter_model.safetensors").unlink()
    adapter = open_adapter(tmp_path / "a", BASE)
    assert adapter.dtype == (torch.bfloat16 if kind == "bf16" else torch.float32) and adapter.base_sha256 == ""
    model = read_beside(base, adapter)
    dense = new_model(BASE, "cpu", torch.float64)
    base.read_into(dense)
    weights = dict(dense.named_parameters())
    with torch.no_grad():
        for (layer, name), first in {
            (i, n): first for i in (0, 1) for n, first in (("q_proj", 0), ("up_proj", 96), ("down_proj", 0))
        }.items():
            part = "self_attn" if name == "q_proj" else "mlp"
            a, b = (
                tensors[f"base_model.model.model.layers.{layer}.{part}.{name}.lora_{x}.weight"].double() for x in "AB"
            )
            ours = {"q_proj": "wqkv", "up_proj": "w13", "down_proj": "w2"}[name]
            weights[f"layers.{layer}.{ours}"][first : first + len(b)] += SCALES[name] * b @ a
        weights["output"].copy_(tensors["base_model.model.lm_head.weight"])
    tokens = make_tokens(BASE)
    assert worst(logits(model, tokens) - logits(dense, tokens)) < 1e-12
    merged = new_model(BASE, "cpu", torch.float64)
    MergedSource(base, adapter).read_into(merged)
    assert worst(logits(merged, tokens) - logits(dense, tokens)) < 1e-12


def test_keys_that_are_absent_are_what_peft_takes_for_them():
    """LoraConfig() of peft 0.21: r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False."""
    problems = []
    found = config_from_peft({"peft_type": "LORA", "target_modules": ["q_proj"]}, problems)
    assert found == AdapterConfig(r=8, alpha=8.0, dropout=0.0, targets=("q_proj",), rslora=False) and not problems


def test_all_linear_and_keys_that_older_versions_lack(tmp_path):
    def change(raw, tensors):
        for key in set(raw) - {"peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "modules_to_save"}:
            del raw[key]
        raw |= {"target_modules": r".*\.(q_proj|up_proj|down_proj)"}

    write_pefts(tmp_path / "a", change)
    adapter = open_adapter(tmp_path / "a", BASE)
    assert {u.scale for u in list_updates(BASE, adapter.config)} == {2.0, 4.0} and adapter.base == ""
    with pytest.raises(DataError, match="base_model_name_or_path is None; name the base by --model"):
        read_base_name(tmp_path / "a")


def edit(**keys):
    return lambda raw, tensors: raw.update(keys)


Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "DoRA": (edit(use_dora=True), "use_dora is True, which is not read: DoRA also scales the weights"),
    "biases of the base": (edit(bias="all"), "bias is all, which is not read"),
    "biases of updates": (edit(lora_bias=True), "lora_bias is True, which is not read"),
    "transposed": (edit(fan_in_fan_out=True), "fan_in_fan_out is True"),
    "another kind": (edit(peft_type="IA3"), "peft_type is 'IA3', wanted 'LORA'"),
    "no kind": (lambda raw, _: raw.pop("peft_type"), "peft_type is 'None', wanted 'LORA'"),
    "pissa": (edit(init_lora_weights="pissa_niter_4"), "its base was changed; convert it by PEFT first"),
    "a key of a newer PEFT": (edit(use_novelty=7), "use_novelty is 7, which is not read: this key is not known here"),
    "a newer PEFT's own": (edit(use_qalora=True), "use_qalora is True, which is not read"),
    "left out modules": (edit(exclude_modules=["o_proj"]), "exclude_modules is"),
    "rank a word": (edit(r="8"), "r is '8', wanted a whole number"),
    "rank 0": (edit(r=0), "rank 0, wanted a whole number from 1"),
    "pattern no object": (edit(rank_pattern=[4]), "rank_pattern is '[4]', wanted an object"),
    "a norm whole": (edit(modules_to_save=["norm"]), "norm trained whole, wanted only embed_tokens or lm_head"),
    "no such map": (edit(target_modules=["qkv_proj", "q_proj"]), "targets qkv_proj are no maps of the model"),
    "wrong rank": (edit(r=16), "lora_A.weight is (8, 32), wanted (16, 32); is it of another base or rank?"),
    "of a wider base": (
        lambda raw, tensors: tensors.update({Q_A: torch.zeros(8, 48)}),
        f"{Q_A} is (8, 48), wanted (8, 32); is it of another base or rank?",
    ),
    "a tensor less": (lambda raw, tensors: tensors.pop(Q_A), f"{Q_A} is missing"),
    "many less": (edit(target_modules=list(ALL_LINEAR)), "and 13 more are missing"),
    "a tensor more": (
        lambda raw, tensors: tensors.update({Q_A.replace("q_proj", "k_proj"): torch.zeros(8, 32)}),
        "k_proj.lora_A.weight (8, 32) is not wanted by adapter_config.json and the base",
    ),
    "DoRA's tensor": (
        lambda raw, tensors: tensors.update({Q_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}),
        "lora_magnitude_vector (32,) is not wanted",
    ),
    "whole numbers": (
        lambda raw, tensors: tensors.update({Q_A: torch.zeros(8, 32, dtype=torch.int32)}),
        "is of type torch.int32, wanted fp32, fp16 or bf16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(how, tmp_path):
    change, told = REFUSED[how]
    write_pefts(tmp_path / "a", change)
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        open_adapter(tmp_path / "a", BASE)
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: ")


def test_odd_values_of_any_key_are_data_errors(tmp_path):
    """None of them ends in a traceback: what is odd is refused, what changes nothing is read."""
    write_pefts(tmp_path / "a")
    refused = 0
    for key in PEFTS:
        for odd in (
            3,
            -1,
            1e400,
            "x",
            "(",
            [],
            [1],
            [["q_proj"]],
            [None],
            {},
            {"a": []},
            {"(": 1},
            {"q_proj": "x"},
            True,
        ):
            (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(PEFTS | {key: odd}))
            try:
                open_adapter(tmp_path / "a", BASE)
            except DataError as error:
                assert f"{tmp_path / 'a'}: " in str(error)
                refused += 1
    assert refused > 100


def test_a_file_without_tensors_is_refused(tmp_path):
    write_pefts(tmp_path / "a", lambda raw, tensors: tensors.clear())
    with pytest.raises(DataError, match="and 10 more are missing"):
        open_adapter(tmp_path / "a", BASE)


def damaged(folder, name, cut):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(cut(raw))


@pytest.mark.parametrize(
    ("name", "cut", "told"),
    [
        ("adapter_model.safetensors", lambda raw: raw[:-9], "adapter_model.safetensors: not a sound safetensors file"),
        ("adapter_model.safetensors", lambda raw: raw[:5], "truncated or corrupt"),
        ("adapter_config.json", lambda raw: raw[:-9], "adapter_config.json: not sound JSON"),
        ("adapter_config.json", lambda raw: b"[]", "holds a list, wanted an object"),
    ],
)
def test_damaged_files_are_named(name, cut, told, tmp_path):
    write_pefts(tmp_path / "a")
    damaged(tmp_path / "a", name, cut)
    with pytest.raises(DataError, match=re.escape(told)):
        open_adapter(tmp_path / "a", BASE)


def test_a_byte_order_mark_is_read_over(tmp_path):
    """Editors of Windows write one, and PEFT cannot read it."""
    write_pefts(tmp_path)
    path = tmp_path / CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert open_adapter(tmp_path, BASE).config.r == 8
    path.write_bytes(b"\xff\xfe" + path.read_text("utf-8-sig").encode("utf-16-le"))
    with pytest.raises(DataError, match=f"{CONFIG}: not sound JSON"):
        open_adapter(tmp_path, BASE)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="gone: no such folder; wanted one with adapter_config"):
        open_adapter(tmp_path / "gone", BASE)
    write_pefts(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"adapter_model.safetensors is missing"):
        open_adapter(tmp_path / "a", BASE)
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(DataError, match=r"adapter_config.json is missing") as caught:
        open_adapter(tmp_path / "a", BASE)
    assert "adapter_model.safetensors is missing" in str(caught.value)


def test_factors_that_are_not_finite_are_refused(base, tmp_path):
    write_pefts(tmp_path / "a", lambda raw, tensors: tensors[Q_A].view(-1)[5:6].fill_(float("nan")))
    adapter = open_adapter(tmp_path / "a", BASE)
    with pytest.raises(DataError, match=re.escape(f"{Q_A} holds NaN or an infinity")):
        MergedSource(base, adapter).read_into(new_model(BASE, "cpu", torch.float32))


# ---- writing --------------------------------------------------------------------------------------------------------

KEYS = {  # of adapter_config.json for AdapterConfig(r=8, alpha=16.0), all-linear
    "alpha_pattern": {}, "base_model_name_or_path": "org/base", "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": 16, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": 8, "rank_pattern": {},
    "revision": None, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip


def test_the_keys_that_are_written():
    assert config_to_peft(BASE, AdapterConfig(r=8, alpha=16.0), "org/base") == KEYS
    assert set(KEYS) <= set(PEFTS)  # PEFT warns of others
    saved = config_to_peft(BASE, AdapterConfig(r=8, alpha=16.0, layers=(1,), saved=("lm_head",)), "org/base")
    assert (saved["layers_to_transform"], saved["modules_to_save"]) == ([1], ["lm_head"])


def test_the_first_update_of_the_rank_gives_the_alpha():
    adapter = AdapterConfig(r=8, alpha=16.0, targets=("q_proj", "v_proj"), rank_pattern=(("q_proj", 4),))
    raw = config_to_peft(BASE, adapter, "b")
    assert (raw["r"], raw["lora_alpha"], raw["alpha_pattern"]) == (8, 16, {})
    rslora = config_to_peft(BASE, replace(adapter, r=16, rslora=True), "b")
    assert rslora["lora_alpha"] == 64 and set(rslora["alpha_pattern"].values()) == {32}
    every = config_to_peft(BASE, replace(adapter, targets=("q_proj",), rslora=True), "b")
    assert (every["r"], every["lora_alpha"], every["alpha_pattern"]) == (8, 32, {}), "where none has the rank"


def test_rank_stabilised_updates_are_written_as_plain_alphas():
    """llama.cpp's converter knows neither use_rslora nor patterns' order: alpha / r alone gives each scale."""
    adapter = AdapterConfig(
        r=16, alpha=8.0, rslora=True, targets=("q_proj", "up_proj", "down_proj"),
        rank_pattern=(("down_proj", 4),), alpha_pattern=(("1.mlp.up_proj", 3.0),),
    )  # fmt: skip
    raw = config_to_peft(BASE, adapter, "b")
    assert not raw["use_rslora"] and (raw["r"], raw["lora_alpha"]) == (16, 32)  # 8 / 4 is 32 / 16
    assert raw["rank_pattern"] == {f"model.layers.{i}.mlp.down_proj": 4 for i in (0, 1)}
    assert raw["alpha_pattern"] == {
        "model.layers.0.mlp.down_proj": 16, "model.layers.1.mlp.down_proj": 16, "model.layers.1.mlp.up_proj": 12,
    }  # fmt: skip
    for update in list_updates(BASE, adapter):
        rank, alpha = raw["rank_pattern"].get(update.name, 16), raw["alpha_pattern"].get(update.name, 32)
        assert (rank, alpha / rank) == (update.rank, pytest.approx(update.scale, rel=1e-12))


ADAPTERS = {
    "all": AdapterConfig(r=4, alpha=8.0),
    "k and v": AdapterConfig(r=2, alpha=2.0, targets=("k_proj", "v_proj")),
    "rank-stabilised, patterns": AdapterConfig(
        r=3, alpha=7.0, rslora=True, rank_pattern=(("up_proj", 5),), alpha_pattern=(("0.*_proj", 1.5),), layers=(0,)
    ),
    "expression, dropout": AdapterConfig(r=3, targets=r".*\.1\.mlp\..*", dropout=0.25),
    "whole": AdapterConfig(r=3, targets=("o_proj",), saved=("embed_tokens", "lm_head")),
}
adapters = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


@adapters
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_written_and_read_again_it_is_the_same_adapter(adapter, dtype, base, tmp_path):
    model = adapted(adapter, dtype)
    save_adapter(tmp_path / "a", model, "org/base", hash_base(base))
    again = open_adapter(tmp_path / "a", BASE)
    read = read_beside(base, again, dtype)
    assert all(p.equal(read.trained_parameters()[name]) for name, p in model.trained_parameters().items())
    assert again.dtype == dtype and again.base == read_base_name(tmp_path / "a") == "org/base"
    assert again.config.dropout == adapter.dropout and again.base_sha256 == hash_base(base)
    for one, two in zip(list_updates(BASE, adapter), list_updates(BASE, again.config), strict=True):
        assert replace(one, scale=0) == replace(two, scale=0) and one.scale == pytest.approx(two.scale, rel=1e-12)


def test_the_file_has_pefts_names_one_map_each(tmp_path):
    adapter = AdapterConfig(
        r=8, targets=("q_proj", "down_proj", "up_proj"), rank_pattern=(("down_proj", 4),), saved=("lm_head",)
    )
    save_adapter(tmp_path, adapted(adapter), "b")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: list(t.shape) for name, t in found.items()} == PEFTS_TENSORS
    assert list_factors(BASE, adapter).keys() == PEFTS_TENSORS.keys()


def test_a_second_write_replaces_the_first_whole(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    for adapter in (ADAPTERS["all"], ADAPTERS["whole"]):
        save_adapter(tmp_path, adapted(adapter), "b")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert open_adapter(tmp_path, BASE).config.saved == ("embed_tokens", "lm_head")


# ---- merging --------------------------------------------------------------------------------------------------------


@adapters
def test_merged_logits_are_the_adapters(adapter, base, tmp_path):
    model = adapted(adapter)
    save_adapter(tmp_path / "a", model, "org/base")
    opened, tokens = open_adapter(tmp_path / "a", BASE), make_tokens(BASE)
    wanted = logits(model, tokens)
    merged = new_model(BASE, "cpu", torch.float32)
    MergedSource(base, opened).read_into(merged)
    assert worst(logits(merged, tokens) - wanted) < 2e-5 * worst(wanted)
    plain = random_model(BASE)
    assert worst(logits(plain, tokens) - wanted) > 1e-2 * worst(wanted)


@pytest.mark.parametrize("of_factors", [torch.bfloat16, torch.float32], ids=str)
def test_merged_weights_are_rounded_once(of_factors, tmp_path):
    """In bf16: the product is added in fp32, so each weight is the nearest number to W + scale B A."""
    save_hf(tmp_path / "base", random_model(BASE, torch.bfloat16), bos_id=1, eos_ids=[2])
    save_adapter(tmp_path / "a", adapted(ADAPTERS["all"], of_factors), "b")
    source = open_source(tmp_path / "base")
    merged, exact = (new_model(BASE, "cpu", dtype) for dtype in (torch.bfloat16, torch.float64))
    for target in (merged, exact):
        MergedSource(source, open_adapter(tmp_path / "a", BASE)).read_into(target)
    for (name, ours), truth in zip(merged.named_parameters(), exact.parameters(), strict=True):
        differs = (ours != truth.bfloat16()).float().mean()
        assert differs < 1e-3, name  # but for ties within fp32's own rounding


# ---- the base -------------------------------------------------------------------------------------------------------


def test_a_base_is_known_by_its_weights_in_every_layout(base, tmp_path):
    model = random_model(BASE)
    save_meta(tmp_path / "meta", model)
    save_hf(tmp_path / "sharded", model, max_shard_bytes=4000, bos_id=1, eos_ids=[2])
    assert len({hash_base(open_source(tmp_path / name)) for name in ("meta", "sharded")} | {hash_base(base)}) == 1


def test_the_base_of_a_gguf_has_the_same_hash(base, tmp_path):
    from tests.helpers.checkpoints import make_theirs

    theirs = make_theirs(BASE)
    theirs.save_pretrained(tmp_path / "theirs")
    write_gguf(tmp_path / "theirs.gguf", theirs, BASE)
    found = [hash_base(open_source(tmp_path / name)) for name in ("theirs", "theirs.gguf")]
    assert found[0] == found[1] != hash_base(base)


@pytest.mark.parametrize("layer", range(2))
@pytest.mark.parametrize("weight, row", [("wqkv", 0), ("wqkv", 51), ("wo", 2), ("w13", 1), ("w2", 0)])
def test_another_base_of_the_same_shape_is_told(layer, weight, row, base, tmp_path):
    other = random_model(BASE)
    with torch.no_grad():
        getattr(other.layers[layer], weight)[row, 3] += 0.5  # wv begins at row 48
    save_hf(tmp_path / "other", other, bos_id=1, eos_ids=[2])
    save_adapter(tmp_path / "a", adapted(ADAPTERS["all"]), "org/base", hash_base(base))
    adapter = open_adapter(tmp_path / "a", BASE)
    assert describe_other_base(adapter, base) is None
    told = describe_other_base(adapter, open_source(tmp_path / "other"))
    assert told and f"{tmp_path / 'a'}: trained beside other weights than those of {tmp_path / 'other'}" in told
    assert "org/base, unchanged, in another type of numbers" in told
    write_pefts(tmp_path / "pefts")  # tells nothing of its base
    assert describe_other_base(open_adapter(tmp_path / "pefts", BASE), open_source(tmp_path / "other")) is None


@pytest.mark.parametrize("n_layers", [3, 4, 7])
def test_first_middle_and_last_layer_tell_a_base(n_layers, tmp_path):
    config, found = replace(BASE, n_layers=n_layers), set()
    for layer in (None, 0, n_layers // 2, n_layers - 1):
        model = random_model(config)
        if layer is not None:
            model.layers[layer].wo.data[1, 3] += 0.5
        save_hf(tmp_path / f"{layer}", model, bos_id=1, eos_ids=[2])
        found.add(hash_base(open_source(tmp_path / f"{layer}")))
    assert len(found) == 4


@pytest.mark.parametrize("n, more", [(3, False), (4, True)])
def test_tensors_that_are_missing_or_wrong_are_named_as_far_as_they_are_few(n, more):
    adapter = AdapterConfig(targets=("q_proj",), layers=(0, 1))
    wanted = list_factors(BASE, adapter)
    names, problems = list(wanted), []
    assert len(names) == 4
    check_factors(BASE, adapter, dict.fromkeys(names[n:], SimpleNamespace(shape=None, file="f")), problems)
    assert problems[:3] == [f"{name} is missing" for name in names[:3]]
    assert [text for text in problems if "more are" in text] == (["and 1 more are missing"] if more else [])
    problems = []
    odd = {f"odd {i}": SimpleNamespace(shape=(1,), file="f") for i in range(n)}
    check_factors(BASE, AdapterConfig(targets=("q_proj",), layers=()), odd, problems)
    assert problems[:3] == [f"f: odd {i} (1,) is not wanted by {CONFIG} and the base" for i in range(3)]
    assert problems[3:] == (["and 1 more tensors that do not fit"] if more else [])


def test_an_adapter_of_another_shape_is_told_in_a_few_lines(tmp_path):
    """Every tensor is of another width; three are named."""
    write_pefts(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | {"base_model_name_or_path": "org/base"}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DataError) as told:
        open_adapter(tmp_path / "a", replace(BASE, dim=2 * BASE.dim, head_dim=BASE.head_dim))
    text = str(told.value)
    assert "more tensors that do not fit" in text and len(text.splitlines()) < 9
    assert text.startswith(f"{tmp_path / 'a'}: an adapter of org/base: ")


def test_a_training_state_is_no_adapters_folder(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="a training state, which knows its base; give it as --model"):
        open_adapter(tmp_path, BASE)


@pytest.mark.parametrize("alpha", [None, 1e300, 0])
def test_an_alpha_that_is_none_or_beyond_all_is_refused(alpha, tmp_path):
    write_pefts(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | {"lora_alpha": alpha}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"{CONFIG}: (lora_)?alpha"):
        open_adapter(tmp_path / "a", BASE)


def test_who_watches_a_merge_sees_both_of_its_halves(monkeypatch):
    seen = []
    monkeypatch.setattr(peft, "merge_factors", lambda model, config, factors, watch: seen.append((factors, watch)))
    base = SimpleNamespace(config="shape", read_into=lambda model, watch: seen.append(watch))
    adapter = SimpleNamespace(config="updates", read_factors=lambda shape: f"factors of {shape}")
    peft.MergedSource(base, adapter).read_into("a model", watch="a watch")
    assert seen == ["a watch", ("factors of shape", "a watch")]


@pytest.mark.parametrize(("value", "layers"), [(None, None), (1, (1,)), ([0, 2], (0, 2)), ([], ())])
def test_the_layers_of_an_adapter_may_be_one(value, layers):
    problems = []
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": value}
    assert peft.config_from_peft(raw, problems).layers == layers and problems == []


def test_a_base_of_narrow_heads_is_known_in_every_layout(tmp_path):
    """Of heads of 4 numbers, two rows of pairs each, no row of another head is taken for one of the first."""
    model = random_model(replace(BASE, n_heads=8, n_kv_heads=4, head_dim=4))
    save_hf(tmp_path / "hf", model)
    save_meta(tmp_path / "meta", model)
    assert len({hash_base(open_source(tmp_path / name)) for name in ("hf", "meta")}) == 1


def test_factors_of_several_types_are_read_in_the_widest(base, tmp_path):
    def widen(raw, tensors):
        for name in [*tensors][1::2]:
            tensors[name] = tensors[name].double() / 3

    config = open_source(base.path).config
    write_pefts(tmp_path / "a", widen)
    opened = peft.open_adapter(tmp_path / "a", config)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert opened.dtype == torch.float64 and {t.dtype for t in opened.read_factors(config).values()} == {torch.float64}
    found = torch.cat([t.flatten() for t in opened.read_factors(config).values()]).sort().values
    assert torch.equal(found, torch.cat([t.double().flatten() for t in stored.values()]).sort().values)


def test_where_no_update_has_the_rank_the_first_gives_the_alpha():
    adapter = AdapterConfig(
        r=8, alpha=16.0, targets=("q_proj", "v_proj"), rank_pattern=(("q_proj", 4), ("v_proj", 2)), rslora=True
    )
    raw = config_to_peft(BASE, adapter, "b")
    assert raw["lora_alpha"] == 32 and set(raw["rank_pattern"].values()) == {4, 2}
    alpha = pytest.approx(16 * 2**0.5)
    assert raw["alpha_pattern"] == {f"model.layers.{i}.self_attn.v_proj": alpha for i in (0, 1)}
    assert config_to_peft(BASE, AdapterConfig(alpha=5.0, layers=(), saved=("lm_head",)), "b")["lora_alpha"] == 5.0


def test_an_adapter_beside_a_training_state_is_read(tmp_path):
    write_pefts(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert open_adapter(tmp_path, BASE).config.r == 8


def test_four_rows_of_each_matrix_tell_a_base_and_no_more_than_half_a_head(tmp_path):
    """In every layout: those are the rows of q and k that stand first both in halves and in pairs."""
    config = replace(BASE, n_layers=1, head_dim=4, n_heads=4, n_kv_heads=2)
    model = random_model(config)
    save_hf(tmp_path / "hf", model, bos_id=1, eos_ids=[2])
    digest = hashlib.sha256()
    state = load_file(tmp_path / "hf" / "model.safetensors")
    for path in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        digest.update(state[f"model.layers.0.{path}_proj.weight"][:2].numpy().tobytes())
    assert hash_base(open_source(tmp_path / "hf")) == digest.hexdigest()
