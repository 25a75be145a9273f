"""The `rtpurbo` command: the composition root.

One file of `server.commands` per subcommand; only those files may import every package, and they
do so when a command runs, so that `--help` is quick and the front end never loads torch. Nothing in
them does more than turn flags into a settings object and hand it on.
"""

from __future__ import annotations

import sys

import typer

from server.commands.ablate import ablate
from server.commands.bench import bench_attention, bench_serving
from server.commands.bench_endurance import bench_chaos, bench_soak
from server.commands.build_kernels import build_kernels
from server.commands.convert import convert
from server.commands.evaluate import evaluate
from server.commands.failure import misused
from server.commands.health import health
from server.commands.inspect import inspect
from server.commands.report import report
from server.commands.serve import serve

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a full-attention language model into a sparse one, and serve it over HTTP.",
)
app.command()(serve)
app.command()(health)
app.command()(convert)
app.command("eval")(evaluate)
app.command()(ablate)
app.command()(report)
app.command()(inspect)
app.command("build-kernels")(build_kernels)

bench_app = typer.Typer(no_args_is_help=True, help="Measure, and print what the README quotes.")
bench_app.command("attention")(bench_attention)
bench_app.command("serving")(bench_serving)
bench_app.command("chaos")(bench_chaos)
bench_app.command("soak")(bench_soak)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of the console script.

    What Typer finds wrong with a call is one line on stderr, as every other error is, exit code 2.
    """
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 1
    except Exception as error:
        message = getattr(error, "format_message", None)  # Typer does not export the base class
        if message is None:
            raise
        misused(" ".join(message().split()))
    sys.exit(code)


if __name__ == "__main__":
    main()
