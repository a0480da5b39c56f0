"""The command line: `python -m clients vad FILE.wav …`, `… bench`, `… sessions list`, `… show`, `… drop`."""

import asyncio
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import numpy as np
from tqdm import tqdm

from clients import http
from clients.audio import read_wav
from clients.client import Client, connect
from clients.vad import speech_intervals, timeline
from serve_app.errors import InvalidInput, LockstepError
from serve_app.spec import ModelSpec

address_option = click.option(
    "--address",
    default="ws://127.0.0.1:8000",
    show_default=True,
    help="ws://host:port, or the name of a Serve application (Ray has to be reachable).",
)
model_option = click.option("--model", help="Which model, where the application has several.")


@click.group()
def main() -> None:
    """Clients of a running Lockstep application."""


@main.command()
@address_option
@model_option
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def vad(address: str, model: str | None, files: tuple[Path, ...]) -> None:
    """Where is speech? One session a file, all at the same time; needs `serve run configs/vad.yaml`."""
    _run(_vad(address, model, files))


@main.command()
@address_option
@model_option
@click.option("--sessions", default=64, show_default=True, type=click.IntRange(1))
@click.option("--timesteps", default=1, show_default=True, type=click.IntRange(1), help="Of a segment.")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
def bench(address: str, model: str | None, sessions: int, timesteps: int, seconds: float) -> None:
    """Random segments, one at a time from each session: segments per second, and their delay."""
    _run(_bench(address, model, sessions, timesteps, seconds))


@main.group()
def sessions() -> None:
    """The sessions of a running application, of all its clients; by an ingress, at ws://host:port."""


@sessions.command("list")
@address_option
@click.option("--after", default="", help="The last id of the list before.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1))
def list_sessions(address: str, after: str, limit: int) -> None:
    """One a line: id, model, replica, epoch; and `resumable`, where its client can come back for it."""
    _run(_list(address, after, limit))


@sessions.command()
@address_option
@click.argument("session")
def show(address: str, session: str) -> None:
    """All that is known of a session; how far it is, if that is the ingress that it came by."""
    _run(_show(address, session))


@sessions.command()
@address_option
@click.argument("names", metavar="SESSION…", nargs=-1, required=True)
def drop(address: str, names: tuple[str, ...]) -> None:
    """End sessions at once, and delete their checkpoints. Their clients hear that they were aborted."""
    _run(_drop(address, names))


@sessions.command()
@address_option
@click.option("--to", help="The replica that is to have them, as `list` says it; else one with room.")
@click.argument("names", metavar="SESSION…", nargs=-1, required=True)
def migrate(address: str, to: str | None, names: tuple[str, ...]) -> None:
    """Have sessions go on at another replica, with their states. Their clients do not notice."""
    _run(_migrate(address, to, names))


async def _list(address: str, after: str, limit: int) -> None:
    answer = await http.call(address, "GET", "/v1/sessions", after=after, limit=str(limit))
    for described in answer.values["sessions"]:
        click.echo(_line(described))


def _line(described: Mapping[str, Any]) -> str:
    where = described["owner"] or "waits to be resumed"
    flags = ["resumable"] if described["resumable"] else []
    return "  ".join([described["session"], described["model"] or "-", where, str(described["epoch"]), *flags])


async def _show(address: str, session: str) -> None:
    answer = await http.call(address, "GET", _path(session))
    for key, value in answer.values.items():
        click.echo(f"{key}: {value}")


async def _drop(address: str, names: tuple[str, ...]) -> None:
    for session in names:
        answer = await http.call(address, "DELETE", _path(session), abort="true")
        click.echo(f"{session}: {answer.values['reason']}")


async def _migrate(address: str, to: str | None, names: tuple[str, ...]) -> None:
    target = {} if to is None else {"to": to}
    for session in names:
        answer = await http.call(address, "POST", f"{_path(session)}/migrate", **target)
        click.echo(f"{session}: leaves {answer.values['owner']}")


def _path(session: str) -> str:
    return f"/v1/sessions/{quote(session, safe='')}"


async def _vad(address: str, model: str | None, files: tuple[Path, ...]) -> None:
    async with connect(address) as client:
        results = await asyncio.gather(*(_listen(client, model, path) for path in files))
    for path, probabilities, timestep_s in results:
        intervals = speech_intervals(probabilities, timestep_s)
        click.echo(f"{path}  {timeline(intervals, len(probabilities) * timestep_s)}")
        for interval in intervals:
            click.echo(f"  {interval.start_s:8.2f} … {interval.end_s:.2f} s")


async def _listen(client: Client, model: str | None, path: Path) -> tuple[Path, list[float], float]:
    """The speech probability of each timestep of a file, and the length of one in seconds."""
    samples, rate = read_wav(path)
    async with await client.open(model=model) as session:
        due = session.spec.sample_rate
        if due != rate:
            raise InvalidInput(f"{path} has {rate} samples a second, model {session.spec.name!r} takes {due}")
        probabilities: list[float] = []
        for part in np.array_split(samples, max(1, len(samples) // rate)):  # about a second each
            await session.wait(session.submit(part))
            if (outputs := session.read()) is not None:
                probabilities += outputs.values["probability"].tolist()
        await session.close()
        if (outputs := session.read()) is not None:
            probabilities += outputs.values["probability"].tolist()
        return path, probabilities, session.spec.input.shape[0] / rate


async def _bench(address: str, model: str | None, num_sessions: int, timesteps: int, seconds: float) -> None:
    async with connect(address) as client:
        sessions = await asyncio.gather(*(client.open(model=model) for _ in range(num_sessions)))
        x = _noise(sessions[0].spec, timesteps)
        delays_s: list[float] = []
        began = time.monotonic()
        with tqdm(unit=" segments") as bar:

            async def send(i: int) -> None:
                for _ in itertools.takewhile(lambda _: time.monotonic() - began < seconds, itertools.count()):
                    at = time.monotonic()
                    await sessions[i].wait(sessions[i].submit(x))
                    delays_s.append(time.monotonic() - at)
                    sessions[i].read()
                    bar.update()

            await asyncio.gather(*(send(i) for i in range(num_sessions)))
        took_s = time.monotonic() - began
        await asyncio.gather(*(session.close() for session in sessions))
    p50, p99 = np.percentile(delays_s, [50, 99]) * 1e3
    click.echo(
        f"{num_sessions} sessions, {timesteps} timesteps a segment: {len(delays_s) / took_s:,.0f} segments/s, "
        f"delay p50 {p50:.1f} ms, p99 {p99:.1f} ms"
    )


def _noise(spec: ModelSpec, timesteps: int) -> np.ndarray:
    """A segment of the model's shape; for audio, as many samples as make that many timesteps."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.5, 0.5, (timesteps, *spec.input.shape)).astype(spec.input.dtype)
    return noise if spec.sample_rate is None else noise.ravel()


def _run(work: object) -> None:
    """Run a command; an error of Lockstep's ends it with its message instead of a traceback."""
    try:
        asyncio.run(work)  # type: ignore[arg-type]
    except LockstepError as error:
        raise click.ClickException(error.message) from error


if __name__ == "__main__":
    main()
