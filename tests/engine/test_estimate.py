"""engine.estimate's command line: flags, what it prints, JSON, and exit codes."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest

from engine import estimate
from engine.base.errors import DataError, UsageError, run_main
from engine.base.flags import parse_flags
from engine.estimate import SHARED_FLAGS, EstimateConfig, main
from engine.model.config import MODELS, RopeScaling
from engine.planning.cards import CARDS, GIB
from engine.planning.memory import state_bytes
from engine.planning.setting import Setting
from engine.planning.tables import COLLECTIVES
from engine.training.config import FinetuneConfig


def run(*flags):
    """Run the command in this process and return its exit code."""
    argv = list(map(str, flags))
    return run_main(main, argv)


def strict_json(path):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


RECIPES = {  # estimates that are kept whole, as text and as JSON
    "full": "--model llama-7b",
    "lora": "--model llama-7b --gpu RTX-4090 --adapter lora",
    "qlora of a table": "--model llama3-8b --gpu RTX-3060 --adapter qlora --lora-rank-pattern q_proj=4 "
    "--lora-save lm_head",
    "offload": "--model llama-13b --gpu H100 --offload-optimizer --recompute block",
    "offload over PCIe": "CRIA_OPTIMIZER=triton --model llama-7b --gpu RTX-4090 --offload-optimizer --recompute block "
    "--micro-batch-tokens 4096",
    "offload of four cards": "--model llama-7b --gpu RTX-3090 --gpus 4 --offload-optimizer --max-length 2048",
    "8-bit states": "--model llama-7b --gpu A100-80 --optimizer-states 8bit --recompute none --micro-batch-size 2",
    "qlora of few tokens": "--model llama2-7b --gpu RTX-4060 --adapter qlora --lora-dropout 0.1 --max-length 64 "
    "--lora-targets q_proj v_proj --lora-r 4",
    "the CPUs of two machines": "CRIA_OPTIMIZER=cpu --model llama-13b --gpu A100-40 --gpus 16 --offload-optimizer "
    "--replicas 2 --host-bandwidth 40",
    "two rows a step": "--model llama-7b --gpu A100-40 --global-batch-size 2 --optimizer-states fp32",
    "lora of two cards": "--model llama3-8b --gpu RTX-3090 --gpus 2 --replicas 1 --adapter lora "
    "--micro-batch-tokens 512",
    "updates of some layers": "--model llama-7b --gpu RTX-4090 --adapter lora --lora-targets layers.20.mlp.down_proj "
    "layers.20.self_attn.q_proj layers.31.self_attn.o_proj --lora-dropout 0.05 --recompute block",
    "updates of the last matrix": "--model tinyllama-1.1b --gpu RTX-3060 --adapter lora --lora-targets "
    "layers.21.mlp.down_proj",
    "fp32 and its bytes": "--model tinyllama-1.1b --gpu RTX-3090 --dtype fp32 --recompute block",
    "nothing fits": "--model llama-13b --gpu RTX-3060",
    "eight cards": "--model llama-13b --gpu A100-80 --gpus 8",
    "replicas": "--model tinyllama-1.1b --gpu RTX-4090 --gpus 4 --replicas 4 --global-batch-size 64",
    "in backward": "--model llama2-7b --gpu L40S --optimizer-in-backward --grad-clip 0 --optimizer-states bf16 "
    "--master-weights stochastic",
    "long rows": "--model llama3-8b --gpu H200 --max-length 4096 --micro-batch-tokens 8192 --no-share-prefix",
    "rows one by one": "--model tinyllama-1.1b --gpu RTX-3090 --micro-batch-size 4 --epochs 1 --max-steps 9999",
    "own card": "--model smollm2-135m --gpu-memory 8 --gpu-tflops 50 --gpu-bandwidth 300 "
    "--price-per-hour 0.2 --max-steps 10",
    "fp32": "--model smollm2-135m --gpu B200 --dtype fp32 --train-on-prompt --prompt-style chatml",
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_told_of(name, snapshot, tmp_path, capsys, monkeypatch):
    words = RECIPES[name].split()
    if "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    run(*words, "--json", tmp_path / "estimate.json")
    assert capsys.readouterr().out.replace(str(tmp_path), "FOLDER") == snapshot
    assert (tmp_path / "estimate.json").read_text().replace(str(tmp_path), "FOLDER") == snapshot(name="json")


@pytest.mark.parametrize("card", CARDS)
def test_every_card_and_model_prints(card, capsys):
    for model in MODELS:
        assert run("--model", model, "--gpu", card) == 0
        out = capsys.readouterr().out
        assert f"on one {card}" in out and "total" in out and ("tokens/s" in out or "Nothing fits" in out)
        assert max(len(line.partition("  --")[0]) for line in out.splitlines()) <= 80


def test_flags_are_engine_finetunes():
    theirs = {field.name: field for field in dataclasses.fields(FinetuneConfig)}
    assert len(SHARED_FLAGS) > 15
    for field in dataclasses.fields(EstimateConfig):
        if field.name in SHARED_FLAGS and field.name != "model":
            assert field.default == theirs[field.name].default and field.metadata == theirs[field.name].metadata
            assert field.type == theirs[field.name].type


UNSEEN = {"json", "debug", "grad_clip"}  # the first two are main's; clipping takes no bytes and no time
OTHERS = (  # flags that change what some part of the estimate is asked
    "--model llama2-7b", "--gpu A100-40", "--replicas 2", "--gpu-memory 7", "--gpu-tflops 70", "--gpu-bandwidth 700",
    "--host-bandwidth 17", "--price-per-hour 1.7", "--tokenizer mine", "--data others", "--epochs 7", "--max-steps 7",
    "--global-batch-size 64", "--micro-batch-tokens 777", "--micro-batch-size 7", "--max-length 77", "--seed 7",
    "--dtype fp32", "--adapter qlora", "--lora-r 7", "--lora-alpha 7", "--lora-dropout 0.7", "--lora-targets q_proj",
    "--rslora", "--lora-rank-pattern q_proj=7", "--lora-alpha-pattern q_proj=7", "--lora-save lm_head",
    "--prompt-style chatml", "--train-on-prompt", "--no-share-prefix", "--master-weights stochastic",
    "--recompute block", "--optimizer-states bf16", "--offload-optimizer", "--optimizer-in-backward", "--save-every 7",
    "--skip-bad-rows", "--gpus 2",
)  # fmt: skip
SHOWN = {"fp32": "torch.float32", "qlora": "nf4_base=True", "q_proj=7": "('q_proj', 7"}  # a value as parts see it


@pytest.fixture
def asked(monkeypatch):
    """Return a function that runs the estimate of some flags, and tells what each of its parts was asked."""

    def ask(*flags):
        parts = {}

        def note(name, answer):
            return lambda *args, **more: (parts.update({name: (*args, more)}), answer)[1]

        for name, answer in {
            "read_rows": ([], None), "resolve_data_paths": "paths", "find_tokenizer": "its tokenizer",
            "encode_rows": SimpleNamespace(select=lambda: "examples"), "dataset_mix": "mix", "estimate_run": "found",
        }.items():  # fmt: skip
            monkeypatch.setattr(estimate, name, note(name, answer))
        config, _ = parse_flags(EstimateConfig, [*map(str, flags)])
        assert estimate.estimate(config) == "found"
        return parts

    return ask


def test_the_flags_below_are_all():
    named = {flag.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_") for flag in OTHERS}
    assert named | UNSEEN == {field.name for field in dataclasses.fields(EstimateConfig)}


@pytest.mark.parametrize("flag", OTHERS)
def test_no_flag_is_dropped_on_the_way_to_the_part_that_obeys_it(flag, asked):
    name, *value = flag.split()
    context = ["--model", "llama-7b", "--data", "rows"]
    context += ["--adapter", "lora"] if name.startswith(("--lora", "--rslora")) else []
    context += ["--gpus", "2"] if name == "--replicas" else []
    context += ["--grad-clip", "0"] if name == "--optimizer-in-backward" else []
    before, after = asked(*context), asked(*context, *flag.split())
    assert repr(after) != repr(before)
    if name not in ("--gpu", "--save-every", "--model"):  # whose value stands for something else
        assert not value or SHOWN.get(value[0], value[0]) in repr(after)


def test_the_rows_are_read_as_finetune_would(asked, monkeypatch):
    rows = ("--model", "tiny", "--data", "rows", "--max-length", "77")
    for style in ("template", "chatml", "alpaca"):
        parts = asked(*rows, "--prompt-style", style, "--tokenizer", "mine", "--train-on-prompt")
        assert parts["read_rows"] == ("paths", False, {"with_tools": style == "template"})
        assert parts["find_tokenizer"] == (MODELS["tiny"], "mine", None, {})
        assert parts["encode_rows"] == ([], "its tokenizer", style, 77, True, {})
    assert asked(*rows, "--skip-bad-rows")["read_rows"][1] is True

    def fail(*_):
        raise DataError("no tokenizer there")

    monkeypatch.setattr(estimate, "find_tokenizer", fail)
    recipe = estimate.recipe_from_config(parse_flags(EstimateConfig, rows)[0].to_finetune_config(), 1)
    monkeypatch.setattr(estimate, "read_rows", lambda *_, **more: (["a row"] * 24, None))
    named, unnamed = (parse_flags(EstimateConfig, [*rows, *more])[0] for more in (("--tokenizer", "mine"), ()))
    with pytest.raises(DataError, match="no tokenizer there"):
        estimate.read_mix(named, recipe, MODELS["tiny"], None)
    mix = estimate.read_mix(unnamed, recipe, MODELS["tiny"], None)
    assert 0 < mix.examples <= 24 and "24 rows" in mix.what and "(no tokenizer there)" in mix.what


def test_a_scaled_rope_takes_rows_beyond_the_length_of_pretraining(asked, tmp_path, monkeypatch):
    scaled = dataclasses.replace(MODELS["tiny"], rope_scaling=RopeScaling(factor=4.0, original_max_seq_len=512))
    monkeypatch.setattr(estimate, "open_source", lambda path: SimpleNamespace(config=scaled, path=path))
    model = ("--model", tmp_path, "--data", "rows", "--micro-batch-tokens", 9000)
    assert asked(*model, "--max-length", 2048)["find_tokenizer"] == (scaled, "", tmp_path, {})
    with pytest.raises(UsageError, match="--max-length 2049 is over the model's 2048 positions"):
        asked(*model, "--max-length", 2049)


def test_a_card_of_another_memory_says_whose_speed_it_has(capsys):
    known = ("--gpu-tflops", 100, "--gpu-bandwidth", 900)
    note = "note: a card of 8 GiB, but without --gpu its speed is taken to be that of one H100;"
    for flags in ((), known[:2], known[2:]):
        assert run("--model", "smollm2-135m", "--gpu-memory", 8, *flags) == 0 and note in capsys.readouterr().out
    for flags in (
        ("--gpu", "H100", "--gpu-memory", 8),
        ("--gpu=H100", "--gpu-memory", 8),
        ("--gpu-memory", 8, *known),
        (),
    ):
        assert run("--model", "smollm2-135m", *flags) == 0 and "note:" not in capsys.readouterr().out


def test_help_is_complete(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["engine/estimate.py"])
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m engine.estimate")
    for field in dataclasses.fields(EstimateConfig):
        assert f"\n  --{field.name.replace('_', '-')}" in text
        assert " ".join(field.metadata["help"].split()) in " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("--modle x", "unknown flag --modle; did you mean --model?"),
        ("--gpu H10", "did you mean H100?"),
        ("--gpu A100", "; which one, A100-40 or A100-80?"),
        ("--gpu abacus", "of another card give --gpu-memory"),
        ("--gpus 0", "--gpus is 0, wanted 1 to 64"),
        ("--gpus 65", "--gpus is 65, wanted 1 to 64"),
        (
            "--gpus 3",
            "--global-batch-size 128 is not divisible by --gpus 3: every card takes the same number; pass 126 ",
        ),
        ("--gpus 8 --global-batch-size 4", "not divisible by --gpus 8: every card takes the same number; pass 8\n"),
        ("--gpus 8 --optimizer-in-backward --grad-clip 0", "with --gpus 8 is not projected: each card holds a part"),
        ("--gpus 8 --replicas 3", "--replicas 3 of --gpus 8; wanted one of 1, 2, 4, 8"),
        ("--replicas 2", "--replicas 2 of --gpus 1; wanted one of 1"),
        ("--model lama-7b", "did you mean llama-7b?"),
        ("--micro-batch-tokens 100", "an example must fit one forward"),
        ("--optimizer-in-backward", "pass --grad-clip 0"),
        ("--epochs 0", "--epochs is 0, wanted 1 or more"),
        ("--host-bandwidth 0", "--host-bandwidth is 0.0, wanted more than 0"),
        ("--price-per-hour -1", "--price-per-hour is -1.0, wanted 0 or more"),
        ("--gpu-memory nan", "--gpu-memory is 'nan', wanted a finite number"),
        ("--max-length 4096", "--max-length 4096 is over the model's 2048 positions"),
        ("--json /nowhere/x.json", "--json /nowhere/x.json: cannot be written"),
    ],
)
def test_what_is_refused_exits_with_2(text, problem, capsys):
    assert run(*text.split()) == 2 and problem in capsys.readouterr().err


def test_json_says_what_is_printed(tmp_path, capsys):
    path = tmp_path / "found.json"
    assert run("--model", "llama-7b", "--gpu", "rtx 4090", "--gpu-memory", 12, "--json", path) == 0
    found, out = strict_json(path), capsys.readouterr().out
    assert not found["fits"] and "does not fit" in out and "Nothing fits" in out and found["alternatives"] == []
    assert run("--json", path, "--price-per-hour", 3.6, "--optimizer-states", "fp32") == 0
    found, out = strict_json(path), capsys.readouterr().out
    kinds = found["memory_bytes"]
    total = kinds["total"] - max(kinds["head"], kinds["backward"])
    assert total == sum(kinds[k] for k in ("weights", "master", "states", "gradients", "activations", "overhead"))
    assert f"{kinds['total'] / 1e9:.2f}" in out and not found["fits"] and found["source"] == "projected"
    assert found["alternatives"][0]["flags"] == ["--optimizer-states 8bit"] and found["alternatives"][0]["fits"]
    first = found["alternatives"][0]
    assert first["dollars"] == pytest.approx(first["total_s"] / 1000)
    assert f"{first['tokens_per_s']:,.0f}" in out and f"${first['dollars']:.2f}" in out
    assert sum(v for k, v in first["step_s"].items() if k != "total") == pytest.approx(first["step_s"]["total"])


def test_llama_7b_fits_24_gb_where_gradients_leave_for_the_host(tmp_path, capsys):
    """As fast as the slower of the host's memory and the bus lets it be, which is projected."""
    path = tmp_path / "found.json"
    flags = ("--model", "llama-7b", "--gpu", "RTX4090", "--json", path)
    assert run(*flags) == 0 and strict_json(path)["alternatives"][0]["flags"] == ["--offload-optimizer"]
    capsys.readouterr()
    seconds = []
    for host in (60, 120, 10_000):
        assert run(*flags, "--offload-optimizer", "--host-bandwidth", host) == 0
        found, out = strict_json(path), capsys.readouterr().out
        assert found["fits"] and found["source"] == "projected" and "tokens/s (projected)" in out
        assert f"by the CPU: 189 GB at --host-bandwidth {host}, or PCIe" in out
        assert "GB a card of master, states, gradients and weights" in out
        assert "those there at once: they leave in backward" in out
        assert max(map(len, out.splitlines())) <= 80
        seconds.append(found["step_s"]["update"])
    n = found["parameters"]
    assert seconds[0] - seconds[1] == pytest.approx(28 * n / 120e9) and seconds[1] > seconds[2] > 2 * n / 25e9


