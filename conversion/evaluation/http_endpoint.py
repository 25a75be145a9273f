"""Any OpenAI-compatible server as a subject: greedy completions over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import httpx
from tokenizers import Tokenizer

from conversion.errors import ConversionError
from conversion.evaluation.samples import PromptSample, Sample, continued_ids, reference_score

BUSY = frozenset({429, 503})  # the server asks to come again
BUSY_TRIES = 8
LONGEST_WAIT = 30.0  # seconds between two tries


class HttpEndpoint:
    """Asks /v1/completions. A code question is part of the prompt; its answer must come first."""

    def __init__(
        self,
        name: str,
        url: str,
        tokenizer: Tokenizer,
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            url: of the server, with or without /v1.
            tokenizer: counts the tokens of exact answers.
            model: name to ask for; None: the first one the server lists.
            concurrency: requests at once.
            timeout: seconds for one request.
            transport: replaces the network in tests.
        """
        self.name = name
        self.attended_fraction: float | None = None
        """Of the context, mean over the answers of the newest `scores`; None: the server does not
        say, as only this project's does, or nothing was selected."""
        self._fractions: list[float] = []
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._tokenizer = tokenizer
        self._model = model
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._concurrency = concurrency
        self._timeout = timeout
        self._transport = transport

    def scores(
        self, samples: Sequence[Sample], advance: Callable[[], None] = lambda: None
    ) -> list[tuple[float, ...]]:
        """Scores per sample, one per question.

        Raises:
            ConversionError: the server cannot be reached, refuses, or answers something else.
        """
        self._fractions = []
        results = asyncio.run(self._scores(samples, advance))
        self.attended_fraction = fmean(self._fractions) if self._fractions else None
        return results

    async def _scores(
        self, samples: Sequence[Sample], advance: Callable[[], None]
    ) -> list[tuple[float, ...]]:
        slots = asyncio.Semaphore(self._concurrency)
        client = httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout, transport=self._transport
        )

        async def score(sample: Sample) -> tuple[float, ...]:
            scores = [
                await self._ask(client, slots, *question) for question in self._questions(sample)
            ]
            advance()
            return tuple(scores)

        async with client:
            if self._model is None:
                self._model = await self._first_model(client)
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(score(sample)) for sample in samples]
            except* ConversionError as errors:
                first: BaseException = errors
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                failure = str(first)
            else:
                return [task.result() for task in tasks]
        raise ConversionError(failure)

    def _questions(self, sample: Sample) -> list[tuple[str, int, Callable[[str], float]]]:
        """Prompt, tokens to generate and how to score them."""
        if isinstance(sample, PromptSample):
            references = sample.references
            return [
                (
                    sample.prompt,
                    sample.generated_tokens,
                    lambda text: reference_score(text, references),
                )
            ]
        return [
            (
                sample.text + question.text,
                len(continued_ids(self._tokenizer, question.answer)),
                lambda text, answer=question.answer: float(text.startswith(answer)),  # type: ignore[misc]
            )
            for question in sample.questions
        ]

    async def _ask(
        self,
        client: httpx.AsyncClient,
        slots: asyncio.Semaphore,
        prompt: str,
        tokens: int,
        score: Callable[[str], float],
    ) -> float:
        body = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        async with slots:
            answer = await self._request(client, "POST", "completions", body)
        try:
            found = score(str(answer["choices"][0]["text"]))
        except (KeyError, IndexError, TypeError):
            raise ConversionError(f"{self._url}/completions: the answer has no text") from None

        self._fractions += _attended(answer)
        return found

    async def _first_model(self, client: httpx.AsyncClient) -> str:
        answer = await self._request(client, "GET", "models", None)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ConversionError(f"{self._url}/models: no model is listed") from None

    async def _request(
        self, client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None
    ) -> Any:
        """The JSON of a successful answer; waits while the server is busy."""
        url = f"{self._url}/{path}"
        for attempt in range(BUSY_TRIES):
            try:
                response = await client.request(method, url, json=body)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                reason = str(error) or type(error).__name__
                raise ConversionError(f"{url}: {reason}".splitlines()[0]) from None
            if response.status_code not in BUSY or attempt == BUSY_TRIES - 1:
                break
            await asyncio.sleep(_wait(response, attempt))
        if response.status_code != 200:
            raise ConversionError(f"{url}: status {response.status_code}, {_message(response)}")
        try:
            return response.json()
        except ValueError:
            raise ConversionError(f"{url}: the answer is not JSON") from None


def _attended(answer: dict[str, Any]) -> list[float]:
    """The share that this project's server says, at most one; others' `metrics` are their own."""
    metrics = answer.get("metrics")
    fraction = metrics.get("attended_fraction") if isinstance(metrics, dict) else None
    return [float(fraction)] if isinstance(fraction, int | float) else []


def _wait(response: httpx.Response, attempt: int) -> float:
    """Seconds to wait: as the server says, else doubling from half a second."""
    asked = response.headers.get("retry-after", "")
    return min(float(asked) if asked.isdigit() else 0.5 * 2**attempt, LONGEST_WAIT)


def _message(response: httpx.Response) -> str:
    """The server's own words on one line."""
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(text.split())[:200] or "no message"
