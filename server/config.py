"""Settings of the server: flags first, then RTPURBO_* environment, read here and nowhere else.

Frozen once made. A key is never a flag, since process lists show those.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.config import AttentionMode, EngineConfig, KernelMode
from engine.embedded import EMBEDDED_MODEL_NAME
from engine.errors import ConfigError
from engine.log_lines import LogFormat, default_format
from engine.model.kv_bytes import IndexDtype
from engine.supervision import SupervisionPolicy
from server.key_file import KeyFile, read_keys

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class ServerConfig(BaseSettings):
    """Everything the front end needs, and the engine's own settings beside it."""

    model_config = SettingsConfigDict(
        env_prefix="RTPURBO_", frozen=True, extra="forbid", protected_namespaces=()
    )

    model: Path  # folder to serve
    model_name: str = ""  # in answers and metrics; empty: the folder's name
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0 takes a free one
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None  # environment only
    api_key_file: Path | None = None  # one key a line; read again on change; wins over api_key
    allow_unauthenticated: bool = False  # listen on other than loopback without a key
    open_metrics: bool = False  # answer /metrics without a key, for a scraper that can send none

    max_body_bytes: Count = 16 * 2**20  # a prompt of 1M tokens needs it
    max_held_body_bytes: Count = 256 * 2**20  # of all calls in flight together, without small ones
    max_header_bytes: Count = 32 * 2**10
    max_headers: Count = 100
    max_connections: Count = 1024  # health and metrics may have a few more
    max_connections_per_client: Annotated[int, Field(ge=0)] = 0  # of one address; 0 is no limit
    header_seconds: Seconds = 10.0  # to receive a request's head
    body_seconds: Seconds = 30.0  # to receive its body
    job_seconds: Seconds = 60.0  # to parse or tokenise one request
    idle_seconds: Seconds = 60.0  # keep-alive between requests
    keep_alive_seconds: Seconds = 5.0  # longest silence of a stream
    slow_reader_seconds: Seconds = 60.0  # a stream whose reader takes nothing for so long is ended
    max_unread_bytes: Count = 4 * 2**20  # output that a stream's reader may leave waiting
    max_request_seconds: Seconds = 3600.0  # deadline of a request that names none, and the most
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0  # for running requests after SIGTERM
    stall_seconds: Seconds = 60.0  # without an engine step, readiness is denied
    hang_seconds: Seconds = 120.0  # without a sign of the engine: it is killed and started again
    max_engine_restarts: Annotated[int, Field(ge=0)] = 5  # within the window; then the server ends
    engine_restart_window_seconds: Seconds = 600.0
    max_queued_requests: Count = 256  # that wait for their first computation
    # Prompt tokens that wait to be computed; None: 2^20, or four of the longest prompts if that is
    # more. A call that finds none before it, or of at most max_batch_tokens, is taken in any case.
    max_queued_prefill_tokens: Count | None = None
    max_prompts: Count = 128  # in one call
    max_choices: Count = 128  # prompts times n in one call

    attention: AttentionMode = "sparse"
    prefill_attention: AttentionMode = "dense"  # of retrieval heads
    device: str = "auto"
    dtype: str = "auto"
    index_dtype: IndexDtype = "auto"
    kernels: KernelMode = "auto"
    kernel_cache: Path | None = None
    cuda_graphs: bool = True
    max_model_len: Annotated[int, Field(ge=2)] | None = None  # tokens
    max_num_seqs: Count = 32
    max_batch_tokens: Count = 2048  # tokens of one engine step
    # Milliseconds of a step in which others wait for tokens: chunks are cut by measured times.
    # None: 100 on a GPU, ten tokens a second beside a prompt of any length, faster than one reads;
    # 400 on a CPU, where 100 would make the prompt four times as slow (benchmarks/fairness.py). Its
    # price is what a step takes before its first token, out of each such time; one that runs alone
    # pays nothing. 0: no aim, chunks are as long as max_batch_tokens lets them be.
    max_step_ms: Annotated[float, Field(ge=0)] | None = None
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+[^\s?#]*$")] | None = (
        None  # traces go to its /v1/traces by OTLP over HTTP; None: no tracing
    )
    log_format: Literal["auto", "json", "text"] = "auto"  # auto: text on a terminal, else JSON
    prefix_caching: bool = True
    cache_generated: bool = False
    threads: Count | None = None

    @classmethod
    def resolve(cls, flags: dict[str, Any], default_model: Path) -> ServerConfig:
        """Settings of one run: `flags` that were given, then the environment, then defaults.

        Raises:
            ConfigError: one line that names the setting.
        """
        _refuse_unknown_environment(cls.model_fields)
        try:
            config = (
                cls(**flags) if "model" in flags else cls(**_with_default(flags, default_model))
            )
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = first["loc"][0] if first["loc"] else "settings"
            raise ConfigError(f"{name}: {first['msg']}") from None
        if not config.model_name:
            folder = config.model.resolve()
            name = EMBEDDED_MODEL_NAME if folder == default_model.resolve() else folder.name
            config = config.model_copy(update={"model_name": name})
        config.engine()  # its own checks
        if not config.keys() and not config.is_loopback and not config.allow_unauthenticated:
            raise ConfigError(
                f"host: listening on {config.host} without an API key lets anyone use this server; "
                "set api_key_file, or allow_unauthenticated"
            )
        return config

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def log_lines(self) -> LogFormat:
        """How both processes write their log."""
        return default_format() if self.log_format == "auto" else self.log_format

    def keys(self) -> tuple[str, ...]:
        """API keys; none means that none is asked for.

        Raises:
            ConfigError: the file cannot be read or holds no key.
        """
        if self.api_key_file is not None:
            return read_keys(self.api_key_file)
        return (self.api_key.get_secret_value(),) if self.api_key is not None else ()

    def key_source(self) -> Callable[[], tuple[str, ...]]:
        """What gives the keys that are valid at any moment; a file is read again when it changes.

        Raises:
            ConfigError: the file cannot be read or holds no key.
        """
        if self.api_key_file is not None:
            return KeyFile(self.api_key_file).keys
        keys = self.keys()
        return lambda: keys

    def engine(self) -> EngineConfig:
        """The engine's settings.

        Raises:
            ConfigError: names the setting.
        """
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError("dtype must be auto, float32 or bfloat16")
        gib = self.kv_cache_gib
        return msgspec.convert(
            {
                "model": str(self.model),
                "attention": self.attention,
                "prefill_attention": self.prefill_attention,
                "device": self.device,
                "dtype": self.dtype,
                "index_dtype": self.index_dtype,
                "kernels": self.kernels,
                "cuda_graphs": self.cuda_graphs,
                "kernel_cache": None if self.kernel_cache is None else str(self.kernel_cache),
                "max_model_len": self.max_model_len,
                "max_num_seqs": self.max_num_seqs,
                "max_batch_tokens": self.max_batch_tokens,
                "max_step_ms": "auto" if self.max_step_ms is None else self.max_step_ms or None,
                "kv_cache_bytes": None if gib is None else int(gib * 2**30),
                "prefix_caching": self.prefix_caching,
                "cache_generated": self.cache_generated,
                "threads": self.threads,
                "log_format": self.log_lines,
            },
            EngineConfig,
        )

    def supervision(self) -> SupervisionPolicy:
        """When the engine counts as lost, and how often it may be."""
        return SupervisionPolicy(
            silence_seconds=self.hang_seconds,
            max_restarts=self.max_engine_restarts,
            restart_window=self.engine_restart_window_seconds,
        )

    def describe(self) -> str:
        """Every setting on a line of its own; secrets are not shown."""
        values = self.model_dump(mode="json")
        return "\n".join(f"{name:>22}  {value}" for name, value in values.items())


def _refuse_unknown_environment(fields: Iterable[str]) -> None:
    """A misspelt variable would leave its setting at the default, unnoticed.

    Raises:
        ConfigError: names the variable.
    """
    known = {f"RTPURBO_{name.upper()}" for name in fields}
    for name in sorted(os.environ):
        if name.upper().startswith("RTPURBO_") and name.upper() not in known:
            raise ConfigError(f"environment: {name} is not a setting of rtpurbo")


def _with_default(flags: dict[str, Any], default_model: Path) -> dict[str, Any]:
    """The flags, with the default model unless the environment names one."""
    if "RTPURBO_MODEL" in os.environ:
        return flags
    return {**flags, "model": default_model}
