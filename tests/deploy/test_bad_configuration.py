"""What an operator can get wrong ends with one line and a non-zero exit, before weights are read.

Each case runs the command as a process. Weights are never touched: all cases but that of the
unreadable folder name the embedded model, and end in less time than torch takes to import.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels._build import Compiler, KernelBuildError, find_library
from tests.deploy.confinement import close_folder, without_overrides
from tests.deploy.dockerfile_stages import ROOT

needs_nvcc = pytest.mark.skipif(Compiler.find() is None, reason="without nvcc nothing is written")


def run(arguments: tuple[str | Path, ...], **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RTPURBO_")}
    return subprocess.run(
        without_overrides([sys.executable, "-m", "server.cli", *map(str, arguments)]),
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env=inherited | variables,
    )


def refusal(*arguments: str | Path, code: int = 1, **variables: str) -> str:
    """The one line that the command prints before it ends."""
    done = run(arguments, **variables)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""  # settings are printed once all of them are known to be good
    assert done.stderr.startswith("rtpurbo: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_missing_secret_file(tmp_path: Path) -> None:
    line = refusal("serve", RTPURBO_API_KEY_FILE=str(tmp_path / "api_key"))
    assert f"api_key_file: cannot read {tmp_path / 'api_key'}: No such file" in line


def test_a_secret_file_of_somebody_else(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "api_key").write_text("key\n")
    close_folder(folder)
    line = refusal("serve", "--api-key-file", folder / "api_key")
    assert "api_key" in line
    assert "Permission denied" in line


def test_an_empty_secret_file_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "api_key").write_text("\n")
    assert "holds no key" in refusal("serve", RTPURBO_API_KEY_FILE=str(tmp_path / "api_key"))


def test_an_empty_key_is_no_key() -> None:
    """It matched every request without a key, and let the server listen on all addresses."""
    assert "api_key" in refusal("serve", RTPURBO_API_KEY="", RTPURBO_HOST="0.0.0.0")


@pytest.mark.parametrize("command", ["serve", "convert", "inspect", "health"])
def test_an_unknown_flag(command: str) -> None:
    assert "No such option: --frobnicate" in refusal(command, "--frobnicate", code=2)


def test_a_misspelt_variable() -> None:
    line = refusal("serve", RTPURBO_PROT="8001")
    assert "RTPURBO_PROT is not a setting of rtpurbo" in line


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"RTPURBO_PORT": "tcp://10.0.0.1:80"}, "port"),
        ({"RTPURBO_MAX_NUM_SEQS": "0"}, "max_num_seqs"),
        ({"RTPURBO_ATTENTION": "flash"}, "attention"),
    ],
    ids=["port", "max_num_seqs", "attention"],
)
def test_a_variable_with_an_impossible_value(variables: dict[str, str], name: str) -> None:
    assert refusal("serve", code=1, **variables).startswith(f"rtpurbo: {name}")


def test_a_flag_wins_over_a_variable(tmp_path: Path) -> None:
    line = refusal("serve", "--api-key-file", tmp_path / "flag", RTPURBO_API_KEY_FILE="/variable")
    assert f"{tmp_path / 'flag'}" in line


def test_a_port_in_use(taken_port: int) -> None:
    line = refusal("serve", RTPURBO_PORT=str(taken_port))
    assert f"cannot listen on 127.0.0.1:{taken_port}: Address already in use" in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_no_key_on_a_public_address(host: str) -> None:
    line = refusal("serve", "--host", host, "--port", "0")
    assert f"listening on {host} without an API key" in line


def test_a_model_folder_that_is_not_there(tmp_path: Path) -> None:
    line = refusal("serve", "--port", "0", RTPURBO_MODEL=str(tmp_path / "model"))
    assert f"{tmp_path / 'model'}: no such folder" in line


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder with another one inside, closed to the command."""
    (tmp_path / "closed/inside").mkdir(parents=True)
    close_folder(tmp_path / "closed")
    return tmp_path / "closed"


@pytest.mark.parametrize("inside", [".", "inside"])
def test_a_model_folder_that_this_user_may_not_read(closed: Path, inside: str) -> None:
    line = refusal("serve", "--port", "0", RTPURBO_MODEL=str(closed / inside))
    assert str(closed) in line
    assert "this user may not re" in line  # read it, or reach it


@pytest.mark.parametrize("command", ["serve", "inspect"])
def test_an_argument_that_this_user_may_not_read(closed: Path, command: str) -> None:
    assert f"path '{closed}' is not readable" in refusal(command, closed, code=2)


@needs_nvcc
def test_a_kernel_cache_in_a_closed_folder(closed: Path) -> None:
    cache = closed / "inside/new"
    line = refusal("build-kernels", "--kernel-cache", cache, "--targets", "90")
    assert str(cache) in line
    assert "Permission denied" in line


@needs_nvcc
def test_a_kernel_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file/kernels"
    line = refusal("build-kernels", "--kernel-cache", cache, "--targets", "90")
    assert f"cannot build kernels in {cache}: Not a directory" in line


def test_a_kernel_cache_on_a_read_only_system() -> None:
    with pytest.raises(KernelBuildError, match="/proc/kernels"):
        find_library(Path("/proc/kernels"), ["90"], Compiler("nvcc", "13.0"))
