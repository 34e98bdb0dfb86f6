"""Files and folders that are not the model they seem to be: one line says what they are and what to do."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.base.errors import DataError
from engine.formats.save import save_hf
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.checkpoints import (
    BASE,
    META,
    assert_refused,
    make_theirs,
    random_model,
    rewrite_safetensors,
    write_gguf,
    write_meta,
)
from tests.helpers.run import finetune

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d7a" * 16 + "\nsize 4976698672\n"


def assert_one_line(path, *words):
    assert assert_refused(path, *words).count("\n") == 0


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path / "model", random_model(BASE), max_shard_bytes=40_000, bos_id=1, eos_ids=(2,))
    return tmp_path / "model"


def test_git_lfs_pointers_in_place_of_weights(folder, tmp_path):
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].write_text(POINTER)
    assert_one_line(folder, f"{shards[0].name} is a git-lfs pointer, not the file itself; run git lfs pull")
    for shard in shards:
        shard.write_text(POINTER)
    assert_one_line(folder, f"{shards[0].name} (and {len(shards) - 1} more) is a git-lfs pointer")
    save_hf(tmp_path / "one", random_model(BASE))
    (tmp_path / "one" / "model.safetensors").write_text(POINTER)
    assert_one_line(tmp_path / "one", "model.safetensors is a git-lfs pointer")
    write_meta(tmp_path / "meta", make_theirs(META), META, 2)
    for path in (tmp_path / "meta").glob("*.pth"):
        path.write_text(POINTER)
    assert_one_line(tmp_path / "meta", "consolidated.00.pth (and 1 more) is a git-lfs pointer")
    (tmp_path / "m.gguf").write_text(POINTER)
    assert_one_line(tmp_path / "m.gguf", "m.gguf is a git-lfs pointer")


def test_a_web_page_in_place_of_weights(folder):
    for path in folder.glob("*.safetensors"):
        path.write_text("\n<!DOCTYPE html>\n<html><body>Access to this model is restricted</body></html>")
    assert_one_line(folder, "is a web page, not the file itself; download the file")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_git_lfs_pointer_in_place_of_a_tokenizer(name, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(DataError, match=f"{name}: a git-lfs pointer, not the file itself; run git lfs pull"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_alone(with_config, tmp_path, folder):
    model = tmp_path / "adapter"
    model.mkdir()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}))
    (model / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    if with_config:
        (model / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_one_line(model, "an adapter (LoRA) of meta-llama/Llama-3.1-8B, not a model; name its base by --model")


def test_shards_without_their_index(folder):
    shards = sorted(folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").unlink()
    assert_one_line(folder, f"{len(shards)} of {len(shards)} shards, but no model.safetensors.index.json; copy it")
    for shard in shards[1:]:
        shard.unlink()
    assert_one_line(folder, f"1 of {len(shards)} shards, but no model.safetensors.index.json; copy the others and it")


def test_weights_without_a_config_and_a_folder_of_gguf(folder, tmp_path):
    (folder / "config.json").unlink()
    assert_one_line(folder, "-00001-of-0000", "but no config.json; copy it from the model")
    (tmp_path / "files").mkdir()
    write_gguf(tmp_path / "files" / "m-Q8_0.gguf", make_theirs(BASE), BASE)
    assert_one_line(tmp_path / "files", "holds m-Q8_0.gguf; give that file itself")


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_split_gguf(number, tmp_path):
    """The first part has the model's settings; the others have none but the split's."""
    gguf, path = pytest.importorskip("gguf"), tmp_path / f"m-0000{number + 1}-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if number:
        del writer.kv_data[0]["general.architecture"]
    for key, value in (("split.no", number), ("split.count", 3), ("split.tensors.count", 20)):
        writer.add_uint16(key, value)
    writer.add_tensor("blk.1.ffn_up.weight", np.zeros((96, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_one_line(path, f"part {number + 1} of 3 of a split GGUF; merge all parts first: llama-gguf-split --merge")


def test_a_file_of_a_model_in_place_of_its_folder(folder):
    assert_one_line(folder / "config.json", f"a file of a model; give its folder, {folder}")
    assert_one_line(next(folder.glob("*.safetensors")), f"a file of a model; give its folder, {folder}")


def test_tensors_of_a_type_that_is_not_read_take_one_line(folder, tmp_path):
    save_hf(tmp_path / "int8", random_model(BASE))
    rewrite_safetensors(
        tmp_path / "int8" / "model.safetensors",
        lambda t: t.update({k: torch.zeros(v.shape, dtype=torch.int8) for k, v in t.items() if "proj" in k}),
    )
    assert_one_line(tmp_path / "int8", "proj.weight and 13 more is of type torch.int8, which is not read")


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 4096}, {"moe": {"num_experts": 8}}, {"yarn": {"factor": 4}}, {"use_biases": True}],
    ids=str,
)
def test_mistrals_params_that_are_not_of_llama_are_refused(changes, tmp_path):
    """Their tensors have LLaMA's names and shapes."""
    write_meta(tmp_path, make_theirs(META), META, 1, **changes)
    assert_one_line(tmp_path, f"params.json: {next(iter(changes))} is ", "which is not supported")


