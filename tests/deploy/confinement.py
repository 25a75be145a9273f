"""Commands as another user, or as root without root's right to read and write everything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

IS_ROOT = os.getuid() == 0


def as_user(uid: int, command: list[str]) -> list[str]:
    """`command` as a numbered user with no capability; as it is where we are not root.

    An interpreter that lies in root's home could not be reached by that user: it may then read
    everything. Writing is never allowed by it.
    """
    if not IS_ROOT:
        return command
    ids = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--no-new-privs"]
    plain = ["setpriv", *ids, "--bounding-set", "-all", "--inh-caps", "-all"]
    again = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    if subprocess.run([*plain, sys.executable, "-c", again], capture_output=True).returncode == 0:
        return [*plain, *command]
    read = "+dac_read_search"
    capabilities = ["--bounding-set", f"-all,{read}", "--inh-caps", f"-all,{read}"]
    return ["setpriv", *ids, *capabilities, "--ambient-caps", f"-all,{read}", *command]


def without_overrides(command: list[str]) -> list[str]:
    """`command` such that file modes count for it, whoever we are."""
    if not IS_ROOT:
        return command
    dropped = "-dac_override,-dac_read_search"
    return ["setpriv", "--bounding-set", dropped, "--inh-caps", "-all", *command]


def close_folder(folder: Path) -> None:
    """Make a folder that `without_overrides` cannot enter, and that pytest can still remove."""
    folder.chmod(0o700 if IS_ROOT else 0o000)
    if IS_ROOT:
        os.chown(folder, 12345, 12345)


def on_read_only_root(writable: Path, command: list[str]) -> list[str] | None:
    """`command` where nothing but a small tmpfs at `writable` can be written to; None if it cannot.

    It needs root and mount namespaces, which a container may lack.
    """
    if not IS_ROOT or shutil.which("unshare") is None:
        return None
    script = (
        "mount --bind / / && mount -o remount,ro,bind / && "
        'mount -t tmpfs -o size=256m,mode=1777,noexec,nosuid,nodev tmpfs "$0" && exec "$@"'
    )
    prefix = ["unshare", "--mount", "sh", "-ec", script, str(writable)]
    tried = subprocess.run([*prefix, "true"], capture_output=True)
    return [*prefix, *command] if tried.returncode == 0 else None
