"""The arrows between packages: who may import whom, checked from source.

The command line is the composition root: `server/cli.py` names the subcommands, each of which has
a file in `server/commands/` that may import every package. In return these files import other
packages inside functions only, so that `--help` is quick, and only `server/cli.py` imports them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "engine", "kernels", "conversion", "benchmarks", "docker")
ALLOWED = {
    "server": {"server", "engine"},
    "engine": {"engine", "kernels"},
    "kernels": {"kernels"},
    "conversion": {"conversion", "engine", "kernels"},
    "benchmarks": {"benchmarks", "server", "engine", "kernels", "conversion"},
    "docker": {"docker"},  # the Grafana boards, which are no part of the installed package
}
COMPOSITION_ROOT = "server/cli.py"
COMMANDS = "server/commands"


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module is not None:
                yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_along_the_arrows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        if path.is_relative_to(ROOT / COMMANDS):
            continue
        for module in imported_modules(path):
            top = module.split(".")[0]
            assert top not in PACKAGES or top in ALLOWED[package], f"{path} imports {module}"


def test_commands_import_other_packages_only_when_they_run() -> None:
    """An import at the top of one command would be paid by all of them, and by `--help`."""
    files = sorted((ROOT / COMMANDS).glob("*.py"))
    assert files
    for path in files:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                top, *rest = (node.module or "").split(".")
                assert top not in PACKAGES or rest[:1] == ["commands"], f"{path}: {node.module}"


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_composition_root_imports_commands(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        if path == ROOT / COMPOSITION_ROOT or path.is_relative_to(ROOT / COMMANDS):
            continue
        for module in imported_modules(path):
            assert not module.startswith("server.commands"), f"{path} imports {module}"


def test_help_loads_none_of_the_heavy_libraries() -> None:
    """What `rtpurbo --help` waits for is Typer alone."""
    heavy = "{'torch', 'transformers', 'fastapi', 'uvicorn', 'pydantic', 'numpy'}"
    code = f"import server.cli, sys; sys.exit(str({heavy} & set(sys.modules) or '') or None)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_conversion_uses_only_the_model_side_of_the_engine() -> None:
    """Conversion must not pull in the scheduler, the processes or the wire."""
    allowed = ("engine.model", "engine.errors", "engine.tokenizer", "engine.embedded")
    for path in sorted((ROOT / "conversion").rglob("*.py")):
        for module in imported_modules(path):
            if module.split(".")[0] == "engine":
                assert module.startswith(allowed), f"{path} imports {module}"


def test_the_front_end_never_loads_torch() -> None:
    """The HTTP process starts fast and small because only the engine process holds torch."""
    code = "import server.app, engine.process, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_transformers_does_not_take_our_kernels_for_the_hub_package() -> None:
    """Hugging Face ships a distribution called `kernels`, which transformers looks for."""
    code = (
        "import kernels, transformers\n"
        "from transformers import Qwen3ForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "assert kernels.__version__ == '0.0.0'\n"
        "assert not is_kernels_available()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
