"""Stateless models behind the Open Inference Protocol over gRPC, in one process and without Ray, to be measured.

    python -m bench.bert_server PORT CONFIG

CONFIG: the configuration of an application with stateless models, in JSON. It runs until it is told to end.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping

import grpc

from serve_app.config import load_models
from serve_app.engine.batcher import Batcher, build_batcher
from serve_app.ingress.hub import Hub
from serve_app.ingress.oip import InferenceServer
from serve_app.ingress.oip_grpc import InferenceService
from serve_app.ingress.protos import oip_pb2_grpc
from serve_app.rows import BatchedSpec, RowsRequest, RowsResult
from serve_app.spec import ModelSpec


class Local:
    """The models, in this process (see BatchedModels)."""

    def __init__(self, batchers: Mapping[str, Batcher]) -> None:
        self._batchers = batchers

    def specs(self) -> Mapping[str, BatchedSpec | None]:
        """See BatchedModels."""
        return {name: batcher.spec for name, batcher in self._batchers.items()}

    async def infer(self, model: str, request: RowsRequest) -> RowsResult:
        """See BatchedModels."""
        return await self._batchers[model].infer(request)


class NoSessions(Hub):
    """A hub without a directory: there is no model with sessions."""

    def __init__(self) -> None:
        """Nothing is there to start."""

    async def models(self) -> dict[str, ModelSpec]:
        """See Hub."""
        return {}


async def main(port: str, config: str) -> None:
    """Serve until a signal comes."""
    service = InferenceService()
    batchers = {name: build_batcher(model) for name, model in load_models(json.loads(config)).items()}
    service.inference = InferenceServer(NoSessions(), Local(batchers))
    server = grpc.aio.server()
    oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(grace=None)
    for batcher in batchers.values():
        await batcher.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
