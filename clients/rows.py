"""Requests to stateless models over the Open Inference Protocol."""

from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np

from clients.open_inference import channel_to, error_of
from serve_app.ingress.oip import DATATYPES, DTYPES, write_tensor
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc


class RowsClient:
    """`address` is one like grpc://host:8001; an application's name may follow as a path."""

    def __init__(self, address: str) -> None:
        """Raises InvalidInput for what is no address."""
        self._address = address
        self._channel, self._metadata = channel_to(address)
        self._stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def infer(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs [rows, *shape] by name, for inputs [rows, *shape]; elements of an input of dtype object are bytes.

        Raises what the server refuses it with, Unavailable.
        """
        request = pb.ModelInferRequest(model_name=model)
        for name, x in inputs.items():
            request.inputs.add(name=name, datatype=DATATYPES[x.dtype.name], shape=x.shape)
            request.raw_input_contents.append(write_tensor(x))
        try:
            response = await self._stub.ModelInfer(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self._address) from error
        return {
            output.name: np.frombuffer(raw, DTYPES[output.datatype]).reshape(output.shape)
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }

    async def stop(self) -> None:
        """Close the connection."""
        await self._channel.close()
