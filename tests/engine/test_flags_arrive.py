"""Each flag of a command that uses a model arrives at the part that obeys it: none is dropped on the way."""

import dataclasses
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import chat, evaluate, export, generate, serve
from engine.base.errors import run_main
from engine.comparing import questions, vote_file
from engine.serving import app, listen, model_service


class StandIn(SimpleNamespace):
    """An object with given attributes, which is shown by its name alone."""

    def __repr__(self):
        return f"<{self.name}>"

    def __len__(self):
        return 2


MODEL = StandIn(name="model", config=SimpleNamespace(max_positions=5000), loss=lambda batch: 1.0)
TOKENIZER = StandIn(
    name="tokenizer", warnings=("an odd file",), bos_id=1, eos_id=2, add_bos=True, stop_ids={2},
    save=lambda folder: None, encode=lambda text: [7, 8], decode=lambda ids: "said", piece=lambda id: b"abc",
    stream=lambda: SimpleNamespace(push=lambda id: "said", flush=lambda: "the end"),
)  # fmt: skip
LOADED = MODEL, TOKENIZER, "llama2"  # the style that the model was trained with
EXAMPLES = StandIn(
    name="examples", get_examples=list, loss_tokens=lambda: np.array([2, 2]), counts={"truncated": 1},
    tokens_of=lambda i: np.arange(3), is_target_of=lambda i: np.array([False, True, True]),
)  # fmt: skip
SOURCE = StandIn(
    name="source", config=StandIn(name="shape", vocab_size=9, n_parameters=1000), dtype=torch.float16,
    generation_config={"top_k": 3}, read_into=lambda model, watch: None,
)  # fmt: skip
PARTS = {  # module: {what it calls: what that answers}
    generate: {"load_model": LOADED, "encode_prompt": [1, 2], "find_stop_ids": {5}, "generate": [[1], [1], [1]]},
    chat: {"load_model": LOADED, "Chat": None, "converse": None},
    evaluate: {
        "load_model": LOADED, "read_rows": ["rows"], "resolve_data_paths": "paths", "find_stop_ids": {5},
        "encode_rows": SimpleNamespace(select=lambda: EXAMPLES), "make_micro_batches": ["batch"],
        "encode_prompt": [1, 2], "answer_prompts": [SimpleNamespace(ids=[1], reason="length")] * 3,
        "write_atomically": None,
    },
    serve: {"load_model": LOADED, "load_adapted": [LOADED] * 3},
    model_service: {"ModelService": StandIn(name="service", limits=SimpleNamespace(max_length=9))},
    questions: {"read_questions": [], "ModelContestant": StandIn(name="contestant")},
    vote_file: {"VoteFile": StandIn(name="votes")},
    app: {"Server": StandIn(name="server")},
    listen: {"listen": None},
    export: {
        "open_weights": SOURCE, "find_tokenizer_of": (TOKENIZER, "chatml"), "adopt_style": TOKENIZER,
        "require_disk_space": None, "new_model": StandIn(name="model"), "make_vocabulary": {}, "save_hf": None,
        "save_meta": None, "save_gguf": None,
    },
}  # fmt: skip
CHOICES = {  # what a machine decides, and here no machine
    "choose_device": lambda name: f"device {name}", "choose_dtype": lambda name, device: f"dtype {name} on {device}",
    "choose_kernels": lambda name, *on: f"kernels {name} of {on}", "choose_style": lambda *how: f"style of {how}",
}  # fmt: skip
MODEL_FLAGS = dict.fromkeys(("--model 77", "--device cpu", "--dtype bf16", "--kernels ref"), "load_model")
SAMPLING = ("--max-new-tokens 77", "--temperature 0.77", "--top-p 0.77", "--seed 77")
SHOWN = {"fp32": "torch.float32", "A_KEY": "the key 77", "meta": "out", "gguf": "a.gguf"}  # a value as its part sees it
ARRIVE = {  # module: ({flag: the part that is to be asked otherwise by it}, flags that are always there)
    generate: (MODEL_FLAGS | dict.fromkeys(SAMPLING, "generate") | {
        "--prompt-style chatml": "encode_prompt",
        "--prompt 77": "encode_prompt", "--input 77": "encode_prompt", "--adapter-dir 77": "load_model",
        "--raw": "generate", "--prompts {tmp}/77": "encode_prompt",
        "--batch-size 2 --prompts {tmp}/prompts": "generate",
    }, "--prompt Hi"),
    chat: (MODEL_FLAGS | dict.fromkeys(SAMPLING, "Chat") | {
        "--max-length 77": "Chat", "--system 77": "Chat", "--prompt-style chatml": "Chat",
        "--adapter-dir 77": "load_model",
    }, ""),
    evaluate: (MODEL_FLAGS | dict.fromkeys((*SAMPLING, "--batch-size 77"), "answer_prompts") | {
        "--prompt-style chatml": "encode_rows",
        "--data 77": "resolve_data_paths", "--prompts {tmp}/77": "encode_prompt", "--max-length 77": "encode_rows",
        "--micro-batch-tokens 777": "make_micro_batches", "--adapter-dir 77": "load_model",
        "--out {tmp}/new/77": "write_atomically",
    }, "--data rows --prompts {tmp}/prompts --out {tmp}"),
    serve: (MODEL_FLAGS | {
        "--prompt-style chatml": "ModelService",
        "--compare-with 77": "load_model", "--adapter-dir 77": "load_model", "--adapter-dir 77 78": "load_adapted",
        **{f"{flag} --compare-with o": "load_model" for flag in ("--device cpu", "--dtype bf16", "--kernels ref")},
        **{f"{flag} --adapter-dir a b": "load_adapted" for flag in ("--device cpu", "--dtype bf16", "--kernels ref")},
        "--votes 77 --compare-with other": "VoteFile", "--prompts 77 --compare-with other": "read_questions",
        "--host ::1": "listen", "--port 77": "listen", "--max-concurrency 77": "ModelService",
        "--max-queue 77": "ModelService", "--max-length 77": "ModelService", "--api-key-env A_KEY": "Server",
        "--max-body-bytes 77": "Server", "--timeout 7.7": "Server",
    }, ""),
    export: ({
        "--model 77": "open_weights", "--adapter-dir 77": "open_weights", "--tokenizer 77": "find_tokenizer_of",
        "--out {tmp}/new/77": "save_hf", "--dtype fp32": "new_model", "--max-shard-bytes 77": "save_hf",
        "--layout meta": "save_meta", "--layout gguf --out {tmp}/a.gguf": "save_gguf",
        "--layout gguf --out {tmp}/a.gguf --gguf-type q8_0": "save_gguf",
    }, "--model some --out {tmp}/out"),
}  # fmt: skip
NOT_HERE = {"debug", "merge"}  # run_main reads the first among the words, test_export.py tells of the second
CONFIGS = {
    generate: generate.GenerateConfig, chat: chat.ChatConfig, evaluate: evaluate.EvaluateConfig,
    serve: serve.ServeConfig, export: export.ExportConfig,
}  # fmt: skip


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Return a function that runs a command and tells what each of its parts was asked, as text."""
    monkeypatch.setenv("A_KEY", "the key 77")
    for name in ("77", "prompts"):
        (tmp_path / name).write_text(f"Q{name}\nanother\nthird\n")

    def run(module, words):
        parts = {}

        def note(name, answer):
            def noted(*args, **more):
                parts.setdefault(name, []).append(repr((args, more)))
                return answer(*args, **more) if callable(answer) else answer

            return noted

        with monkeypatch.context() as patch:
            for owner, calls in PARTS.items():
                for name, answer in calls.items():
                    patch.setattr(owner, name, note(name, answer))
            for name, choose in CHOICES.items():
                patch.setattr(module, name, note(name, choose), raising=False)
            assert run_main(module.main, shlex.split(words.format(tmp=tmp_path))) == 0
        return parts

    return run


@pytest.mark.parametrize("module", ARRIVE, ids=lambda module: module.__name__)
def test_no_flag_is_forgotten_here(module):
    flags = {word for flag in ARRIVE[module][0] for word in flag.split() if word.startswith("--")}
    fields = {field.name for field in dataclasses.fields(CONFIGS[module])}
    assert {word[2:].replace("-", "_") for word in flags} == fields - NOT_HERE


@pytest.mark.parametrize(
    ("module", "flag", "part"),
    [
        pytest.param(module, flag, part, id=f"{module.__name__.rpartition('.')[2]} {flag}")
        for module, (flags, _) in ARRIVE.items()
        for flag, part in flags.items()
    ],
)
def test_a_flag_arrives_at_the_part_that_obeys_it(module, flag, part, ask):
    always = ARRIVE[module][1]
    gives_prompt = module is generate and {"--prompt", "--prompts"} & set(flag.split())
    before, after = ask(module, always), ask(module, flag if gives_prompt else f"{always} {flag}")
    assert after[part] != before.get(part)
    value = (flag.split()[1:] or [""])[0]
    shown = [SHOWN.get(value, value).removeprefix("{tmp}/") in call for call in after[part]]
    assert all(shown) if flag.startswith(("--device", "--dtype", "--kernels")) else any(shown)


@pytest.mark.parametrize("module", ARRIVE, ids=lambda module: module.__name__)
def test_the_style_of_training_is_asked_for_and_the_tokenizers_warnings_are_told(module, ask, capsys):
    asked = ask(module, ARRIVE[module][1])
    assert all("'auto', 'llama2', <tokenizer>" in call for call in asked.get("choose_style", []))
    assert ("choose_style" in asked) == (module is not export)
    said = capsys.readouterr()
    assert "an odd file" in said.out + said.err
    assert ("the end" in said.out) == (module is generate), "what a stream still holds is said at its end"
    for part in ("generate", "answer_prompts"):
        assert all("{5}" in call for call in asked.get(part, [])), "the template's end of a turn ends an answer"


def test_an_adapter_is_served_under_its_own_name(ask):
    for flags, names in (("", ["smollm2-135m"]), ("--model a/b", ["b"]), ("--model a/b --adapter-dir c/d", ["d"]),
                         ("--model a/b --compare-with c/b", ["a/b", "c/b"]),
                         ("--model a/b --adapter-dir c/d e/f", ["b", "d", "f"])):  # fmt: skip
        assert [call.split("'")[1] for call in ask(serve, flags)["ModelService"]] == names


def test_a_raw_text_begins_with_bos_where_the_tokenizer_adds_it(ask, monkeypatch):
    for adds, ids in ((True, "[1, 7, 8]"), (False, "[7, 8]")):
        monkeypatch.setattr(TOKENIZER, "add_bos", adds)
        assert f"[{ids}]" in ask(generate, "--prompt Hi --raw")["generate"][0]
