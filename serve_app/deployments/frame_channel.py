"""Frames between a sender and an owner: calls to a port of the replica, in bytes of serve_app.wire."""

from collections.abc import Awaitable, Callable

from serve_app.deployments.messages import CallChannel, CallServer, Codec
from serve_app.errors import StateLost
from serve_app.frame import Answer, Frame
from serve_app.wire import decode_frame, decode_reply, encode_frame, encode_reply

FRAMES = Codec(encode_frame, decode_frame, encode_reply, decode_reply)


def frame_server(answer: Callable[[Frame], Awaitable[Answer]]) -> CallServer[Frame, Answer]:
    """The port of one owner; `answer` is what takes the frames."""
    return CallServer(FRAMES, answer)


class FrameChannel(CallChannel[Frame, Answer]):
    """See ingress.outbox.Channel; `address` is what the owner's server has returned."""

    def __init__(self, address: str) -> None:
        super().__init__(FRAMES, address)
        self._owner_address = address

    async def call(self, frame: Frame) -> Answer:
        """See Channel."""
        try:
            return await super().call(frame)
        except OSError as error:
            raise StateLost(
                f"the replica at {self._owner_address} is gone, and its sessions with it ({error!r})"
            ) from error
