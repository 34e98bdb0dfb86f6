"""Who may import whom. A folder may import itself, and what is named here; nothing else of ours."""

import ast
from pathlib import Path

MAY_IMPORT = {
    "kernels": set(),
    "engine": {"kernels"},
    "data_gen": set(),  # speaks to engine through a JSONL file, never by import
    "scripts": {"engine", "kernels", "data_gen"},
}
ROOT = Path(__file__).parents[2]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder, allowed in MAY_IMPORT.items()
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
        if name in MAY_IMPORT and name not in allowed | {folder}
    ]
    assert not wrong, "\n".join(wrong)


def test_config_imports_nothing_of_ours():
    assert not set(imports(ROOT / "engine" / "config.py")) & set(MAY_IMPORT)


def test_nothing_needs_transformers_to_run():
    wrong = [
        str(path.relative_to(ROOT))
        for folder in ("kernels", "engine", "data_gen")
        for path in (ROOT / folder).rglob("*.py")
        if "transformers" in set(imports(path))
    ]
    assert not wrong
