"""Requests to stateless models over the Open Inference Protocol."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np

from clients.open_inference import error_of
from serve_app.errors import InvalidInput
from serve_app.ingress.oip import DATATYPES, DTYPES, write_tensor
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc


class RowsClient:
    """`address` is one like grpc://host:8001; an application's name may follow as a path."""

    def __init__(self, address: str) -> None:
        """Raises InvalidInput for what is no address."""
        parts = urlsplit(address)
        if parts.scheme != "grpc" or not parts.netloc:
            raise InvalidInput(f"{address!r} is no address, expected one like grpc://host:8001")
        self._address = address
        app = parts.path.strip("/")
        self._metadata = (("application", app),) if app else ()
        self._channel = grpc.aio.insecure_channel(parts.netloc)
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
