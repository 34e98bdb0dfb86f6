"""What PEFT's environment is asked for, under stand-ins for its packages: what is loaded, computed and written."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.calls import Calls


class Norm(torch.nn.Module):
    """In the place of LlamaRMSNorm."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]).double()), 0.5


@pytest.fixture
def peer(load_beside_stand_in, monkeypatch):
    """The module, whose packages are stand-ins."""
    for name, more in (("peft", {}), ("transformers.models.llama.modeling_llama", {"LlamaRMSNorm": Norm})):
        stand_in = ModuleType(name)
        vars(stand_in).update(more)
        monkeypatch.setitem(sys.modules, name, stand_in)
    return load_beside_stand_in("scripts.parity.peft_peer")


class Model(torch.nn.Module):
    """Logits are each token times 0, 1 and 2, of a batch of one."""

    def forward(self, tokens):
        assert not self.training
        return SimpleNamespace(logits=torch.stack((tokens[0].float().outer(torch.arange(3.0)),)))


@pytest.mark.parametrize("adapter", ["", "dir/adapter"])
def test_logits_are_of_the_base_with_the_adapter_that_is_named(adapter, peer, tmp_path):
    loaded = []
    load = lambda folder, dtype: loaded.append((folder, dtype)) or Model()  # noqa: E731
    add = lambda model, folder, autocast_adapter_dtype: loaded.append((folder, autocast_adapter_dtype)) or model  # noqa: E731
    peer.transformers.LlamaForCausalLM = SimpleNamespace(from_pretrained=load)
    peer.peft.PeftModel = SimpleNamespace(from_pretrained=add)
    out = str(tmp_path / "logits.safetensors")
    peer.compute_logits({"base": "dir/base", "adapter": adapter, "tokens": [5, 7], "dtype": "float32", "out": out})
    assert load_file(out)["logits"].tolist() == [[0, 5, 10], [0, 7, 14]]
    assert loaded == [("dir/base", torch.float32), *([(adapter, False)] if adapter else [])]


def test_training_makes_an_adapter_before_its_steps_and_writes_it_after(peer, tmp_path, monkeypatch):
    given, saved, stepped = {}, [], []

    class Loop:
        def __init__(self, base, **how):
            given.update(how, base=base)
            self.model = SimpleNamespace(save_pretrained=lambda folder: saved.append((folder.name, len(stepped))))

        def step(self, examples, size):
            stepped.append((examples, size))
            return (2.0 - len(stepped), 1.0)

    monkeypatch.setattr(peer, "TransformersLoop", Loop)
    monkeypatch.setattr(peer, "encode_rows", lambda rows, tokenizer, longest: [(row, longest) for row in rows])
    peer.transformers.BitsAndBytesConfig = lambda **how: how
    load = lambda folder, dtype, **options: (folder, dtype, options)  # noqa: E731
    peer.transformers.LlamaForCausalLM = SimpleNamespace(from_pretrained=load)
    peer.peft.LoraConfig = lambda **how: how
    peer.peft.get_peft_model = lambda base, config: (base, config)
    (tmp_path / "rows.json").write_text(json.dumps([1, 2, 3, 4, 5]))
    job = {
        "base": "dir/base", "lora": {"r": 4}, "rows": str(tmp_path / "rows.json"), "lr": 0.1, "steps": 2, "batch": 2,
        "max_length": 9, "folder": str(tmp_path), "nf4": True,
    }  # fmt: skip
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    peer.train(job)
    assert seeds == [0] and saved == [("initial", 0), ("trained", 2)] and given["exact_norm"] is True
    assert (given["base"], given["lr"], given["total_steps"]) == ("dir/base", 0.1, 2)
    assert stepped == [([(1, 9), (2, 9)], 2), ([(3, 9), (4, 9)], 2)]
    assert json.loads((tmp_path / "curve.json").read_text()) == [[1.0, 1.0], [0.0, 1.0]]
    (folder, dtype, options), config = given["load"]("dir/base", torch.float32)
    assert (folder, dtype, config) == ("dir/base", torch.float32, {"task_type": "CAUSAL_LM", "r": 4})
    four_bits = options["quantization_config"]
    assert four_bits["load_in_4bit"] and four_bits["bnb_4bit_quant_type"] == "nf4"
    assert four_bits["bnb_4bit_use_double_quant"] and four_bits["bnb_4bit_compute_dtype"] == torch.float32
    peer.train(job | {"nf4": False})
    assert given["load"]("dir/base", torch.float32)[0] == ("dir/base", torch.float32, {})


