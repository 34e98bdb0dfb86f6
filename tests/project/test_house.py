"""The house rules that a machine can check: who imports whom, what a command is, docstrings, types and sizes."""

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "engine", "data_gen")  # what is installed; a file at the top of each is a command
LAYERS = {  # a package may import those before it in its line; "|": neither of two neighbours imports the other
    "kernels": "base , native < ops < compiled < measure",
    "engine": "base , model < distributed | formats < text | output < data | inference < planning , serving "
    "< comparing | training",
    "data_gen": "base < api < rows < page < judging",
}
BELOW = {"kernels": (), "engine": ("kernels",), "data_gen": (), "scripts": ("kernels", "engine", "data_gen")}
NEVER = {  # beyond the order of the layers
    "engine.data": ("engine.output", "engine.distributed"),
    "engine.inference": ("engine.output", "engine.distributed"),
    "engine.text": ("engine.distributed",),
    "engine.output": ("engine.distributed",),
    "engine.planning": ("engine.distributed",),
    "engine.serving": ("engine.distributed",),
    "engine.comparing": ("engine.distributed",),
}
BESIDE = {"engine.comparing": ("data_gen.base", "data_gen.judging")}  # votes and annotations are the judge's files
MAY_IMPORT_DISTRIBUTED = ("engine.distributed", "engine.training", "engine.finetune")
MAY_IMPORT_TORCH_DISTRIBUTED = ("engine.distributed",)


# ---- the source, parsed ---------------------------------------------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """Return every module of the project's folders by its dotted name."""
    found = {}
    for folder in BELOW:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """Return the parsed file."""
    return ast.parse(path.read_text())


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules a module imports, wherever the statement stands: in a function or under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(tree(modules()[module])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in modules() else str(node.module))
    return frozenset(names)


def package_of(module: str) -> str:
    """Return the package of a module, engine.base, or the command itself, engine.finetune."""
    return ".".join(module.split(".")[:2])


def is_ours(module: str) -> bool:
    return module.split(".")[0] in BELOW


def commands(folder: str) -> dict[str, Path]:
    """Return the files at the top of a folder by their dotted names."""
    return {f"{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}


ALL_COMMANDS = sorted(name for folder in FOLDERS for name in commands(folder))


# ---- who imports whom -----------------------------------------------------------------------------------------------


def allowed(folder: str) -> dict[str, set[str]]:
    """Return the packages of its own folder that each package of a line of LAYERS may import."""
    rules: dict[str, set[str]] = {}
    for layer in LAYERS[folder].split("<"):
        below, beside = set(rules), layer.replace(",", "|").split("|")
        for name in (part.strip() for part in beside):
            rules[f"{folder}.{name}"] = set(below)
            if "," in layer:
                below.add(f"{folder}.{name}")
    return {package: names - set(NEVER.get(package, ())) for package, names in rules.items()}


def may_cross(module: str, name: str) -> bool:
    """Return whether a module may import one of another folder."""
    below = name.split(".")[0] in BELOW[module.split(".")[0]]
    return below or package_of(name) in BESIDE.get(package_of(module), ())


RULES = {package: rule for folder in LAYERS for package, rule in allowed(folder).items()}


@pytest.mark.parametrize("package", RULES)
def test_a_package_imports_only_what_lies_below_it(package):
    folder = package.split(".")[0]
    wrong = []
    for module in modules():
        if package_of(module) == package:
            for name in filter(is_ours, imports(module)):
                own_folder = name.split(".")[0] == folder
                if own_folder and package_of(name) not in RULES[package] | {package}:
                    wrong.append(f"{module} imports {name}")
                if not own_folder and not may_cross(module, name):
                    wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", BELOW)
def test_folders_import_one_way(folder):
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if module.split(".")[0] == folder
        for name in filter(is_ours, imports(module))
        if name.split(".")[0] != folder and not may_cross(module, name)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_is_in_the_table():
    packages = {f"{folder}.{path.parent.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*/__init__.py")}
    assert packages <= set(RULES), f"not in LAYERS: {sorted(packages - set(RULES))}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {name for name in imports(module) if name in modules()} - {module} for module in modules()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_only_training_and_finetune_use_several_ranks():
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if module.startswith("engine.") and package_of(module) not in MAY_IMPORT_DISTRIBUTED
        for name in imports(module)
        if package_of(name) == "engine.distributed"
    ]
    assert not wrong, "\n".join(wrong)


