"""The experiment of NVIDIA's talk S9422 on a GPU: throughput, and time of a request, against the number of instances.

    python -m bench.s9422 [--json FILE]

Each instance is a session that runs a sequence of 1,000 timesteps in segments of 10, one at a time: the next is sent
when the outputs of the last have arrived. The model is the talk's (see bench.engine_cuda), with the 8 largest outputs.
Sessions send through a few senders, as they would through ingress replicas; a request's time is from the frame that
carries it to the answer, host to host.
"""

import time
from pathlib import Path

import click
import numpy as np
import torch

from bench.engine_cuda import LSTM, THREADS, Group
from bench.report import json_option, save, show_hardware, table
from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig, SessionConfig
from serve_app.engine.engine import Engine
from serve_app.models import registry
from serve_app.models.interface import RecurrentModel

INSTANCES = tuple(2**i for i in range(15))
SEQUENCE, SEGMENT = 1000, 10
WARM_UP = 10  # segments
MAX_BATCH = 2048
MAX_SENDER = 1024  # sessions
SENDERS = 4  # where there are sessions for them
DTYPES = ("fp16", "fp32")
T4 = {  # timesteps per ms by batch size, read off the talk's chart
    "fp16": {1: 1.8, 32: 51.4, 64: 83.8, 128: 116.5, 256: 138.4},
    "fp32": {1: 1.2, 32: 23.0, 64: 27.6, 128: 31.5, 256: 32.9},
}


def run_sequences(model: RecurrentModel, instances: int, device: str) -> tuple[float, np.ndarray]:
    """Seconds for a sequence of each of that many instances, and seconds of each frame of requests."""
    engine = Engine(
        model,
        AppConfig(
            engine=EngineConfig(
                device=device,
                slots=instances,
                max_batch_size=MAX_BATCH,
                step_timesteps=(1, SEGMENT),
                calibration_file="",
                max_pending_bytes=2**32,
                max_retained_bytes=2**34,
            ),
            session=SessionConfig(max_sessions=instances),
            frame=FrameConfig(max_bytes=2**30, answer_within_s=60),
        ),
    )
    num_senders = max(min(SENDERS, instances), instances // MAX_SENDER)
    size = instances // num_senders
    senders = [Group(engine, size, SEGMENT, 1 + i * size) for i in range(num_senders)]
    exchange(engine, senders, WARM_UP)
    began = time.perf_counter()
    delays = exchange(engine, senders, SEQUENCE // SEGMENT)
    return time.perf_counter() - began, delays


@torch.inference_mode()
def exchange(engine: Engine, senders: list[Group], segments: int) -> np.ndarray:
    """Let each sender send that many frames, one at a time; seconds from each frame to its answer."""
    left = dict.fromkeys(senders, segments)
    delays: list[float] = []

    def send(sender: Group) -> None:
        left[sender] -= 1
        frame = sender.next_frame()
        sender.sent_at = time.perf_counter()
        engine.receive(frame, sender, time.monotonic())

    for sender in senders:
        send(sender)
    missing = {sender: sender.num_outputs for sender in senders}
    while any(missing.values()):
        engine.step(time.monotonic())
        for ticket, answer in engine.answers(time.monotonic()):
            assert isinstance(ticket, Group)
            missing[ticket] -= len(next(iter(answer.outputs.values())))
            if missing[ticket]:
                engine.receive(ticket.ask(), ticket, time.monotonic())
                continue
            delays.append(time.perf_counter() - ticket.sent_at)
            if left[ticket]:
                missing[ticket] = ticket.num_outputs
                send(ticket)
    return np.array(delays)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--max-instances", default=max(INSTANCES), show_default=True)
@click.option("--max-fp32", default=max(INSTANCES), show_default=True, help="Instances in fp32, which takes long.")
@json_option
def main(device: str, max_instances: int, max_fp32: int, json_file: Path | None) -> None:
    """Measure throughput and request time against the number of instances."""
    torch.set_num_threads(THREADS)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    show_hardware()
    figures: dict[str, float] = {}
    for dtype in DTYPES:
        model = registry.load(ModelConfig("rnn", {**LSTM, "top_k": 8, "dtype": dtype}))
        rows = []
        limit = min(max_instances, max_fp32) if dtype == "fp32" else max_instances
        for instances in (n for n in INSTANCES if n <= limit):
            seconds, delays = run_sequences(model, instances, device)
            rate = instances * SEQUENCE / seconds / 1e3
            p50, p99 = (float(np.percentile(delays, percent)) * 1e3 for percent in (50, 99))
            setting = f"{dtype}_n{instances}"
            figures |= {f"timesteps_per_ms_{setting}": rate, f"p50_ms_{setting}": p50, f"p99_ms_{setting}": p99}
            rows.append((instances, rate, p50, p99, T4[dtype].get(instances, "")))
        head = ("instances", "timesteps/ms", "p50 ms", "p99 ms", "T4 at that batch")
        click.echo(f"\n{dtype}, segments of {SEGMENT} timesteps\n{table(head, rows)}")
    save(figures, json_file)


if __name__ == "__main__":
    main()
