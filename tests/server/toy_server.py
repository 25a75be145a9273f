"""The real server process around the toy engine: sockets, supervision and wire are the real ones.

    with toy_server(folder, step_seconds=0.02, policy={"max_restarts": 1}) as server: ...

Only tests can start it: the command line has no way to name another engine.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.server_process import ServerProcess, serving
from engine.embedded import embedded_model_path
from engine.errors import EngineError
from engine.supervision import SupervisionPolicy
from server.config import ServerConfig
from server.runner import run_server
from tests.engine.fake_engine import launch_toy

PROGRAM = ("tests.server.toy_server",)


def toy_server(
    folder: Path,
    *,
    step_seconds: float = 0.0,
    policy: dict[str, Any] | None = None,
    **settings: Any,
) -> AbstractContextManager[ServerProcess]:
    """Serve the toy from `folder`; `settings` are fields of ServerConfig."""
    from tests.server.toy_folder import write_toy_folder  # loads torch, which the server does not

    write_toy_folder(folder, step_seconds)
    options = json.dumps({"policy": policy or {}, "settings": settings})
    return serving(str(folder), options, program=PROGRAM)


def main(folder: str, port: str, options: str) -> int:
    """What `serve` does, with another engine and a policy of the test's."""
    given = json.loads(options)
    flags = {"model": folder, "model_name": "toy", "port": int(port), **given["settings"]}
    try:
        config = ServerConfig.resolve(flags, embedded_model_path())
        return run_server(config, SupervisionPolicy(**given["policy"]), launch_toy)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[3], sys.argv[4]))