def test_an_answer_of_transformers_is_what_follows_the_prompt(peer, tmp_path):
    asked = []

    def generate(ids, max_new_tokens, do_sample):
        asked.append((ids.tolist(), max_new_tokens, do_sample))
        return torch.cat((ids, ids[:, :1] + 10), 1)

    peer.transformers.LlamaForCausalLM = SimpleNamespace(
        from_pretrained=lambda folder, dtype: SimpleNamespace(generate=generate)
    )
    peer.answer({"base": "dir/base", "prompts": [[1, 2], [5]], "tokens": 7, "out": str(tmp_path / "a")})
    assert json.loads((tmp_path / "a").read_text()) == [[11], [15]]
    assert asked == [([[1, 2]], 7, False), ([[5]], 7, False)]


def test_each_answer_of_llama_cpp_is_a_list_of_ids(peer, tmp_path, monkeypatch):
    asked, made = [], []

    class Server:
        def __init__(self, params):
            made.append(params)

        def handle_completions(self, wanted):
            asked.append(wanted)
            return {"choices": [{"text": "a b" if wanted["prompt"] == [1, 2] else "c"}]}

    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text.split()]}

    stand_in = ModuleType("xllamacpp")
    stand_in.CommonParams, stand_in.Server = lambda: SimpleNamespace(model=SimpleNamespace()), Server
    stand_in.ggml_type = SimpleNamespace(GGML_TYPE_F32="f32")
    monkeypatch.setitem(sys.modules, "xllamacpp", stand_in)
    peer.transformers.AutoTokenizer = SimpleNamespace(from_pretrained=lambda folder: tokenizer)
    job = {"gguf": "a.gguf", "base": "dir/base", "prompts": [[1, 2], [5]], "tokens": 7, "out": str(tmp_path / "a")}
    peer.answer_by_llama_cpp(job)
    assert json.loads((tmp_path / "a").read_text()) == [[97, 98], [99]]
    assert asked == [{"prompt": ids, "max_tokens": 7, "temperature": 0.0} for ids in ([1, 2], [5])]
    assert made[0].model.path == "a.gguf" and made[0].cache_type_k == made[0].cache_type_v == "f32"


def test_fp64_reaches_the_norms_and_the_angles(peer):
    model = torch.nn.ModuleDict({"norm": Norm(), "rope": type("LlamaRotaryEmbedding", (torch.nn.Module,), {})()})
    cos, sin = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.25, 0.0]])
    peer.use_fp64(model, cos, sin)
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    want = x / (7.0 + 0.5) ** 0.5 * torch.tensor([1.0, 2.0, 3.0]).double()
    found = model["norm"].forward(x)
    assert found.dtype == torch.float64 and torch.allclose(found, want, rtol=1e-14)
    angles = model["rope"].forward(x, None)
    assert [t.dtype for t in angles] == [torch.float64] * 2
    assert angles[0].tolist() == [[[0.5, 1.0, 0.5, 1.0]]] and angles[1].tolist() == [[[0.25, 0.0, 0.25, 0.0]]]


def test_gradients_have_the_names_of_pefts_file(peer):
    names = {
        "q.lora_A.default.weight": "q.lora_A.weight", "head.modules_to_save.default.weight": "head.weight",
        "frozen.weight": None,
    }  # fmt: skip
    parameters = [(name, SimpleNamespace(requires_grad=bool(to), grad=name)) for name, to in names.items()]
    found = peer.name_gradients(SimpleNamespace(named_parameters=lambda: parameters))
    assert found == {to: name for name, to in names.items() if to}


def test_an_action_does_all_its_jobs_in_order(peer, monkeypatch, tmp_path):
    done = []
    peer.transformers.utils = SimpleNamespace(
        logging=SimpleNamespace(disable_progress_bar=lambda: done.append("quiet"))
    )
    (tmp_path / "jobs.json").write_text('[{"a": 1}, {"a": 2}]')
    monkeypatch.setitem(peer.ACTIONS, "train", done.append)
    monkeypatch.setattr(sys, "argv", ["peft_peer", "train", str(tmp_path / "jobs.json")])
    peer.main()
    assert done == ["quiet", {"a": 1}, {"a": 2}]
    assert {name: call.__name__ for name, call in peer.ACTIONS.items() if name != "train"} == {
        name: name for name in ("make_case", "compute_logits", "answer", "answer_by_llama_cpp")
    }


