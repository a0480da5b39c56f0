"""Many sequences on gRPC streams for a long time, with not one error: `python -m bench.soak [--json FILE]`.

The server and the load are those of bench.triton: a 2x256 LSTM, and unmodified perf_analyzer, which ends with an error
when one of its requests does. All numbers of sequences run at once, each in a perf_analyzer of its own. `soak_failed`
is how many requests the server says that it has failed.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from bench.peers.servers import MODEL, lockstep
from bench.report import json_option, save, show_hardware, table
from bench.triton import WINDOWS, analyze


@click.command()
@click.option("--sequences", default=(96, 512), show_default=True, multiple=True, type=click.IntRange(1))
@click.option("--seconds", default=600.0, show_default=True)
@json_option
def main(sequences: tuple[int, ...], seconds: float, json_file: Path | None) -> None:
    """Stream for so many seconds. Fails when a request does."""
    show_hardware()
    with lockstep() as server, ThreadPoolExecutor(len(sequences)) as pool:
        loads = {
            n: pool.submit(
                analyze,
                server,
                ["--concurrency-range", str(n), "--shape", f"x:1,{MODEL['input']}"],
                seconds / WINDOWS,
            )
            for n in sequences
        }
        found = {n: load.result() for n, load in loads.items()}
        answered, failed = server.counts()
    click.echo(table(["sequences", "segments/s", "p50 ms", "p99 ms"], [(n, *load) for n, load in found.items()]))
    figures = {f"soak_per_s_{n}": rate for n, (rate, _, _) in found.items()}
    figures |= {"soak_s": seconds, "soak_answered": answered, "soak_failed": failed}
    click.echo(f"{answered} segments answered, {failed} failed")
    save(figures, json_file)
    if failed:
        raise click.ClickException(f"{failed} segments have failed")


if __name__ == "__main__":
    main()