def test_adapters_take_a_small_cards_memory(tmp_path, capsys):
    """LLaMA-7B on a card of 8 GiB with weights in 4 bits, and what an 8B that does not fit is told."""
    path = tmp_path / "found.json"
    lora = ("--model", "llama-7b", "--gpu", "RTX-4090", "--json", path, "--adapter")
    found = {}
    for kind, memory in (("lora", 24), ("qlora", 24), ("qlora", 8)):
        assert run(*lora, kind, "--gpu-memory", memory) == 0
        found[kind, memory], out = strict_json(path), capsys.readouterr().out
        assert found[kind, memory]["fits"] and "(4 x 6.74e+09 + 6 x 4e+07) x tokens/s" in out
        assert ("dequantise" in out) == (kind == "qlora") and "0.08 GB of them trained" in out
    whole, small = found["lora", 24], found["qlora", 8]
    assert whole["tokens_per_s"] > found["qlora", 24]["tokens_per_s"] > small["tokens_per_s"]
    assert small["memory_bytes"]["weights"] < 0.3 * whole["memory_bytes"]["weights"]
    seconds, flops = whole["step_s"], (4 * 6738415616 + 6 * 39976960) * whole["computed_tokens"]
    assert whole["mfu"] == pytest.approx(flops / seconds["total"] / 165e12)
    assert whole["alternatives"] == [] and seconds["dequantise"] == 0 < found["qlora", 24]["step_s"]["dequantise"]
    assert run("--model", "llama3-8b", "--gpu", "RTX-4090", "--gpu-memory", 20) == 0
    assert "Adapters take less: --adapter lora (from 17." in capsys.readouterr().out
    assert run(*lora, "lora", "--gpu-memory", 16.5, "--lora-r", 64, "--micro-batch-tokens", 2048) == 0
    assert "Adapters take less" not in (out := capsys.readouterr().out) and "--recompute block" in out
    assert "--offload-optimizer" not in out
    assert run(*lora, "lora", "--lora-targets", "q_prj") == 2
    assert "no map of the model is among the targets" in capsys.readouterr().err
    assert run(*lora, "none", "--lora-r", 8) == 2