def test_a_gguf_that_is_an_adapter(tmp_path):
    gguf, path = pytest.importorskip("gguf"), tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_one_line(path, "a GGUF of type adapter, not a model; merge it into its base")


def test_fp8_and_other_quantised_folders_take_one_line(folder, tmp_path):
    save_hf(tmp_path / "fp8", random_model(BASE))
    path = tmp_path / "fp8" / "model.safetensors"

    def to_fp8(tensors):
        for name in [name for name in tensors if "proj" in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.ones(1)

    rewrite_safetensors(path, to_fp8)
    assert_one_line(tmp_path / "fp8", "F8_E4M3, and 27 more: quantised weights, which are not read; save the model")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    for changes, words in (
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is float8_e4m3fn; weights of this type are not read"),
        ({"dtype": "float8_e5m2"}, "dtype is float8_e5m2"),
        ({"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "float8_e4m3fn"}, "quantised by fp8 are not"),
    ):
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | changes))
        assert_one_line(tmp_path / "fp8", words)
    torch.save({k: v for k, v in load_file(path).items()}, tmp_path / "fp8" / "pytorch_model.bin")
    path.unlink()
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    assert_one_line(tmp_path / "fp8", "_proj.weight_scale, torch.float32, and 27 more: quantised weights")

    def to_gptq(tensors):
        for name in [name for name in tensors if "proj" in name]:
            del tensors[name]
            for part in ("qweight", "qzeros", "g_idx"):
                tensors[name.replace("weight", part)] = torch.zeros(4, dtype=torch.int32)

    save_hf(tmp_path / "gptq", random_model(BASE))
    rewrite_safetensors(tmp_path / "gptq" / "model.safetensors", to_gptq)
    assert_one_line(tmp_path / "gptq", "_proj.qweight, torch.int32, and 13 more: quantised weights")


def test_the_command_exits_3_with_what_to_do(folder, tmp_path):
    for path in folder.glob("*.safetensors"):
        path.write_text(POINTER)
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    done = finetune("--model", folder, "--data", tmp_path / "rows.json", "--out", tmp_path / "out", check=False)
    assert done.returncode == 3 and "git-lfs pointer" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


# ---- headers that lie -----------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_an_offset_of_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_theirs(BASE), BASE)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8 + 4
    for bit in (0, 5, 9):
        raw[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert_one_line(path, "blk.0.ffn_up.weight begins at ", "behind the tensor before it")
        raw[at + bit // 8] ^= 1 << bit % 8


def test_a_pth_that_claims_more_numbers_than_it_stores(tmp_path):
    write_meta(tmp_path, make_theirs(META), META, 1)
    tensors = torch.load(tmp_path / "consolidated.00.pth")
    tensors["output.weight"] = torch.zeros(1).expand(64, 32)
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    assert_one_line(tmp_path, "'output.weight' repeats a value to (64, 32); wanted all its numbers stored")
