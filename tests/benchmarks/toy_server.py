"""`rtpurbo` with the toy engine behind it: `python -m tests.benchmarks.toy_server serve MODEL`.

MODEL lends its tokenizer; the toy knows token ids below 89.
"""

from __future__ import annotations

from functools import partial

import server.runner
from engine.child import EngineChild
from server.cli import main

if __name__ == "__main__":
    server.runner.run_server = partial(
        server.runner.run_server,
        launch=partial(EngineChild.launch, module="tests.benchmarks.toy_engine"),
    )
    main()
