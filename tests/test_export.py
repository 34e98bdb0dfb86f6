"""The export command, with the real model: layouts round trip to the same bytes, bad requests cost nothing."""

import pytest
import torch
import transformers
from conftest import ROOT, export

from engine.load import load_model


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_layout_holds_the_same_model(smollm2, tmp_path):
    """GGUF -> Hugging Face -> Meta -> Hugging Face, sharded on the way: the same logits, and the same bytes again."""
    hf, again, meta, back = (tmp_path / name for name in ("hf", "again", "meta", "back"))
    export("--model", smollm2, "--out", hf, "--max-shard-bytes", 200_000_000)
    assert len(list(hf.glob("model-*.safetensors"))) > 1
    export("--model", hf, "--out", again, "--max-shard-bytes", 200_000_000)
    assert files(again) == files(hf)
    export("--model", hf, "--out", meta, "--layout", "meta")
    export("--model", meta, "--out", back, "--max-shard-bytes", 200_000_000)
    weights = {name: content for name, content in files(hf).items() if "safetensors" in name}
    assert {name: files(back)[name] for name in weights} == weights

    tokens = torch.arange(40) * 997 % 49152
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


def test_dtype(smollm2, tmp_path):
    export("--model", smollm2, "--out", tmp_path / "bf16", "--dtype", "bf16")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16


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