def test_another_card_by_its_figures(tmp_path, capsys):
    path = tmp_path / "found.json"
    card = ("--gpu-memory", 48, "--gpu-tflops", 100, "--gpu-bandwidth", 500)
    assert run("--model", "tinyllama-1.1b", *card, "--json", path) == 0
    found, out = strict_json(path), capsys.readouterr().out
    assert found["memory_bytes"]["room"] == 48 * GIB and found["dollars"] is None and "pass --price-per-hour" in out
    assert (found["card"]["peak_tflops"], found["card"]["bandwidth_gb_per_s"]) == (100, 500)
    assert run("--model", "tinyllama-1.1b", *card, "--json", path, "--price-per-hour", 0) == 0
    assert strict_json(path)["dollars"] == 0 and "$0.00 at $0.00 an hour\n" in capsys.readouterr().out


def test_the_data_of_a_file(rows_file, smollm2, capsys):
    assert run("--model", smollm2, "--data", rows_file, "--gpus", 8, "--global-batch-size", 16) == 0
    assert "2 examples a card of 24 examples of --data" in capsys.readouterr().out
    assert run("--model", "llama-7b", "--data", rows_file, "--gpu", "H200") == 0
    assert "24 rows, of Alpaca's lengths for want of a tokenizer" in capsys.readouterr().out
    assert run("--model", "smollm2-135m", "--data", "nowhere.json") == 3


