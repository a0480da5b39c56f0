"""One session alone, by gRPC, a timestep at a time: what the way there and back takes, `python -m bench.alone`.

A plain gRPC client, on one stream, sends a timestep when the last is answered, to the application of bench.triton: at
the ingress's own port, behind HAProxy, and behind Serve's proxy, each in turn, several times. Of each answer's delay at
the client is taken off what the engine says that it took (`queue_us`, `compute_us`); `alone_over_engine_ms_…` is the
median of what is left.
"""

import asyncio
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

import click
import grpc
import numpy as np

from bench.peers.servers import MODEL, Server, lockstep
from bench.report import json_option, save, show_hardware, table
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc

Way = Literal["own", "haproxy", "proxy"]
WAYS: tuple[Way, ...] = ("own", "haproxy", "proxy")
WARM_UP = 200
"""Timesteps that do not count."""


async def delays(server: Server, timesteps: int) -> list[tuple[float, float]]:
    """Of each timestep, in ms: from request to answer, and of that in the engine."""
    rng = np.random.default_rng(0)
    took: list[tuple[float, float]] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.ModelStreamInfer()
        for at in range(WARM_UP + timesteps):
            request = pb.ModelInferRequest(model_name=server.model)
            request.inputs.add(name="x", datatype="FP32", shape=(1, MODEL["input"]))
            request.raw_input_contents.append(rng.standard_normal((1, MODEL["input"]), np.float32).tobytes())
            request.parameters["sequence_id"].int64_param = 1
            request.parameters["sequence_start"].bool_param = at == 0
            began = time.perf_counter()
            await call.write(request)
            answer = await call.read()
            whole_s = time.perf_counter() - began
            if answer.error_message:
                raise RuntimeError(answer.error_message)
            engine_us = sum(answer.infer_response.parameters[name].int64_param for name in ("queue_us", "compute_us"))
            took.append((1e3 * whole_s, engine_us / 1e3))
    return took[WARM_UP:]


@click.command()
@click.option("--timesteps", default=2000, show_default=True, type=click.IntRange(1))
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
@json_option
def main(timesteps: int, runs: int, json_file: Path | None) -> None:
    """Measure the delay of a session that is alone."""
    show_hardware()
    found: dict[Way, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for way in WAYS * runs:
        with lockstep(way) as server:
            found[way] += asyncio.run(delays(server, timesteps))
    figures: dict[str, float] = {}
    rows = []
    for name, took in found.items():
        whole, engine = (median(each) for each in zip(*took, strict=True))
        over = median(a - b for a, b in took)
        rows.append((name, whole, engine, over))
        figures |= {
            f"alone_p50_ms_{name}": whole,
            f"alone_engine_ms_{name}": engine,
            f"alone_over_engine_ms_{name}": over,
        }
    click.echo(table(("way in", "p50 ms", "in the engine", "over it"), rows))
    save(figures, json_file)


if __name__ == "__main__":
    main()
