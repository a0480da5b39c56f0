"""Frames between a sender and an owner, over gRPC straight to the replica's own port.

One call, `Frame`, carries a frame there and its answer back, in bytes of serve_app.wire. A call through Ray takes
longer: it puts what is larger than 100 KB into the object store, and changes threads several times on either side.
Ray's own helpers make the port and the channel, so who may call is who has Ray's token, over TLS where Ray uses it.
They are no public interface: the version of Ray is pinned.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from ray._common.network_utils import build_address  # type: ignore[attr-defined]
from ray._common.tls_utils import add_port_to_grpc_server
from ray._private.grpc_utils import create_grpc_server_with_interceptors, init_grpc_channel

from serve_app.errors import LockstepError, StateLost
from serve_app.frame import Answer, Frame
from serve_app.wire import decode_frame, decode_reply, encode_frame, encode_reply

SERVICE, METHOD = "lockstep.Owner", "Frame"
ANSWER_WITHIN_S = 60.0
"""A live owner answers within a second or the time of a step; later than this it counts as gone."""
STOP_WITHIN_S = 1.0
PROBE_S = 0.5
OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # frames are cut where they are made
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a channel of a replica that is gone would be found again otherwise
]


async def is_listening(address: str) -> bool:
    """Whether the process may live that was to be reached there: False only when its machine says that it does not."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), PROBE_S)
    except ConnectionRefusedError:
        return False
    except (OSError, TimeoutError):
        return True
    writer.close()
    return True


class FrameServer:
    """The port of one owner; `answer` is what takes the frames."""

    def __init__(self, answer: Callable[[Frame], Awaitable[Answer]]) -> None:
        self._answer = answer
        self._server: Any = create_grpc_server_with_interceptors(options=OPTIONS, asynchronous=True)
        handler = grpc.unary_unary_rpc_method_handler(self._frame, decode_frame, encode_reply)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))

    async def start(self, host: str) -> str:
        """Take calls from now on, at a free port; returns the address."""
        port = add_port_to_grpc_server(self._server, build_address(host, 0))  # type: ignore[no-untyped-call]
        await self._server.start()
        address: str = build_address(host, port)
        return address

    async def stop(self) -> None:
        """Let the calls that are open be answered, take no more."""
        await self._server.stop(STOP_WITHIN_S)

    async def _frame(self, frame: Frame, context: object) -> Answer | LockstepError:
        try:
            return await self._answer(frame)
        except LockstepError as error:
            return error


class FrameChannel:
    """See ingress.outbox.Channel; `address` is what the owner's FrameServer has returned."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel: Any = init_grpc_channel(address, OPTIONS, asynchronous=True)
        self._call = self._channel.unary_unary(f"/{SERVICE}/{METHOD}", encode_frame, decode_reply)

    async def call(self, frame: Frame) -> Answer:
        """See Channel."""
        try:
            reply: Answer | LockstepError = await self._call(frame, timeout=ANSWER_WITHIN_S)
        except grpc.aio.AioRpcError as error:
            raise StateLost(
                f"the replica at {self._address} is gone, and its sessions with it ({error.code().name}: "
                f"{error.details()})"
            ) from error
        if isinstance(reply, LockstepError):
            raise reply
        return reply

    async def close(self) -> None:
        """See Channel."""
        await self._channel.close()
