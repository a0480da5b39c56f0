"""Many sequences on gRPC streams for a long time, with not one error: `python -m bench.soak [--json FILE]`.

The server and the load are those of bench.triton: a 2x256 LSTM, and unmodified perf_analyzer, which ends with an error
when one of its requests does. All numbers of sequences run at once, each in a perf_analyzer of its own, which begins
anew every minute or so, since it keeps a record of each request. `soak_failed` is how many requests the server says
that it has failed; `soak_early_mib` and `soak_late_mib` the memory of its processes, a third and nine tenths through.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import click

from bench.peers.servers import MODEL, Server, lockstep
from bench.report import json_option, save, show_hardware, table
from bench.triton import analyze

WINDOW_S = 20.0


def stream(server: Server, sequences: int, end: float) -> list[tuple[float, float, float]]:
    """So many sequences until the monotonic clock says `end`; see analyze, of each of its runs."""
    found = []
    while time.monotonic() < end:
        found.append(
            analyze(server, ["--concurrency-range", str(sequences), "--shape", f"x:1,{MODEL['input']}"], WINDOW_S)
        )
    return found


def memory(server: Server, at: float) -> float:
    """MiB of its processes when the monotonic clock says `at`."""
    time.sleep(max(0.0, at - time.monotonic()))
    return server.memory_mib()


@click.command()
@click.option("--sequences", default=(96, 512), show_default=True, multiple=True, type=click.IntRange(1))
@click.option("--seconds", default=600.0, show_default=True)
@json_option
def main(sequences: tuple[int, ...], seconds: float, json_file: Path | None) -> None:
    """Stream for so many seconds at least. Fails when a request does."""
    show_hardware()
    with lockstep() as server, ThreadPoolExecutor(len(sequences) + 2) as pool:
        began = time.monotonic()
        loads = {n: pool.submit(stream, server, n, began + seconds) for n in sequences}
        early, late = (pool.submit(memory, server, began + part * seconds) for part in (1 / 3, 0.9))
        found = {n: load.result() for n, load in loads.items()}
        lasted = time.monotonic() - began
        answered, failed = server.counts()
    medians = {n: [median(figure) for figure in zip(*runs, strict=True)] for n, runs in found.items()}
    click.echo(table(["sequences", "segments/s", "p50 ms", "p99 ms"], [(n, *each) for n, each in medians.items()]))
    figures = {f"soak_per_s_{n}": rate for n, (rate, _, _) in medians.items()}
    figures |= {"soak_s": lasted, "soak_answered": answered, "soak_failed": failed}
    figures |= {"soak_early_mib": early.result(), "soak_late_mib": late.result()}
    click.echo(f"{answered} segments answered, {failed} failed")
    click.echo("memory: {soak_early_mib:,.0f} MiB a third through, {soak_late_mib:,.0f} near the end".format(**figures))
    save(figures, json_file)
    if failed:
        raise click.ClickException(f"{failed} segments have failed")


if __name__ == "__main__":
    main()
