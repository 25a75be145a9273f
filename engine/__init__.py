"""The engine: scheduler, KV cache, worker and model.

The front end imports only these torch-free modules: `engine.client`, `engine.config`,
`engine.errors`, `engine.messages`, `engine.request`, `engine.tokenizer` and
`engine.model.config`. Everything that touches torch runs in the engine process.
"""
