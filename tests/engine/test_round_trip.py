"""Every style and every layout of a base: after training and export, transformers asks and stops as we do."""

import functools
import json

import pytest
import torch
import transformers

from engine import export, finetune, generate
from engine.base.errors import run_main
from engine.formats.save import save_hf, save_meta
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.output.folder import read_prompt_style
from engine.text.chat_templates import find_carried_style
from engine.text.templates import Row, encode_prompt, find_stop_ids
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import SPECIALS, add_byte_level_to_gguf, write_byte_level, write_sentencepiece
from tests.helpers.checkpoints import write_gguf

transformers.utils.logging.disable_progress_bar()
OWN = (  # the template of a checkpoint that is trained under its own
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STYLES = SPECIALS | {"template": SPECIALS["chatml"]}
QUESTION, ANSWER = "Name a colour.", "Blue."


def write_base(folder, layout, style, pre="gpt-2"):
    """Write a model of random weights in a layout, and return its path."""
    specials, template = STYLES[style], OWN if style == "template" else None
    if layout == "meta":
        tokenizer = load_tokenizer(write_sentencepiece(folder / "base", specials, template))
    else:
        settings = {"chat_template": template} if template else {}
        tokenizer = load_tokenizer(write_byte_level(folder / "base", specials, **settings))
    config = ModelConfig(
        dim=64, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=128, vocab_size=tokenizer.vocab_size, max_seq_len=256,
        norm_eps=1e-5,
    )  # fmt: skip
    model = new_model(config, "cpu", torch.float32)
    model.init_weights(0)
    if layout == "meta":
        save_meta(folder / "base", model)
        return folder / "base"
    save_hf(folder / "base", model, bos_id=tokenizer.bos_id, eos_ids=[tokenizer.eos_id])
    if layout == "hf":
        return folder / "base"
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    add = functools.partial(add_byte_level_to_gguf, specials=specials, template=template, pre=pre)
    write_gguf(folder / "base.gguf", theirs, config, add_tokenizer=lambda writer, _: add(writer))
    return folder / "base.gguf"


def here(command, *args):
    assert run_main(command.main, [str(arg) for arg in args]) == 0


@pytest.mark.parametrize("layout", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("style", STYLES)
def test_transformers_asks_and_stops_as_we_do(style, layout, tmp_path, capsys):
    base = write_base(tmp_path, layout, style)
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": QUESTION, "output": ANSWER}] * 4))
    here(
        finetune, "--model", base, "--data", tmp_path / "rows.json", "--out", tmp_path / "out", "--prompt-style", style,
        "--epochs", 60, "--global-batch-size", 4, "--lr", "1e-2", "--save-every", 30, "--token-cache", "off",
        "--max-length", 256,
    )  # fmt: skip
    for folder, of in (("exported", "out"), ("of-state", "out/checkpoint-60")):
        here(export, "--model", tmp_path / of, "--out", tmp_path / folder)
    trained = load_tokenizer(base)
    prompt = encode_prompt(Row("", None, QUESTION), trained, style)
    for name in ("out", "exported", "of-state"):
        folder = tmp_path / name
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        asked = theirs.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
        assert asked["input_ids"] == prompt, name
        ours = load_tokenizer(folder)
        found = read_prompt_style(folder) or find_carried_style(ours)
        assert found == style and encode_prompt(Row("", None, QUESTION), ours, found) == prompt
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        stops = model.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else set(stops)
        assert stops == find_stop_ids(trained, style) == find_stop_ids(ours, style) and theirs.eos_token_id in stops
        with torch.no_grad():
            answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0, len(prompt) :]
        assert answer[-1].item() in stops and ours.decode(answer.tolist()).strip() == ANSWER
        capsys.readouterr()
        here(generate, "--model", folder, "--prompt", QUESTION, "--max-new-tokens", 40)
        assert capsys.readouterr().out.strip() == ANSWER


def test_an_export_tells_what_a_tokenizer_leaves_open(tmp_path, capsys):
    here(export, "--model", write_base(tmp_path, "gguf", "alpaca", pre="default"), "--out", tmp_path / "out")
    assert "warning: " in (told := capsys.readouterr().out) and "tokenizer.ggml.pre is" in told