# ---- steps that a report measured ------------------------------------------------------------------------------------

MACHINE = {"machine": {"device": "NVIDIA H100 80GB HBM3"}}
CEILINGS = {"ceilings": {"gemm_tflops": 700.0, "copy_gb_per_s": 2900.0}}
STEP = {"name": "main", "model": "llama-7b", "tokens": 8320, "sharing": True, "recompute": "cheap", "master": "split",
        "states": "8bit", "offload": False, "tokens_per_s": 20000.0, "peak_gib": 71.5}  # fmt: skip


def write_report(path, parts, **facts):
    report = {"what": "scripts.gpu_report", "smoke": False, "date": "2026-01-01", "parts": parts} | facts
    path.write_text(json.dumps(report))


def test_measured_steps_of_the_same_setting_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.planning.cards.BENCHMARKS", tmp_path)
    failed = {name: value for name, value in STEP.items() if name not in ("tokens_per_s", "peak_gib")}
    others = {"model": "llama-13b", "sharing": False, "master": "fp32", "states": "fp32", "recompute": "block",
              "offload": True, "adapter": "lora"}  # fmt: skip
    records = [STEP, failed | {"failed": "out of memory"}]
    records += [STEP | {name: other, "name": "another"} for name, other in others.items()]
    write_report(tmp_path / "h100.json", MACHINE | CEILINGS | {"step": {"records": records}})
    assert run("--optimizer-states", "8bit", "--json", tmp_path / "found") == 0
    out = capsys.readouterr().out
    assert "at 700 of 989 TFLOP/s" in out and out.count("20,000 tokens/s") == 1 and "another" not in out
    assert "measured in h100.json: 20,000 tokens/s in micro-batches of 8,320 tokens" in out
    assert "peak 71.5 GiB; that is 17 min" in out and "tokens/s (projected from rates in h100.json)" in out
    assert strict_json(tmp_path / "found")["measured_steps"] == [STEP]
    slow = {"records": [STEP | {"tokens_per_s": 2000.0}]}
    write_report(tmp_path / "h100.json", MACHINE | CEILINGS | {"step": slow})
    assert run("--optimizer-states", "8bit") == 0
    assert "2,000 tokens/s in micro-batches of 8,320 tokens, peak 71.5 GiB; that is 2.8 h" in capsys.readouterr().out
    for adapter in ("lora", "qlora"):
        steps = [STEP | {"adapter": kind, "name": kind, "states": "fp32"} for kind in ("lora", "qlora")]
        write_report(tmp_path / "h100.json", MACHINE | CEILINGS | {"step": {"records": [STEP, *steps]}})
        assert run("--adapter", adapter, "--optimizer-states", "fp32", "--json", tmp_path / "found") == 0
        assert [step["name"] for step in strict_json(tmp_path / "found")["measured_steps"]] == [adapter]
    capsys.readouterr()
    assert run("--optimizer-states", "8bit", "--gpu", "H200") == 0 and "projected" in capsys.readouterr().out