def test_only_engine_distributed_imports_torch_distributed():
    wrong = [
        module
        for module, path in modules().items()
        if module.split(".")[0] in FOLDERS and package_of(module) not in MAY_IMPORT_TORCH_DISTRIBUTED
        if "torch.distributed" in path.read_text() and uses_torch_distributed(module)
    ]
    assert not wrong, wrong


def uses_torch_distributed(module: str) -> bool:
    named = {ast.unparse(node) for node in ast.walk(tree(modules()[module])) if isinstance(node, ast.Attribute)}
    return any(name.startswith("torch.distributed") for name in named | imports(module))


def test_nothing_needs_transformers_to_run():
    wrong = [
        module
        for module in modules()
        if module.split(".")[0] in FOLDERS and any(name.split(".")[0] == "transformers" for name in imports(module))
    ]
    assert not wrong


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_a_file_at_the_top_is_a_short_command(command):
    path = modules()[command]
    functions = {node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)}
    lines = len(path.read_text().splitlines())
    assert "main" in functions and 'if __name__ == "__main__"' in path.read_text(), f"{command} is not a command"
    assert lines <= 260, f"{command} has {lines} lines: what is not flags and printing belongs to a package"


def test_every_command_ends_quietly_when_its_reader_leaves():
    """Each is called by run_command, run_main or run_for_reader: tests/project/test_closed_output.py."""
    for module, path in modules().items():
        _, starts, call = path.read_text().partition('if __name__ == "__main__":\n')
        named = re.fullmatch(r"    (sys\.exit\()?run_(command|main|for_reader)\((finetune\.)?main\)\)?\n", call)
        assert named or not starts, f"{module} ends with {call!r}"


def test_no_command_is_imported_by_the_packages_or_by_another_command():
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if module.split(".")[0] in FOLDERS
        for name in imports(module)
        if name in ALL_COMMANDS and name != module
    ]
    assert not wrong, "\n".join(wrong)


# ---- docstrings and types -------------------------------------------------------------------------------------------

