"""The engine side of the service in one thread, under a simulated clock, from one seed.

Everything between an admitted request and its last token is the real code: `EngineProcess`,
`Generation`, the wire format, `EngineCore`, `Scheduler`, `KvPools`. Simulated are what makes runs
differ: time (`loop`), the process and its sockets (`child`), the model (`toy_model`) and clients
(`client`). A seed becomes a `scenario`, a run of it a `history`; `checker` says what is wrong.

    python -m tests.simulation 4711 -v                        # one seed again, with its history
    python -m pytest tests/simulation --simulation-seeds 100000
"""
