"""The gate of csrc/cuda: what it reads from a library, and that a fault planted in a kernel is told."""

import json
import subprocess

import pytest

from kernels.compiled import cuda_code
from kernels.compiled.cuda_code import (
    CudaFacts,
    CudaKernel,
    find_cuda_differences,
    format_cuda_record,
    judge,
    make_record,
    name_kernel,
    read_kernels,
    save_cuda_records,
)
from kernels.native.toolchain import MissingCompiler, find_nvcc

SPILLS = """
extern "C" __global__ void cria_grad_norm_kernel(const float* x, float* y, int n) {
    float kept[32];
    for (int i = 0; i < 32; i++) kept[i * n % 32] = x[i];  // places that no register has
    for (int i = 0; i < 32; i++) y[i] = kept[i * n % 31];
}
"""


def test_a_stack_and_narrow_accesses_are_told(tmp_path):
    try:
        nvcc = find_nvcc()
    except MissingCompiler as missing:
        pytest.skip(f"reads what nvcc makes: {missing}")
    source, library = tmp_path / "spills.cu", tmp_path / "libspills.so"
    source.write_text(SPILLS)
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-gencode=arch=compute_90a,code=sm_90a", source, "-o", library]
    subprocess.run(command, check=True)
    (kernel,) = read_kernels(library)
    assert kernel.chip == "sm_90" and kernel.facts.stack_bytes >= 128 and kernel.facts.spills >= 32
    assert kernel.facts.warps == 8 and kernel.facts.registers <= 255  # 256 threads a block
    assert make_record(kernel)["blocks_per_sm"] == min(8, 4 * (16384 // (-(-kernel.facts.registers // 8) * 256)) // 8)
    stack, wide = judge(kernel)
    assert "stack: 128 bytes" in stack and "wide: no access of 128 bits" in wide
    attention = kernel._replace(name="decode bf16, D = 64")
    assert any("matrix: no HMMA in a loop" in line for line in judge(attention))
    told = "\n".join(judge(kernel._replace(name="hopper_attention D = 64, bf16")))
    assert "matrix: no HGMMA in a loop" in told and "bulk: no UTMALDG, UTMASTG, USETMAXREG" in told

    path, record = tmp_path / "cuda.json", make_record(kernel)
    save_cuda_records(path, [record | {"chip": "sm_80"}, record], "nvcc 13")
    assert json.loads(path.read_text()) == {"compiler": "nvcc 13", "records": [record | {"chip": "sm_80"}, record]}
    assert [line.startswith('{"source": "grad_norm.cu"') for line in path.read_text().splitlines()[2:-1]] == [True] * 2
    assert find_cuda_differences(path, [record], "nvcc 13", ["sm_90"]) == []
    changed = record | {"registers": 1}
    assert len(find_cuda_differences(path, [changed], "nvcc 13", ["sm_90"])) == 2
    assert find_cuda_differences(path, [changed], "nvcc 14", ["sm_90"]) == []  # another compiler's are no difference


def test_names():
    assert name_kernel("_ZN4cria5adamwILi2ELi1EEEvPK") == ("adamw.cu", "adamw split, states bf16")
    assert name_kernel("_ZN4cria6decodeI6__halfLi80EEEvPK") == ("decode_attention.cu", "decode fp16, D = 80")
    hopper = ("hopper_attention.cu", "hopper_attention D = 128, bf16")
    assert name_kernel("_ZN4cria16hopper_attentionI13__nv_bfloat16Li128EEEvNS_7TileMap") == hopper
    assert name_kernel("cria_grad_norm_kernel") == ("grad_norm.cu", "grad_norm_kernel")


FACTS = {
    "registers": 96, "stack_bytes": 0, "shared_bytes": 1024, "warps": 4, "instructions": 500, "spills": 0, "wide": 7,
    "narrow": 2, "matrix": {"HMMA": 8}, "matrix_in_loops": {"HMMA": 4}, "hopper": {"UTMALDG": 1},
}  # fmt: skip


def test_a_kernel_of_csrc_as_its_record_has_it():
    made = make_record(CudaKernel("decode_attention.cu", "decode bf16, D = 64", "sm_90", CudaFacts(**FACTS)))
    assert made == {
        "source": "decode_attention.cu", "kernel": "decode bf16, D = 64", "chip": "sm_90", "instructions": 500,
        "registers": 96, "stack_bytes": 0, "spills": 0, "blocks_per_sm": 5, "matrix": {"HMMA": 8},
        "hopper": {"UTMALDG": 1}, "wide": 7, "narrow": 2,
    }  # fmt: skip
    assert format_cuda_record(made) == (
        "sm_90  csrc/cuda/decode_attention.cu decode bf16, D = 64: 500 instructions, 96 registers, 0 spills, "
        "5 blocks an SM, HMMA, 7 accesses wide of 9"
    )
    assert "no matrix, 7 accesses" in format_cuda_record(made | {"matrix": {}})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("adamw split, states bf16", {}, []), ("decode fp16, D = 64", {}, []),
        ("decode fp32, D = 64", {"matrix_in_loops": {}}, []),
        ("decode bf16, D = 64", {"matrix_in_loops": {"HMMA": 0}}, ["matrix: no HMMA in a loop; wanted some"]),
        ("grad_norm_kernel", {"stack_bytes": 8}, ["stack: 8 bytes, 0 LDL/STL; wanted none"]),
        ("grad_norm_kernel", {"spills": 3}, ["stack: 0 bytes, 3 LDL/STL; wanted none"]),
        ("grad_norm_kernel", {"wide": 0}, ["wide: no access of 128 bits; wanted some"]),
        ("hopper_attention D = 64, bf16", {"matrix_in_loops": {"HGMMA": 2}},
         ["bulk: no UTMASTG, USETMAXREG; wanted some"]),
    ],
)  # fmt: skip
def test_a_rule_is_broken_by_one_fact(name, change, said):
    kernel = CudaKernel("x.cu", name, "sm_80", CudaFacts(**(FACTS | change)))
    assert judge(kernel) == [f"csrc/cuda/x.cu {name} sm_80: {line}" for line in said]


