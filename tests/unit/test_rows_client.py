"""Requests to stateless models by the Python client, over real gRPC."""

import numpy as np
import pytest

from clients.rows import RowsClient
from serve_app.errors import InvalidInput, Unavailable, UnknownModel
from tests.stateless import LocalModels
from tests.unit.test_oip_grpc import at_port

pytestmark = pytest.mark.asyncio


async def test_rows_in_and_outputs_out_by_name() -> None:
    async with LocalModels.of() as models, at_port(batched=models) as (_, port, _):
        client = RowsClient(f"grpc://127.0.0.1:{port}")
        found = await client.infer("masked", {"ids": np.array([[1, 2, 3], [4, 5, 6]])})
        assert found["total"].tolist() == [6, 15]
        assert found["sums"].tolist() == [[1, 3, 6], [4, 9, 15]]
        with pytest.raises(InvalidInput, match="id 1000 is out of range"):
            await client.infer("masked", {"ids": np.array([[1000]])})
        with pytest.raises(UnknownModel, match="other"):
            await client.infer("other", {"ids": np.array([[1]])})
        await client.stop()


async def test_texts_are_bytes() -> None:
    async with LocalModels.of("Words") as models, at_port(batched=models) as (_, port, _):
        client = RowsClient(f"grpc://127.0.0.1:{port}")
        texts = np.array([b"four", "fünf!".encode()], object)
        assert (await client.infer("words", {"text": texts}))["count"].tolist() == [4, 6]
        await client.stop()


async def test_what_is_no_address_and_who_does_not_answer() -> None:
    for address in ("localhost:8001", "http://localhost:8001", "grpc://"):
        with pytest.raises(InvalidInput, match="is no address, expected one like grpc://host:8001"):
            RowsClient(address)
    client = RowsClient("grpc://127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"no answer from grpc://127\.0\.0\.1:1"):
        await client.infer("masked", {"ids": np.array([[1]])})
    await client.stop()