# A docstring of a function begins with a verb, or an op's with its formula; so never with one of these.
NO_VERBS = """
a after all also an and any as at auto because before both but by each either every for from here how if in into it
its like more most neither no none not nothing of on once one only or other same so such that the their them then
there these they this those to two under until what when where whether which while who whose why with without yes
alone beside
"""


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Yield (dotted name inside the file, function, is it nested in another function) for every def of a file."""

    def walk(node: ast.AST, prefix: str, nested: bool):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child, nested
                yield from walk(child, f"{prefix}{child.name}.", True)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.", nested)
            else:
                yield from walk(child, prefix, nested)

    yield from walk(tree(path), "", False)


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is compiled by Triton, where annotations mean something else."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize(
    "folder",
    [
        "kernels",
        "engine",
        "data_gen",
        "scripts",
        "tests/helpers",
    ],
)
def test_a_docstring_of_a_function_begins_with_a_verb(folder):
    wrong = []
    for path in python_files(folder):
        for name, node, _ in functions(path):
            words = re.findall(r"[\w']+", ast.get_docstring(node) or "")
            if words and words[0].lower() in NO_VERBS.split():
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}: {' '.join(words[:8])}")
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong)


@pytest.mark.parametrize("folder", ["kernels", "engine", "data_gen"])
def test_every_public_function_has_types(folder):
    wrong = []
    for path in python_files(folder):
        for name, node, nested in functions(path):
            if nested or is_kernel(node) or any(part.startswith("_") for part in name.split(".")):
                continue
            spec = node.args
            parameters = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
            untyped = [p.arg for p in parameters if p.annotation is None and p.arg not in ("self", "cls")]
            if node.returns is None:
                untyped.append("return")
            if untyped:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}: {', '.join(untyped)}")
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong)


# ---- sizes: what is over the limit has a reason here ----------------------------------------------------------------

OPERATOR = "torch.library's operators and autograd's functions take tensors and numbers one by one, no dataclass"
ADAMW = "AdamW's hyper-parameters, each a keyword with the name that every optimizer gives it"
LONG_FILES = {
    "kernels/ops/attention.py": "one op, one file: three kernels, and what joins them with RoPE",
}
LONG_TESTS = {  # besides those of one file of code, which lie as it does
    "tests/engine/data/test_row_kinds.py": "every kind of dataset, and what each becomes",
    "tests/engine/distributed/test_ranks.py": "one kind of test: runs of several ranks, and what befalls one of them",
    "tests/engine/serving/test_server.py": "one running server, and what each client of it gets",
    "tests/engine/text/test_tokenizer_elsewhere.py": "the same ids in each program that reads what we write",
    "tests/helpers/model_server.py": "one program: a small model behind OpenAI's API",
    "tests/helpers/openai_server.py": "one program: the server that fails on purpose, started as `python -m` in tests",
    "tests/helpers/task_pool.py": "patterns and vocabularies of a pool of tasks",
    "tests/helpers/test_openai_server.py": "the tests of that one program",
    "tests/project/test_faults.py": "one kind of test: a run that is a process, and what befalls it",
}
LONG_FUNCTIONS = {
    "kernels/ops/linear_cross_entropy.py::_rows_kernel": "a Triton kernel of two loops over the vocabulary",
}
MANY_PARAMETERS = {
    "kernels/ops/adamw.py::adamw_ref": OPERATOR,
    "kernels/ops/adamw.py::adamw_native": OPERATOR,
    "kernels/ops/adamw.py::update": OPERATOR,
    "kernels/ops/adamw.py::adamw": ADAMW,
    "kernels/ops/adamw_many.py::update_many": OPERATOR,
    "kernels/ops/adamw_many.py::adamw_many": ADAMW,
    "kernels/ops/attention.py::backward": OPERATOR,
    "kernels/ops/attention.py::_backward_native": OPERATOR,
    "kernels/ops/attention_ref.py::backward_cpu": OPERATOR,
    "kernels/ops/linear_cross_entropy.py::_forward_fake": OPERATOR,
    "kernels/ops/linear_cross_entropy.py::_forward_cpu": OPERATOR,
    "kernels/ops/linear_cross_entropy.py::forward": OPERATOR,
    "kernels/ops/linear_cross_entropy.py::_forward_in_chunks": OPERATOR,
    "kernels/ops/linear_cross_entropy.py::linear_cross_entropy": "an op's public function names what it computes from",
    "kernels/ops/norm_linear.py::_NormLinear.forward": OPERATOR,
    "kernels/ops/norm_linear.py::norm_linear": "an op's public function names what it computes from",
    "kernels/ops/norm_linear.py::_NormLinearRows.forward": OPERATOR,
    "kernels/ops/norm_linear.py::norm_linear_rows": "an op's public function names what it computes from",
    "engine/training/optimizer.py::AdamW.__init__": ADAMW,
}


def test_files_are_under_400_lines_or_have_a_reason():
    long = {str(path.relative_to(ROOT)) for path in modules().values() if len(path.read_text().splitlines()) > 400}
    assert long == set(LONG_FILES)


def test_files_of_tests_are_under_400_lines_or_test_one_file_or_have_a_reason():
    long = {path for path in (ROOT / "tests").rglob("*.py") if len(path.read_text().splitlines()) > 400}
    tested = {path for path in long if (ROOT / find_tested_file(path)).exists()}
    assert {str(path.relative_to(ROOT)) for path in long - tested} == set(LONG_TESTS)


def find_tested_file(path: Path) -> str:
    """Return the file of code that a file of tests lies as: tests/A/B/test_C.py as A/B/C.py."""
    return str(path.relative_to(ROOT / "tests").with_name(path.name.removeprefix("test_")))


def test_functions_are_under_60_lines_or_have_a_reason():
    long = {
        f"{path.relative_to(ROOT)}::{name}"
        for path in modules().values()
        for name, node, _ in functions(path)
        if node.end_lineno - node.lineno + 1 > 60
    }
    assert long == set(LONG_FUNCTIONS)


def test_functions_take_at_most_8_parameters_or_have_a_reason():
    many = set()
    for path in modules().values():
        for name, node, _ in functions(path):
            spec = node.args
            parameters = [p for p in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs) if p.arg not in ("self", "cls")]
            if len(parameters) > 8 and not is_kernel(node):
                many.add(f"{path.relative_to(ROOT)}::{name}")
    assert many == set(MANY_PARAMETERS)