def test_logits_in_fp64_are_of_the_table_that_is_given(peer, tmp_path, monkeypatch):
    table = {"cos": torch.tensor([[0.5]]), "sin": torch.tensor([[0.25]])}
    save_file(table, tmp_path / "t")
    used = []
    monkeypatch.setattr(peer, "use_fp64", lambda model, cos, sin: used.append((model, cos.item(), sin.item())))
    model = Model()
    peer.transformers.LlamaForCausalLM = SimpleNamespace(from_pretrained=lambda folder, dtype: model)
    monkeypatch.setattr(Model, "__call__", lambda self, input_ids: self.forward(input_ids))
    job = {"base": "b", "adapter": "", "tokens": [5], "dtype": "float64", "out": str(tmp_path / "o")}
    peer.compute_logits(job | {"table": str(tmp_path / "t")})
    assert used == [(model, 0.5, 0.25)] and load_file(tmp_path / "o")["logits"].tolist() == [[0, 5, 10]]


def test_a_case_is_of_an_adapter_that_is_not_zero_in_fp64(peer, tmp_path, monkeypatch):
    """What PEFT begins at zero, and what is trained whole, is drawn; the base is written before, the results after."""
    calls = Calls()
    tokens = torch.tensor([0, 2, 1])
    save_file({"tokens": tokens, "cos": torch.ones(1), "sin": torch.zeros(1)}, tmp_path / "given.safetensors")
    names = ("q.lora_A.default.weight", "q.lora_B.default.weight", "head.modules_to_save.default.weight")
    parameters = {name: torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)) for name in names}

    def forward(input_ids):
        assert input_ids.tolist() == [[0, 2, 1]]
        calls.lines.append("forward")
        return SimpleNamespace(logits=(sum(parameters.values()) + 0.5)[None])

    base = calls.thing("base", save_pretrained=None)
    base.double = lambda: calls.lines.append("base.double") or base

    class Adapted:
        label = "adapted"
        __call__ = staticmethod(forward)
        named_parameters = staticmethod(parameters.items)
        double = staticmethod(calls.stand_in("adapted.double"))
        save_pretrained = staticmethod(calls.stand_in("adapted.save_pretrained"))

    adapted = Adapted()
    peer.transformers.LlamaConfig = calls.stand_in("LlamaConfig", "config")
    peer.transformers.LlamaForCausalLM = calls.stand_in("LlamaForCausalLM", base)
    peer.peft.LoraConfig = calls.stand_in("LoraConfig", "lora")
    peer.peft.get_peft_model = calls.stand_in("get_peft_model", lambda *_: adapted)
    monkeypatch.setattr(peer, "use_fp64", calls.stand_in("use_fp64"))
    monkeypatch.setattr(torch, "manual_seed", calls.stand_in("seed"))
    peer.make_case({"folder": str(tmp_path), "shape": {"a": 1}, "lora": {"r": 4}, "seed": 7})
    assert calls.text().replace(str(tmp_path), "FOLDER").split("\n") == [
        "seed(7)", "LlamaConfig(initializer_range=0.3, a=1)", "LlamaForCausalLM('config')", "base.double",
        "base.save_pretrained(PosixPath('FOLDER/base'))", "LoraConfig(task_type='CAUSAL_LM', r=4)",
        "get_peft_model(base, 'lora')", "adapted.double()", "adapted.save_pretrained(PosixPath('FOLDER/theirs'))",
        "use_fp64(adapted, float32[1], float32[1])", "forward",
    ]  # fmt: skip
    a, b, head = parameters.values()
    assert not a.any() and 0.05 < b.std() < 0.5 and 0.05 < head.std() < 0.5
    found = load_file(tmp_path / "results.safetensors")
    logits = (b + head + 0.5).detach()
    chances = torch.softmax(logits[:-1], -1)
    loss = -chances[range(2), tokens[1:]].log().mean()
    gradient = (chances - torch.nn.functional.one_hot(tokens[1:], 3)) / 2
    assert set(found) == {"q.lora_A.weight", "q.lora_B.weight", "head.weight", "loss", "logits"}
    assert torch.equal(found["logits"], logits) and torch.allclose(found["loss"], loss)
    for name in ("q.lora_A.weight", "q.lora_B.weight", "head.weight"):
        assert torch.allclose(found[name][:2], gradient) and not found[name][2].any()
