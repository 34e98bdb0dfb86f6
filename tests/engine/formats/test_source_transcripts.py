"""All that is told of models whose tensors, files and adapters are not what their settings say, to the letter."""

import json
from dataclasses import replace

import pytest
import torch

from engine.base.errors import DataError
from engine.formats.adapters import OTHER_BASES, check_factors, config_from_peft, list_factors
from engine.formats.find import detect_kind, explain_no_model, list_checkpoints
from engine.formats.names import list_pieces
from engine.formats.source import QUANTISED, add_prefixes, check_tensors, merge_ranks
from engine.formats.tensor_files import Stored
from engine.model.adapter import AdapterConfig
from engine.model.config import ModelConfig

SHAPE = ModelConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=16, vocab_size=12, max_seq_len=32)
GONE = object()


def store(shape, dtype=torch.float32, file="m.safetensors", values=0.0):
    """Return a tensor of a file, all of whose numbers are the same."""
    return Stored(file, shape, dtype, lambda: iter([(0, 0, torch.full(shape, float(values)))]))


def tell_of_tensors(kind, config, changes, unreadable=()):
    """Return in lines what is told of the tensors of a model after changes, and which are then read."""
    stored = {name: store(piece.shape) for name, piece in list_pieces(SHAPE, kind).items()}
    stored = {name: t for name, t in (stored | changes).items() if t is not GONE}
    problems, before = [], set(stored)
    check_tensors(config, kind, stored, unreadable, problems)
    lines = [f"  {problem}" for problem in problems[:5]] + [f"  and {len(problems) - 5} more"] * (len(problems) > 5)
    for name in sorted(before ^ set(stored)):
        lines.append(f"  {name} is {'added' if name in stored else 'left out'}")
    return lines or ["  sound"]


EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
TIED, DEEP = replace(SHAPE, tied=True), replace(SHAPE, n_layers=13)
TENSORS = [  # kind, shape, changes, unreadable
    ("hf", SHAPE, {}), ("hf", DEEP, {}), ("hf", replace(SHAPE, n_layers=12), {Q: GONE}, (Q,)),
    ("hf", TIED, {}), ("hf", TIED, {HEAD: store((12, 8), values=1.0)}), ("hf", TIED, {HEAD: store((8, 12))}),
    ("hf", TIED, {EMBEDDING: GONE}), ("hf", TIED, {EMBEDDING: GONE}, (EMBEDDING,)), ("hf", TIED, {HEAD: GONE}),
    ("hf", SHAPE, {EMBEDDING: GONE}), ("hf", SHAPE, {HEAD: GONE, Q: GONE}, (Q,)),
    ("hf", SHAPE, {Q: store((8, 9))}), ("hf", SHAPE, {Q: store((8, 8), torch.int8)}),
    ("hf", SHAPE, {Q: store((8, 8), "U16"), HEAD: store((12, 8), "U16"), EMBEDDING: store((12, 8), torch.int64)}),
    ("hf", SHAPE, {"model.layers.0.mlp.experts.0.w1.weight": store((2, 2)), "x.bias": store((2,)), "y": store(())}),
    ("hf", SHAPE, {"model.layers.0.self_attn.rotary_emb.inv_freq": store((2,)), "rotary_emb.inv_freq": store((2,))}),
    ("hf", SHAPE, {Q.replace("weight", "qweight"): store((8, 8), torch.int32)}),
    ("hf", SHAPE, {Q.replace("weight", "weight_scale_inv"): store((8,)), "a.absmax": store((8,))}),
    ("hf", SHAPE, {Q: store((8, 8), "F8_E4M3")}), ("hf", SHAPE, {Q: store((8, 8), torch.float8_e5m2)}),
    ("hf", replace(SHAPE, attention_bias=True), {}), ("hf", replace(SHAPE, mlp_bias=True), {}),
    ("meta", SHAPE, {"rope.freqs": store((2,))}), ("meta", TIED, {"norm.weight": store((9,), file="a.pth")}),
    ("gguf", SHAPE, {"blk.0.attn_q.weight": store((8, 8), "IQ1_S"), "output_norm.weight": GONE}),
    ("gguf", SHAPE, {"blk.0.ffn_gate_exps.weight": store((8, 8)), "blk.0.attn_q.bias": store((8,))}),
]  # fmt: skip


def test_what_is_told_of_tensors_that_the_settings_do_not_want(snapshot):
    lines = []
    for kind, config, changes, *unreadable in TENSORS:
        named = {name: "gone" if t is GONE else f"{t.shape} {t.dtype}" for name, t in changes.items()}
        lines += [f"{kind}, {config.n_layers} layers{', tied' * config.tied}: {named} {unreadable}"]
        lines += tell_of_tensors(kind, config, changes, *unreadable)
    assert "\n".join(lines) + "\n" == snapshot


