"""A gRPC port of an ingress that no other process can listen at."""

from collections.abc import Callable, Sequence
from typing import Any

from ray.serve._private import grpc_util

OPTION = "grpc.so_reuseport"


def keep_port() -> None:
    """Let the server that Serve starts in this process have its port alone, or else another; before it starts.

    Serve asks gRPC for that, but as text, which gRPC passes over. Two ingresses that have the same port on one machine,
    of two nodes or of two clusters there, would each get connections that are meant for the other.
    """
    grpc_util.gRPCGenericServer = _Server  # type: ignore[assignment, misc]


class _Server(grpc_util.gRPCGenericServer):
    def __init__(self, handlers: Callable[..., Any], *, extra_options: Sequence[tuple[str, Any]] = ()) -> None:
        options: Any = [(name, int(value) if name == OPTION else value) for name, value in extra_options]
        super().__init__(handlers, extra_options=options)
