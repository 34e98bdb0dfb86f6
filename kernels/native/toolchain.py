"""What csrc is compiled with, and the commands that do it. Standard library only: setup.py runs this file too.

    library        from                                        with
    ptx_machine    csrc/ptx/*.cpp                              a C++ compiler
    cpu            csrc/cpu/*.cpp, csrc/cpu/isa/*.cpp          a C++ compiler; isa/ once for each instruction set
    cuda           csrc/cuda/*.cu                              nvcc; machine code of sm_80, sm_90a and sm_100, but of
                                                               the sources in ONLY_ON for the chips named there alone

CXX names a compiler other than g++ or clang++, CXXFLAGS further flags of it, NVCC another nvcc.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# No -march: a library runs on every processor of its kind and chooses among instruction sets when it is loaded.
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
EXACT = "-ffp-contract=off"  # an addition and a multiplication are rounded one by one, as PyTorch and PTX round them
FUSED = "-ffp-contract=fast"  # sums of products, which have no prescribed order
EXACT_SOURCES = ("adamw.cpp", "nf4.cpp")  # of csrc/cpu/isa; all others there are fused
INSTRUCTION_SETS = {  # by processor, in rising order; csrc/cpu/instruction_set.cpp chooses the last that runs here
    "x86_64": {
        "plain": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    }
}
CUDA_CHIPS = ("80", "90a", "100")
ONLY_ON = {"hopper_attention.cu": ("90a",)}  # what uses instructions of one chip
CUDA_FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static")


@dataclass(frozen=True)
class Compilation:
    """One command that makes an object file of one source; the command's output path is still to be added."""

    source: Path
    name: str  # of the object file, without what says its contents
    command: tuple[str, ...]


class MissingCompiler(Exception):
    """There is no compiler for a library. The text says which one was looked for and what to install."""


def find_cxx() -> list[str]:
    """Return the command of the C++ compiler: $CXX, else g++, else clang++. Raises MissingCompiler."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++"]:
        if shutil.which(name):
            return [name]
    raise MissingCompiler(f"{named}: No such file or directory" if named else "no g++ and no clang++; install g++")


def find_nvcc() -> str:
    """Return nvcc: $NVCC, else that of PATH, $CUDA_HOME, /usr/local/cuda or pip's package. Raises MissingCompiler."""
    named = os.environ.get("NVCC")
    if named:
        if not shutil.which(named):
            raise MissingCompiler(f"{named}: No such file or directory")
        return named
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    homes += [str(path) for folder in sys.path for path in Path(folder or ".").glob("nvidia/cu1[3-9]")]
    for place in (None, *(os.path.join(home, "bin") for home in homes if home)):
        found = shutil.which("nvcc", path=place)
        if found:
            return found
    raise MissingCompiler("no nvcc; install CUDA's toolkit (or pip install nvidia-cuda-nvcc)")


def describe(command: str) -> str:
    """Return the line of a compiler's --version that tells its version, or its name if it tells none."""
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if any(character.isdigit() for character in line)]
    told = [line for line in lines if "release" in line] or lines
    return told[0].strip() if done.returncode == 0 and told else command


def list_sources(library: str, csrc: Path) -> list[Path]:
    """Return the sources of a library."""
    pattern = "*.cu" if library == "cuda" else "*.cpp"
    folders = [csrc / ("ptx" if library == "ptx_machine" else library)]
    if library == "cpu":
        folders.append(csrc / "cpu" / "isa")
    return [path for folder in folders for path in sorted(folder.glob(pattern))]


def list_headers(library: str, csrc: Path) -> list[Path]:
    """Return every header of a library. A change of one compiles all its sources anew."""
    folder = csrc / ("ptx" if library == "ptx_machine" else library)
    return sorted(path for ending in ("h", "cuh", "inc") for path in folder.rglob(f"*.{ending}"))


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Return the compiler's flags for each instruction set of this kind of processor, the least one first."""
    return INSTRUCTION_SETS.get(platform.machine().replace("AMD64", "x86_64"), {"plain": ()})


def has_openmp(cxx: list[str], folder: Path) -> bool:
    """Return whether the compiler builds and links OpenMP. Without it the CPU library runs in one thread."""
    source, library = folder / "openmp.cpp", folder / "openmp.so"
    source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
    command = [*cxx, "-fopenmp", "-fPIC", "-shared", str(source), "-o", str(library)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def plan_cxx(library: str, csrc: Path, openmp: bool) -> tuple[list[Compilation], list[str]]:
    """Return the compilations of a C++ library, and the command that links their objects. Raises MissingCompiler."""
    threads = ["-fopenmp"] if library == "cpu" and openmp else []
    cxx = [*find_cxx(), *CXX_FLAGS, *threads, *os.environ.get("CXXFLAGS", "").split()]
    jobs = []
    for source in list_sources(library, csrc):
        is_fused = source.parent.name == "isa" and source.name not in EXACT_SOURCES
        contract = FUSED if is_fused else EXACT
        if source.parent.name != "isa":
            jobs.append(Compilation(source, source.stem, (*cxx, contract, "-c", str(source))))
            continue
        for name, flags in instruction_sets().items():
            command = (*cxx, contract, *flags, f"-DISA={name}", "-c", str(source))
            jobs.append(Compilation(source, f"{source.stem}-{name}", command))
    return jobs, [*cxx, "-shared"]


def plan_cuda(csrc: Path) -> tuple[list[Compilation], list[str]]:
    """Return the compilations of the CUDA library, and the command that links their objects. Raises MissingCompiler."""
    nvcc = find_nvcc()

    def command(chips):
        return (nvcc, *CUDA_FLAGS, *(f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips))

    jobs = [
        Compilation(path, path.stem, (*command(ONLY_ON.get(path.name, CUDA_CHIPS)), "-c", str(path)))
        for path in list_sources("cuda", csrc)
    ]
    return jobs, [*command(CUDA_CHIPS), "-shared"]


def compile_ptx(source: Path, chip: str) -> str:
    """Return the PTX of a .cu file for one of CUDA_CHIPS. Raises MissingCompiler; ValueError if nvcc refuses it."""
    flags = [flag for flag in CUDA_FLAGS if flag not in ("-cudart", "static")]
    command = [find_nvcc(), *flags, "-lineinfo", "-ptx", f"-arch=sm_{chip}", str(source), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"nvcc does not compile {source.name} for sm_{chip}:\n{done.stderr}")
    return done.stdout