@pytest.mark.parametrize("end", ["qweight", "weight_packed", "absmax", "quant_map", "weight_scale", "weight_scale_inv"])
def test_what_quantisers_store_is_known_by_its_name(end):
    assert QUANTISED.fullmatch(f"model.layers.0.mlp.up_proj.{end}") and not QUANTISED.fullmatch(end)


def test_names_without_model_get_it_where_there_are_layers_without_it():
    names = ["layers.0.a", "embed_tokens.weight", "norm.weight", "lm_head.weight", "model.x"]
    renamed = ["model.layers.0.a", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.x"]
    for n in (1, 2, 5):
        assert list(add_prefixes({name: store(()) for name in names[:n]}, [])) == renamed[:n]
    assert list(add_prefixes({name: store(()) for name in names[:2][1:]}, [])) == renamed[:2][1:]
    assert list(add_prefixes({name: store(()) for name in names[2:]}, [])) == names[2:]


# ---- Meta's ranks ---------------------------------------------------------------------------------------------------


def rank(i, changes=None):
    """Return the tensors of rank i of two of a model of dim 8, all numbers i."""
    shapes = {
        "tok_embeddings.weight": (12, 4), "norm.weight": (8,), "output.weight": (6, 8),
        "layers.0.attention.wq.weight": (4, 8), "layers.0.attention.wo.weight": (8, 4),
        "layers.0.feed_forward.w1.weight": (8, 8), "layers.0.feed_forward.w2.weight": (8, 8),
    } | (changes or {})  # fmt: skip
    return {
        name: store(shape, torch.float16 if name == "half" else torch.float32, f"consolidated.{i:02d}.pth", i)
        for name, shape in shapes.items()
        if shape
    }


RANKS = [  # dim, changes of rank 0, of rank 1, number of ranks
    (8, {}, {}), (8, {"tok_embeddings.weight": (6, 8)}, {"tok_embeddings.weight": (6, 8)}), (16, {}, {}), (4, {}, {}),
    ("8", {}, {}), (8, {"norm.weight": (9,)}, {}), (8, {"norm.weight": None, "new": (2,)}, {}),
    (8, {"output.weight": None}, {"layers.0.attention.wq.weight": (4, 9)}),
    (8, {"layers.0.attention.wo.weight": (8,)}, {"layers.0.attention.wo.weight": (8,)}),
    (16, {"layers.0.attention.wo.weight": (8, 0)}, {}),
    (8, {"layers.0.attention.wo.weight": None}, {"layers.0.attention.wo.weight": None}),
]  # fmt: skip


def test_what_the_ranks_of_a_meta_model_are_joined_to(snapshot):
    lines = []
    for dim, *changes in RANKS:
        problems = []
        found = merge_ranks([rank(i, change) for i, change in enumerate(changes)], {"dim": dim}, problems)
        lines += [f"dim {dim!r}, {changes}", *(f"  {problem}" for problem in problems)]
        for name, tensor in found.items():
            parts = [(row, column, tuple(part.shape), float(part.mean())) for row, column, part in tensor.blocks()]
            lines.append(f"  {name} {tensor.shape} of {tensor.file}: {parts}")
    assert "\n".join(lines) + "\n" == snapshot
    alone = merge_ranks([rank(0, {"layers.0.attention.wo.weight": (8, 8)})], {"dim": 8}, [])
    assert alone["tok_embeddings.weight"].shape == (12, 4) and alone["output.weight"].file == "consolidated.00.pth"


# ---- folders --------------------------------------------------------------------------------------------------------

STATE = {"manifest.json": {"settings": {"adapter": "lora"}}}
FOLDERS = [  # {name: what it holds}
    {}, {"config.json": {}}, {"params.json": {}}, {"config.json": {}, "params.json": {}}, {"adapter_config.json": {}},
    {"adapter_config.json": {"base_model_name_or_path": "org/base"}, "x.gguf": {}}, {"adapter_model.safetensors": {}},
    {"adapter_config.json": {"base_model_name_or_path": 7}}, {"adapter_model.bin": {}}, {"adapter_model.pth": {}},
    {"config.json": {}, "adapter_config.json": {}}, STATE, {"manifest.json": {"settings": {"adapter": "none"}}},
    {"manifest.json": {"settings": 7}}, {"manifest.json": {"settings": {}}}, {"state.safetensors": {}},
    {"state-00000-of-00002.safetensors": {}}, {"state-0.safetensors": {}}, {"b.gguf": {}, "a.gguf": {}},
    {"model.safetensors": {}}, {"x.pth": {}, "y.bin": {}}, {"consolidated.00.pth": {}, "params.json": {}},
    {"config.json": {}, "model-00001-of-00003.safetensors": {}, "model-00003-of-00003.safetensors": {}},
    {"config.json": {}, "model-00001-of-00002.bin": {}, "model-00002-of-00002.bin": {}},
    {"config.json": {}, "model-1-of-2.bin": {}}, {"notes.txt": {}},
    {"checkpoint-9/manifest.json": {}, "checkpoint-10/manifest.json": {"settings": {"adapter": "qlora"}}},
    {"checkpoint-x/manifest.json": {}, "checkpoint-3": {}}, {"checkpoint-3/other": {}, "config.json": {}},
]  # fmt: skip


def test_what_a_folder_is_and_why_it_is_no_model(tmp_path, snapshot):
    lines = []
    for i, files in enumerate(FOLDERS):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        steps = [step for step, _ in list_checkpoints(folder)]
        try:
            why = explain_no_model(folder)
        except DataError as error:
            why = f"error: {error}"
        lines += [json.dumps(files), f"  {detect_kind(folder)}, checkpoints {steps}", f"  {why}"]
        for path in folder.iterdir():
            if path.is_file() and len(files) == 1:
                lines.append(f"  the file: {detect_kind(path)}, {explain_no_model(path)}")
        lines = [line.replace(str(folder), "FOLDER") for line in lines]
    assert "\n".join(lines) + "\n" == snapshot


# ---- adapters -------------------------------------------------------------------------------------------------------

PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
ADAPTERS = [
    {}, {"r": None}, {"lora_alpha": None}, {"r": GONE, "lora_alpha": GONE}, {"r": 4.0}, {"lora_alpha": 3.5},
    {"lora_alpha": "16"}, {"lora_dropout": 0.25}, {"lora_dropout": None}, {"lora_dropout": "x"}, {"lora_dropout": 1.0},
    {"target_modules": GONE}, {"target_modules": "all-linear"}, {"target_modules": ".*q_proj"}, {"target_modules": 3},
    {"use_rslora": True}, {"use_rslora": None}, {"use_rslora": 1}, {"rank_pattern": {"q_proj": 4}},
    {"rank_pattern": None}, {"rank_pattern": []}, {"alpha_pattern": {"q_proj": 4.5, "k": 2}}, {"alpha_pattern": 7},
    {"layers_to_transform": 1}, {"layers_to_transform": [0, 2]}, {"layers_to_transform": None},
    {"layers_to_transform": "0"}, {"modules_to_save": ["lm_head", "embed_tokens"]}, {"modules_to_save": "lm_head"},
    {"modules_to_save": ["norm"]}, {"peft_type": "x" * 99}, {"use_dora": True}, {"bias": "none"}, {"bias": "lora_only"},
    {"lora_bias": True}, {"fan_in_fan_out": True}, {"layer_replication": [[0, 1]]}, {"trainable_token_indices": [1]},
    {"target_parameters": ["w"]}, {"exclude_modules": "x"}, {"exclude_modules": [], "layer_replication": {}},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"new_key": False}, {"new_key": 0.5},
    *({"init_lora_weights": name.upper()} for name in OTHER_BASES), {"z": 1, "a": 2, "use_dora": 1},
]  # fmt: skip


