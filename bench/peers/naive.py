"""The naive application of bench.naive behind the Open Inference Protocol: a call for each message."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import numpy as np
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from bench.naive import caller, deployment, tuned
from bench.peers.servers import MODEL
from serve_app.ingress.protos import oip_pb2 as pb

NAME = "rnn"


class Ingress:
    """What perf_analyzer calls."""

    def __init__(self, naive: Any) -> None:
        self._naive = naive
        self._caller: Any = None
        self._answered = 0

    async def ServerMetadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """It has statistics."""
        return pb.ServerMetadataResponse(name="naive", extensions=["statistics"])

    async def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Once the model has its states: a request that waits for them would be measured."""
        await self._naive.ready.remote()
        return pb.ModelReadyResponse(ready=True)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Inputs x [T, input], outputs y [T, hidden]."""
        tensor = pb.ModelMetadataResponse.TensorMetadata
        x, y = (
            tensor(name=name, datatype="FP32", shape=[-1, MODEL[size]])
            for name, size in (("x", "input"), ("y", "hidden"))
        )
        return pb.ModelMetadataResponse(name=NAME, versions=["1"], inputs=[x], outputs=[y])

    async def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """A model with sequences."""
        response = pb.ModelConfigResponse()
        response.config.name = NAME
        response.config.sequence_batching.SetInParent()
        response.config.input.add(name="x", data_type=pb.TYPE_FP32, dims=[-1, MODEL["input"]])
        response.config.output.add(name="y", data_type=pb.TYPE_FP32, dims=[-1, MODEL["hidden"]])
        return response

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """How many were answered."""
        response = pb.ModelStatisticsResponse()
        model = response.model_stats.add(name=NAME, version="1", inference_count=self._answered)
        for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            getattr(model.inference_stats, name).count = self._answered
        return response

    async def ModelStreamInfer(
        self, stream: AsyncIterator[pb.ModelInferRequest]
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """One request after the other."""
        if self._caller is None:
            self._caller = caller(serve.get_replica_context().app_name, tuned(plain=False))
        prefix = uuid4().hex
        async for request in stream:
            session = f"{prefix}-{request.parameters['sequence_id'].int64_param}"
            x = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(request.inputs[0].shape)
            y: np.ndarray = await self._caller.remote(session, x)
            if request.parameters["sequence_end"].bool_param:
                await self._caller.close.remote(session)
            self._answered += 1
            response = pb.ModelStreamInferResponse()
            response.infer_response.id = request.id
            response.infer_response.model_name = NAME
            response.infer_response.outputs.add(name="y", datatype="FP32", shape=y.shape)
            response.infer_response.raw_output_contents.append(y.tobytes())
            yield response


def build(args: dict[str, Any]) -> Application:
    """The application, with the settings that bench.naive has found."""
    ingress = serve.deployment(
        name="Ingress",
        max_ongoing_requests=10_000,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=LoggingConfig(enable_access_log=False),
        ray_actor_options={"num_cpus": 0.5},
    )(Ingress)
    application: Application = ingress.bind(deployment(tuned(plain=False)))
    return application
