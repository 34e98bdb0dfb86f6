"""The gate of csrc/cuda: what it reads from a library, and that a fault planted in a kernel is told."""

import json
import subprocess

import pytest

from kernels.compiled.cuda_code import (
    find_cuda_differences,
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
