"""Generation: greedy text identical to transformers', sampling that follows its seed and its distribution."""

import io
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine import generate as module
from engine.base.errors import run_main
from engine.inference.generation import generate, sample
from engine.model.config import MODELS
from engine.model.llama import new_model
from engine.serving.models import load_model
from engine.text.templates import Row, encode_prompt
from tests.helpers.run import generate as command
from tests.helpers.small_model import small_model

PROMPTS = ["Name three uses for a paper clip.", "Hi", "Translate to French: Good morning, my friends."]


@pytest.fixture(scope="module")
def tiny():
    model = new_model(MODELS["tiny"], "cpu", torch.float32)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1)  # at its first, small weights attention is all but uniform
    return model


def without_cache(model, prompt, n):
    """Greedy, the whole sequence through the model again for each token."""
    ids = list(prompt)
    for _ in range(n):
        documents = torch.tensor([[0, len(ids), 0, 0]], dtype=torch.int32)
        x = model(torch.tensor(ids), torch.arange(len(ids)), documents)
        ids.append(int(model.logits(x[-1]).argmax()))
    return ids[len(prompt) :]


def test_the_cache_changes_nothing_and_neighbours_neither(tiny):
    prompts = [[5, 6, 7], [9], [100, 200, 300, 400, 500]]
    alone = [without_cache(tiny, prompt, 12) for prompt in prompts]
    assert len({tuple(answer) for answer in alone}) == 3
    assert generate(tiny, prompts, (), 12) == alone
    assert [generate(tiny, [prompt], (), 12)[0] for prompt in prompts] == alone


def test_it_stops_at_a_stop_id_and_leaves_it_out(tiny):
    prompts = [[5, 6, 7], [9]]
    full = generate(tiny, prompts, (), 12)
    stop = full[0][4]
    cut = generate(tiny, prompts, {stop}, 12)
    assert cut == [answer[: answer.index(stop)] if stop in answer else answer for answer in full]
    assert len(cut[0]) <= 4


def test_tokens_are_told_as_they_come(tiny):
    told = []
    answers = generate(tiny, [[5, 6], [9]], (), 6, on_token=lambda i, token: told.append((i, token)))
    assert [[t for i, t in told if i == prompt] for prompt in (0, 1)] == answers


def test_a_seed_repeats_and_another_does_not(tiny):
    a, b, c = (generate(tiny, [[5, 6, 7]], (), 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert a == b != c
    with_neighbour = generate(tiny, [[9, 9], [5, 6, 7]], (), 20, temperature=1.0, seed=1)
    assert with_neighbour[1] == a[0]


def test_sampling_follows_temperature_and_top_p():
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)

    def shares(temperature, top_p):
        drawn = [sample(logits, temperature, top_p, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    for temperature in (0.5, 1.0, 2.0):
        want = torch.softmax(logits / temperature, 0)
        assert (shares(temperature, 1.0) - want).abs().max() < 4 * 0.5 / 4000**0.5
    p = torch.softmax(logits, 0)  # 0.64, 0.24, 0.09, 0.03
    kept = torch.tensor([p[0], p[1], 0, 0]) / (p[0] + p[1])
    assert (shares(1.0, 0.8) - kept).abs().max() < 4 * 0.5 / 4000**0.5
    assert shares(1.0, 1e-9).tolist() == [1, 0, 0, 0] and sample(logits, 0, 1.0, None) == 0


def test_an_empty_prompt_is_refused(tiny):
    with pytest.raises(ValueError, match="an empty prompt has no next token"):
        generate(tiny, [[5], []], (), 3)


def test_greedy_text_is_transformers_over_40_tokens(smollm2, tmp_path):
    """The real model from its GGUF, three prompts of different lengths at once."""
    from engine.formats.save import save_hf

    ours, tokenizer, _ = load_model("smollm2-135m", torch.device("cpu"), torch.float32)
    save_hf(tmp_path, ours, bos_id=tokenizer.bos_id, eos_ids=sorted(tokenizer.stop_ids))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = [encode_prompt(Row("", None, text), tokenizer) for text in PROMPTS]
    answers = generate(ours, prompts, (), 40)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 40
        with torch.no_grad():  # greedy: each token is the likeliest after those before it
            logits = theirs(torch.tensor([prompt + answer])).logits[0]
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_the_command_answers_a_prompt_and_a_file(smollm2, tmp_path):
    """The chat is with the model that is taken where none is named, which knows ChatML's tokens."""
    shutil.copytree(small_model(), tmp_path / "model")
    weights = load_file(small_model() / "model.safetensors")
    weights = {
        name: t * (8 if t.ndim > 1 else 1) for name, t in weights.items()
    }  # so that prompts matter, as in tiny()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    small = "--model", tmp_path / "model", "--max-new-tokens", 12
    one = command(*small, "--prompt", PROMPTS[0]).stdout
    assert one.strip()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    many = command(*small, "--prompts", tmp_path / "prompts.txt").stdout
    assert re.findall("^### (.*)$", many, re.M) == PROMPTS
    found = [answer.strip() for answer in re.split("^### .*$", many, flags=re.M)[1:]]
    assert found[0] == one.strip() and len(set(found)) == 3
    assert command(*small, "--prompts", tmp_path / "prompts.txt", "--batch-size", 2).stdout == many
    rows = '{"instruction": "Hi"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    chat = command("--prompts", tmp_path / "rows.jsonl", "--max-new-tokens", 12, "--prompt-style", "chatml").stdout
    answers = re.split("^### Hi$", chat, flags=re.M)[1:]
    assert len(answers) == 2 and answers[0] == answers[1]
    raw = [command(*small, "--prompt", "Once upon a time", *more).stdout for more in (("--raw",), ())]
    assert raw[0].strip() and raw[0] != raw[1]


def test_a_prompt_comes_from_standard_input(monkeypatch, capsys):
    told = []
    for prompt, typed in (("Say one.", ""), ("-", "Say one.\n"), ("-", " \n")):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        flags = ["--model", str(small_model()), "--device", "cpu", "--prompt", prompt, "--max-new-tokens", "6"]
        code = run_main(module.main, flags)
        told.append((code, *capsys.readouterr()))
    assert told[0] == told[1] and told[0][0] == 0 and told[0][1].strip()
    assert told[2][0] == 2 and "--prompt -: standard input is empty" in told[2][2]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "give one of --prompt and --prompts"),
        (("--prompt", "x", "--prompts", "y"), 2, "give one of --prompt and --prompts"),
        (("--prompt", "x", "--top-p", "0"), 2, "--top-p more than 0"),
        (("--promt", "x"), 2, "did you mean --prompt?"),
        (("--prompts", "/nonexistent"), 3, "cannot be read"),
        (("--prompt", "x", "--model", "/nonexistent"), 3, "no such folder or file"),
        (
            ("--prompt", "x", "--max-new-tokens", "9000", "--model", "SMALL"),
            2,
            "the model has 512; lower --max-new-tokens",
        ),
    ],
)
def test_bad_requests(args, code, message):
    done = command(*(small_model() if arg == "SMALL" else arg for arg in args), check=False)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
