"""What scripts.parity.adapters asks of PEFT, transformers and llama.cpp, in their own environment.

    python -m scripts.parity.peft_peer ACTION JOBS.json

JOBS holds a list of the action's arguments; results go where they say. Of the engine it imports the texts of the
templates alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from data_gen.base.cli import run_for_reader
from scripts.parity.transformers_loop import TransformersLoop, encode_rows


def compute_norm_wide(norm: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Return LlamaRMSNorm's formula in the dtype of x, where transformers takes fp32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


def use_fp64(model: torch.nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Let a LlamaForCausalLM compute in fp64 throughout. cos, sin (T, Dh/2): RoPE's table, which is fp32 everywhere."""
    table = tuple(torch.cat((t, t), -1).double()[None] for t in (cos, sin))
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = compute_norm_wide.__get__(module)
        if type(module).__name__ == "LlamaRotaryEmbedding":
            module.forward = lambda x, position_ids: table


def name_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return {the name that PEFT's file has: the gradient of what is trained}."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name.replace(".default", "").replace(".modules_to_save", "")] = p.grad
    return found


def make_case(job: dict[str, Any]) -> None:
    """Write a random base and an adapter of it in fp64; compute loss, gradients and logits of some tokens.

    job: folder, shape (of LlamaConfig), lora (of LoraConfig), seed.
    """
    torch.manual_seed(job["seed"])
    folder, given = Path(job["folder"]), load_file(Path(job["folder"], "given.safetensors"))
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(initializer_range=0.3, **job["shape"])).double()
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **job["lora"]))
    for name, p in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.2)
    model.double()
    model.save_pretrained(folder / "theirs")
    use_fp64(model, given["cos"], given["sin"])
    logits = model(input_ids=given["tokens"][None]).logits[0]
    loss = F.cross_entropy(logits[:-1], given["tokens"][1:])
    loss.backward()
    results = name_gradients(model) | {"loss": loss.detach(), "logits": logits.detach()}
    save_file({name: t.contiguous() for name, t in results.items()}, folder / "results.safetensors")


@torch.no_grad()
def compute_logits(job: dict[str, Any]) -> None:
    """Write the logits of tokens by a base with an adapter. job: base, adapter, tokens, table, dtype, out.

    adapter "" is none. With a table (a file of cos and sin) all is computed in fp64.
    """
    dtype = getattr(torch, job["dtype"])
    model = transformers.LlamaForCausalLM.from_pretrained(job["base"], dtype=dtype)
    if job["adapter"]:
        model = peft.PeftModel.from_pretrained(model, job["adapter"], autocast_adapter_dtype=False)
    if job.get("table"):
        use_fp64(model, *(load_file(job["table"])[name] for name in ("cos", "sin")))
    save_file({"logits": model.eval()(torch.tensor([job["tokens"]])).logits[0].contiguous()}, job["out"])


def train(job: dict[str, Any]) -> None:
    """Make an adapter with PEFT, and train it on rows by a plain loop. job: base, nf4, lora, rows, lr, steps, batch,
    max_length, folder. nf4: bitsandbytes keeps the base in 4 bits. Writes folder/initial and folder/trained, and the
    losses to folder/curve.json."""
    folder = Path(job["folder"])
    torch.manual_seed(0)

    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip

    def load(folder: str, dtype: torch.dtype) -> torch.nn.Module:
        options = {"quantization_config": quantised} if job["nf4"] else {}
        base = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **job["lora"]))

    loop = TransformersLoop(job["base"], lr=job["lr"], total_steps=job["steps"], exact_norm=True, load=load)
    loop.model.save_pretrained(folder / "initial")
    rows, size = json.loads(Path(job["rows"]).read_text()), job["batch"]
    examples = encode_rows(rows, transformers.AutoTokenizer.from_pretrained(job["base"]), job["max_length"])
    curve = []
    for i in range(job["steps"]):
        curve.append(loop.step(examples[i * size : (i + 1) * size], size))
        print(f"PEFT and transformers {i + 1}/{job['steps']}  loss {curve[-1][0]:.4f}", flush=True)
    loop.model.save_pretrained(folder / "trained")
    (folder / "curve.json").write_text(json.dumps(curve))


@torch.no_grad()
def answer(job: dict[str, Any]) -> None:
    """Write transformers' greedy answers, as ids, to prompts of ids. job: base, prompts, tokens, out."""
    model = transformers.LlamaForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    answers = []
    for ids in job["prompts"]:
        made = model.generate(torch.tensor([ids]), max_new_tokens=job["tokens"], do_sample=False)
        answers.append(made[0, len(ids) :].tolist())
    Path(job["out"]).write_text(json.dumps(answers))


def answer_by_llama_cpp(job: dict[str, Any]) -> None:
    """Write llama.cpp's greedy answers to prompts of ids. job: gguf, base, prompts, tokens, out.

    It gives texts; they are written as the ids that the tokenizer in the folder base makes of them.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = job["gguf"], 1024, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # f16 by default
    server, answers = xllamacpp.Server(params), []
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["base"])
    for ids in job["prompts"]:
        wanted = {"prompt": ids, "max_tokens": job["tokens"], "temperature": 0.0}
        text = server.handle_completions(wanted)["choices"][0]["text"]
        answers.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    Path(job["out"]).write_text(json.dumps(answers))


ACTIONS = {
    "make_case": make_case, "compute_logits": compute_logits, "train": train, "answer": answer,
    "answer_by_llama_cpp": answer_by_llama_cpp,
}  # fmt: skip


def main() -> None:
    """Do the jobs of the action that the command line names."""
    transformers.utils.logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[2]).read_text()):
        ACTIONS[sys.argv[1]](job)


if __name__ == "__main__":
    run_for_reader(main)