def test_what_the_keys_of_an_adapter_come_to(snapshot):
    lines = []
    for changes in ADAPTERS:
        problems = []
        raw = {key: value for key, value in (PEFT | changes).items() if value is not GONE}
        found = config_from_peft(raw, problems)
        shown = {key: "(gone)" if value is GONE else value for key, value in changes.items()}
        lines += [f"{shown}", f"  {found}", *(f"  {problem}" for problem in problems)]
    assert "\n".join(lines) + "\n" == snapshot


@pytest.mark.parametrize("key", [
    "auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type", "peft_version",
    "megatron_config", "megatron_core", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "runtime_config", "layers_pattern", "ensure_weight_tying", "arrow_config", "qalora_group_size",
])  # fmt: skip
def test_keys_that_change_nothing_are_let_pass(key):
    problems = []
    assert config_from_peft(PEFT | {key: "anything"}, problems) and problems == []


def test_the_first_three_tensors_of_an_adapter_that_do_not_fit_are_told():
    config, first = AdapterConfig(r=2), "base_model.model.model.layers.0.self_attn."
    wanted = list_factors(SHAPE, config)
    sound = {name: store(piece.shape, file="a.bin") for name, piece in wanted.items()}
    problems = []
    check_factors(SHAPE, config, {name: t for name, t in sound.items() if "self_attn.q" not in name}, problems)
    assert problems == [f"{first}q_proj.lora_A.weight is missing", f"{first}q_proj.lora_B.weight is missing"]
    for n_bad, more in ((3, []), (4, ["and 1 more tensors that do not fit"])):
        bad = {name: store((1, 2), file="a.bin") for name in list(wanted)[:n_bad]}
        problems = []
        check_factors(SHAPE, config, sound | bad, problems)
        assert (
            problems
            == [
                f"a.bin: {name} is (1, 2), wanted {wanted[name].shape}; is it of another base or rank?"
                for name in list(wanted)[:3]
            ]
            + more
        )
    for given, told in (([], 3), (["it did not open"], 0)):
        problems = list(given)
        check_factors(SHAPE, config, {}, problems)
        names = list(wanted)
        rest = [f"{name} is missing" for name in names[:told]] + [f"and {len(names) - 3} more are missing"] * (told > 0)
        assert problems == given + rest