def test_measured_steps_are_one_cards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.planning.cards.BENCHMARKS", tmp_path)
    write_report(tmp_path / "h100.json", MACHINE | CEILINGS | {"step": {"records": [STEP]}})
    assert run("--optimizer-states", "8bit", "--gpus", 2) == 0 and "measured in" not in capsys.readouterr().out


# ---- several cards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("card", "model"), [("A100-80", "llama-13b"), ("H100", "llama-7b"), ("4090", "llama-7b")])
@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_several_cards_print_and_say_that_they_are_projected(card, model, gpus, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert run("--model", model, "--gpu", card, "--gpus", gpus, "--json", path) == 0
    out, found = capsys.readouterr().out, strict_json(path)
    label = "projected: no run on several cards was measured; sharded by FSDP2, a block at a time"
    label += "; a step's tokens shared out evenly"
    assert " ".join(out.split()).startswith(label) and found["label"].startswith(label) and found["cards"] == gpus
    assert ("; machines of 8, joined by 400 Gb/s a card" in " ".join(out.split())) == (gpus > 8)
    shards, replicas = found["shards"], found["replicas"]
    assert f"on each of {gpus} {found['card']['name']}" in out and "\n  gathered  " in out
    layout = f"{replicas} replicas of {shards} shards" if replicas > 1 else f"sharded over {gpus}"
    assert shards * replicas == gpus and f", {layout} kind" in " ".join(out.split())
    assert f"bfloat16, 1/{shards} of them" in out and f"{found['memory_bytes']['gathered'] / 1e9:.2f}" in out
    assert ("bfloat16, and fp32 to be summed" in out) == (replicas > 1)
    assert max(len(line.partition("  --")[0]) for line in out.splitlines()) <= 80
    if not found["fits"]:
        assert "What fits, " in out and found["alternatives"]
        assert not any("--optimizer-in-backward" in flag for way in found["alternatives"] for flag in way["flags"])
        assert all(way["fits"] and way["communication_bytes"] for way in found["alternatives"])
        assert "GB a card on the host)" in out
        return
    late = found["step_s"]["communication"]
    gbs = f"{found['communication_bytes'] / 1e9:,.0f} GB"
    assert f"{1e3 * late:.1f}  not hidden of {1e3 * found['communication_s']:,.0f} ms, {gbs}" in out
    assert late == pytest.approx(sum(found["not_hidden_s"].values()))
    sent = found["collectives"]
    assert sum(sent["bytes"].values()) == found["communication_bytes"] and sent["layers"] == MODELS[model].n_layers
    for kind, name in COLLECTIVES.items():
        blocks = found["micro_batches"] * (sent["layers"] - (kind == "gather_backward"))
        row = rf"{name} +{sent['bytes'][kind] / 1e9:.1f} +{1e3 * sent['seconds'][kind]:.1f} +{blocks} of "
        assert bool(re.search(row, out)) == (sent["bytes"][kind] > 0)
    assert f"{128 // gpus} examples a card of Alpaca" in out and f"at {gpus} x $" in out
    computed = gpus * found["computed_tokens"] / found["step_s"]["total"]
    assert f"{computed:,.0f} computed tokens/s, MFU {found['mfu']:.0%}: 6 x" in out
    assert f"x tokens/s / {gpus} / {found['card']['peak_tflops']:g}e12" in out


def test_nothing_fits_on_several_cards(capsys):
    assert run("--gpu", "4090", "--gpus", 2, "--gpu-memory", 3) == 0
    assert "GB a card are the least that any setting takes" in capsys.readouterr().out


def test_states_in_blocks_are_not_cut(capsys):
    many = ("--gpus", 64, "--replicas", 1, "--optimizer-states", "8bit")
    assert run(*many) == 0 and run(*many, "--model", "smollm2-135m") == 2
    assert "8bit over 64 shards would cut a block of 256 elements; wanted --replicas 4 or 8" in capsys.readouterr().err


def test_a_run_that_saves_needs_the_hosts_memory(tmp_path, capsys):
    path = tmp_path / "found.json"
    held = state_bytes(MODELS["llama-7b"], Setting(shards=4))
    state = held.weights + held.master + held.states
    flags = ("--gpus", 8, "--replicas", 2, "--json", path)
    assert run(*flags) == 0
    assert "On the host" not in capsys.readouterr().out and strict_json(path)["memory_bytes"]["host_copy"] == 0
    assert run(*flags, "--save-every", 100, "--offload-optimizer") == 0
    found, out = strict_json(path), " ".join(capsys.readouterr().out.split())
    assert "CRIA_OPTIMIZER=cpu" in out
    used = found["memory_bytes"]
    assert state <= used["host_copy"] < 1.3 * state
    assert found["host_bytes_of_a_machine"] == 8 * used["host"] + 4 * used["host_copy"]  # one replica's are saved
    assert f"{used['host_copy'] / 1e9:.2f} GB a card for the copy of a state that is saved; " in out
    assert f"{found['host_bytes_of_a_machine'] / 1e9:.2f} GB in a machine" in out
    assert run("--gpus", 16, "--replicas", 1, "--save-every", "epoch", "--json", path) == 0
    found = strict_json(path)
    assert found["host_bytes_of_a_machine"] == 8 * found["memory_bytes"]["host_copy"] > 0
