"""The shape of the repository: who may import whom, how long things may get, and what must not lie where."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("models", "data", "recipes", "train", "eval")
MAY_IMPORT = {
    "models": set(),
    "data": set(),
    "recipes": {"models", "data"},
    "train": {"models", "data", "recipes"},
    "eval": {"models", "data", "recipes"},
}
FENCED = {
    "deepspeed": {"train"},
    "wandb": {"train"},
    "yaml": {"recipes", "data"},
    "easy_vqa": {"data"},
    "lmms_eval": {"eval"},
    "gradio": {"eval"},
}
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path):
    """Returns (top-level package, whole name, whether relative) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.module or "", node.level > 0


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_the_rule(path):
    folder = path.relative_to(ROOT).parts[0]
    for top, name, relative in imports(path):
        if relative:
            assert folder == "models", f"{path}: relative imports are for models/, whose files ship with a release"
        elif top in FOLDERS and top != folder:
            assert top in MAY_IMPORT[folder], f"{path} imports {name}"
            if folder == "recipes":
                assert name in ("models.stage_plan", "data.config", "data.strict_yaml"), (
                    f"{path} imports {name}: a schema reads configs alone"
                )
        assert folder in FENCED.get(top, {folder}), f"{path} imports {top}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_screen(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 600
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = [line for line in ast.unparse(node).splitlines() if line.strip()]
            docstring = len((ast.get_docstring(node) or "").splitlines())
            assert len(body) - docstring <= 55, f"{path}: {node.name}"


def test_models_knows_no_rank_and_no_device():
    for path in (ROOT / "models").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for word in ("torch.distributed", "os.environ", ".cuda(", "import yaml", "LOCAL_RANK"):
            assert word not in source, f"{path}: {word}"


def test_every_folder_is_a_package_and_tests_is_not():
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").is_file()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_module_of_train_hides_an_installed_package():
    names = {path.stem for path in (ROOT / "train").glob("*.py")} - {"__init__"}
    search = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "train")]
    hidden = [name for name in names if importlib.machinery.PathFinder.find_spec(name, search)]
    assert not hidden


def test_ignored_patterns_hide_none_of_our_code():
    paths = [str(path.relative_to(ROOT)) for path in MODULES]
    found = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout == ""
