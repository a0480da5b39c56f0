"""Two servers that Serve starts at the same gRPC port: of the second it hears that the port is taken."""

import asyncio
from unittest.mock import Mock

import pytest
from ray.serve._private import grpc_util
from ray.serve.config import gRPCOptions

from cluster.local import free_port
from serve_app.deployments.own_port import keep_port


async def test_two_ingresses_of_one_machine_do_not_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_util, "gRPCGenericServer", grpc_util.gRPCGenericServer)  # put back afterwards
    keep_port()
    options = gRPCOptions(port=free_port())
    loop = asyncio.get_running_loop()
    task, server = await grpc_util.start_grpc_server(Mock(), options, event_loop=loop, enable_so_reuseport=False)
    try:
        with pytest.raises(RuntimeError, match="Failed to bind"):
            await grpc_util.start_grpc_server(Mock(), options, event_loop=loop, enable_so_reuseport=False)
    finally:
        await server.stop(0)
        await task
