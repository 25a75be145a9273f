"""What the service must not have: read from its sources and from what is installed."""

from __future__ import annotations

import ast
import re
import shutil
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.embedded import embedded_model_path
from engine.errors import CheckpointError
from engine.model.checkpoint import preflight
from server.chat_template import ChatTemplate
from server.errors import ApiError

ROOT = Path(__file__).resolve().parent.parent
SERVICE = ("server", "engine", "kernels")  # conversion reads back a training state of its own
COMMANDS = ROOT / "server" / "commands"  # run by an operator, not by requests
UNPICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
HTTP_CLIENTS = {"httpx", "requests", "aiohttp", "urllib3", "urllib.request", "http.client"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in SERVICE:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def imports(tree: ast.Module) -> set[str]:
    """Modules that a file imports anywhere, with the packages that they lie in."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.update({node.module, *(f"{node.module}.{a.name}" for a in node.names)})
    return found | {name.split(".")[0] for name in found}


def calls(tree: ast.Module) -> set[str]:
    """Names that are called: `eval`, `torch.load`, `body.form`."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_v11_v30_v31_nothing_unpickles_or_evaluates() -> None:
    seen = 0
    for path, tree in sources():
        seen += 1
        assert not imports(tree) & UNPICKLERS, path
        assert not calls(tree) & {"eval", "exec", "torch.load", "__import__"}, path
        keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
        assert "trust_remote_code" not in keywords, path
    assert seen > 100


def test_the_search_would_find_them() -> None:
    tree = ast.parse("import pickle\nfrom urllib import request\nx = torch.load(f)\neval('1')")
    assert "pickle" in imports(tree)
    assert "urllib.request" in imports(tree)
    assert {"torch.load", "eval"} <= calls(tree)


def test_v27_v28_the_service_fetches_nothing() -> None:
    for path, tree in sources():
        if not path.is_relative_to(COMMANDS):
            assert not imports(tree) & HTTP_CLIENTS, path


def test_v17_v18_no_files_and_no_forms() -> None:
    for path, tree in sources():
        names = {name.rpartition(".")[2] for name in imports(tree) | calls(tree)}
        assert not names & {"FileResponse", "StaticFiles", "form", "Form", "UploadFile"}, path


FLOORS = {"starlette": (1, 3, 1), "h11": (0, 16), "torch": (2, 6), "jinja2": (3, 1)}


@pytest.mark.parametrize("name", FLOORS)
def test_v16_v17_v18_v19_v30_versions_have_a_floor(name: str) -> None:
    """Installed, and asked for where the package is installed by others."""
    installed = tuple(int(part) for part in re.findall(r"\d+", version(name))[:3])
    assert installed >= FLOORS[name]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [line for line in project["dependencies"] if re.split(r"[<>=\[]", line)[0] == name]
    lowest = tuple(int(part) for part in re.findall(r"\d+", wanted.partition(">=")[2])[:3])
    assert lowest >= FLOORS[name][: len(lowest)]


def test_v30_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(embedded_model_path() / name, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights"):
        preflight(tmp_path)


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.keys() }}",
    "code": "{{ messages.append.__self__.__init__.__globals__ }}",
    "change": "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
    "format": "{{ '{0.__class__.__base__}'.format(messages) }}",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_v32_a_template_cannot_leave_its_sandbox(escape: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    tokenizer: Any = SimpleNamespace(chat_template=ESCAPES[escape], special_token=lambda name: None)
    with pytest.raises(ApiError):
        ChatTemplate(tokenizer).render(messages)
    assert messages == [{"role": "user", "content": "a"}]


def test_v43_the_readme_names_the_oldest_safe_toolkit() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = re.search(r"NVIDIA Container Toolkit (\d+)\.(\d+)\.(\d+) or newer", text)
    assert found is not None
    assert tuple(map(int, found.groups())) >= (1, 19, 1)