def test_machine_code_is_counted_by_its_opcodes():
    lines = ["LDL R1, [R2]", "STL [R2], R1", "LDG.E.128 R4, [R2]", "STG.E [R2], R4", "HGMMA.64x64 R1",
             "UTMALDG.2D [UR4]",
             "USETMAXREG.ALLOC 8", "NOP", "HMMA.16816 R1, R2", "UTMASTG.2D [UR4]"]  # fmt: skip
    sass = "".join(f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(lines))
    facts = CudaFacts(1, 0, 0, 4)
    cuda_code._count(sass, facts)
    assert (facts.instructions, facts.spills, facts.wide, facts.narrow) == (9, 2, 3, 1)
    assert facts.matrix == {"HGMMA": 1, "HMMA": 1} and facts.matrix_in_loops == {"HGMMA": 0, "HMMA": 0}
    assert facts.hopper == {"UTMALDG": 1, "USETMAXREG": 1, "UTMASTG": 1}


@pytest.mark.parametrize("missing", [None, "library", "nvcc"])
def test_a_library_that_is_not_there_is_not_judged(missing, monkeypatch):
    def fail(error):
        raise error

    good, bad = (CudaKernel("x.cu", "grad_norm_kernel", "sm_90", CudaFacts(**(FACTS | {"spills": n}))) for n in (0, 1))
    asked = []
    monkeypatch.setattr(
        cuda_code, "load_cuda", lambda: fail(cuda_code.NativeError("not built")) if missing == "library" else 1
    )
    monkeypatch.setattr(
        cuda_code.toolchain, "find_nvcc", lambda: fail(MissingCompiler("no nvcc")) if missing else "nvcc"
    )
    monkeypatch.setattr(cuda_code.toolchain, "describe", lambda nvcc: f"{nvcc} 13")
    monkeypatch.setattr(cuda_code, "path_of", lambda name: f"lib{name}")
    monkeypatch.setattr(cuda_code, "read_kernels", lambda *args: asked.append(args) or [good, bad])
    found = cuda_code.judge_library(["sm_90"])
    if missing:
        assert found == ([], [], f"not judged: {'not built' if missing == 'library' else 'no nvcc'}") and not asked
    else:
        assert found == ([make_record(good), make_record(bad)], judge(bad), "nvcc 13") and asked == [
            ("libcuda", ["sm_90"])
        ]
