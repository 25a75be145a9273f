"""Small pieces of PromQL over the server's series, narrowed to the chosen models and instances."""

from __future__ import annotations

CHOSEN = 'model_name=~"$model",instance=~"$instance"'
OF_CLIENTS = "!~/metrics|/health/.*"  # routes, without those of scrapers and probes
PROCESS = 'job=~"(.*/)?rtpurbo",instance=~"$instance"'  # series of the scrape and of the process
WINDOW = "$__rate_interval"


def series(name: str, **labels: str) -> str:
    """All series of `rtpurbo_<name>` that the reader has chosen, and whose labels match.

    A value is compared as it is; after `~` or `!~` it is a regular expression to match or not.
    """
    matchers = "".join(f",{label}{_comparison(value)}" for label, value in labels.items())
    return f"rtpurbo_{name}{{{CHOSEN}{matchers}}}"


def _comparison(value: str) -> str:
    for sign in ("!~", "~"):
        if value.startswith(sign):
            return f'{sign if sign == "!~" else "=~"}"{value.removeprefix(sign)}"'
    return f'="{value}"'


def total(name: str, *by: str, **labels: str) -> str:
    """A gauge, summed over what is not named in `by`."""
    return f"sum{_by(*by)}({series(name, **labels)})"


def rate(name: str, *by: str, **labels: str) -> str:
    """Growth of a counter per second."""
    return f"sum{_by(*by)}(rate({series(name, **labels)}[{WINDOW}]))"


def increase(name: str, *by: str, **labels: str) -> str:
    """Growth of a counter within the window that one point stands for."""
    return f"sum{_by(*by)}(increase({series(name, **labels)}[{WINDOW}]))"


def quantile(share: float, name: str, *by: str, **labels: str) -> str:
    """A quantile of a histogram over all chosen instances."""
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', 'le', *by, **labels)})"


def saved() -> str:
    """Share of the bytes of dense decoding that were not read, the cost of selection included."""
    read = f"({rate('kv_bytes_read_total')} + {rate('index_bytes_read_total')})"
    return f"1 - {read} / {rate('kv_bytes_read_dense_total')}"


def attended_share() -> str:
    """Attended tokens over context, of the steps that were computed within the window."""
    return f"{rate('decode_attended_tokens_total')} / {rate('decode_context_tokens_total')}"


def mean(name: str, *by: str, **labels: str) -> str:
    """The mean of a histogram's observations."""
    counted = rate(f"{name}_count", *by, **labels)
    return f"{rate(f'{name}_sum', *by, **labels)} / {counted}"


def heat(name: str, **labels: str) -> str:
    """Observations per bucket, as a heat map wants them."""
    return increase(f"{name}_bucket", "le", **labels)


def _by(*labels: str) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""
