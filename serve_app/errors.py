"""Every error that a user can meet, each with its wire code, HTTP status, gRPC code and whether a retry can help.

LockstepError
├── InvalidInput            the segment, frame or message is malformed; nothing was run
│   └── ConfigError         a configuration key or value is wrong
├── UnknownModel            no such model here
├── UnknownSession          no such session, or not any more
├── SessionExists           the session id is taken
├── SessionEnded            the session was closed, expired or failed; details: reason, progress
├── StartMismatch           a segment starts past the timestep expected; details: expected
├── Rewound                 sent before the client knew of a failed step; details: expected, rewind
├── StepFailed              the model failed on a batch with this session in it; details: expected, rewind
├── InferenceFailed         a stateless model failed on this request
├── TimedOut                a session, or a request to a stateless model, has waited too long; nothing was run
├── TooLate                 an answer was not there within the time that the request gives; its timesteps run
├── NotOwner                this replica does not hold the session (any more)
├── StateLost               the replica with the session's state is gone
├── Overloaded              a bound is reached; try again later
│   ├── TooManySessions     no replica takes another session
│   └── WindowFull          too much is sent and not acknowledged in this session
├── RegionExists            the name of a shared memory region is taken
├── UnknownRegion           no such shared memory region
└── Unavailable             the replica is starting, stopping or dead

The edges (HTTP, WebSocket, gRPC) look the codes up here; there is no other table.
"""

import math
from typing import Any, ClassVar


class LockstepError(Exception):
    """Base of all. `details` holds plain values that travel with the message."""

    code: ClassVar[str] = "internal"
    http: ClassVar[int] = 500
    grpc: ClassVar[str] = "INTERNAL"
    retry: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)

    @property
    def retry_after_s(self) -> int:
        """When to try again what can be tried again."""
        return math.ceil(float(self.details.get("retry_after_s", 1)))

    def to_wire(self) -> dict[str, Any]:
        """The error as JSON values; `from_wire` is the inverse."""
        return {"code": self.code, "message": self.message, "retry": self.retry, "details": self.details}


def _rebuild(cls: type[LockstepError], message: str, details: dict[str, Any]) -> LockstepError:
    return cls(message, **details)


class InvalidInput(LockstepError):
    code, http, grpc = "invalid_input", 400, "INVALID_ARGUMENT"


class ConfigError(InvalidInput):
    code = "config"


class UnknownModel(LockstepError):
    code, http, grpc = "unknown_model", 404, "NOT_FOUND"


class UnknownSession(LockstepError):
    code, http, grpc = "unknown_session", 404, "NOT_FOUND"


class SessionExists(LockstepError):
    code, http, grpc = "session_exists", 409, "ALREADY_EXISTS"


class SessionEnded(LockstepError):
    code, http, grpc = "session_ended", 410, "FAILED_PRECONDITION"


class StartMismatch(LockstepError):
    code, http, grpc = "start_mismatch", 409, "FAILED_PRECONDITION"


class Rewound(LockstepError):
    code, http, grpc = "rewound", 409, "ABORTED"


class StepFailed(LockstepError):
    code, http, grpc, retry = "step_failed", 500, "INTERNAL", True


class InferenceFailed(LockstepError):
    code = "inference_failed"


class TimedOut(LockstepError):
    code, http, grpc, retry = "timed_out", 504, "DEADLINE_EXCEEDED", True


class TooLate(LockstepError):
    code, http, grpc = "too_late", 504, "DEADLINE_EXCEEDED"


class NotOwner(LockstepError):
    code, http, grpc, retry = "not_owner", 421, "FAILED_PRECONDITION", True


class StateLost(LockstepError):
    code, http, grpc = "state_lost", 410, "DATA_LOSS"


class Overloaded(LockstepError):
    code, http, grpc, retry = "overloaded", 429, "RESOURCE_EXHAUSTED", True


class TooManySessions(Overloaded):
    code = "too_many_sessions"


class WindowFull(Overloaded):
    code = "window_full"


class RegionExists(LockstepError):
    code, http, grpc = "region_exists", 409, "ALREADY_EXISTS"


class UnknownRegion(LockstepError):
    code, http, grpc = "unknown_region", 404, "NOT_FOUND"


class Unavailable(LockstepError):
    code, http, grpc, retry = "unavailable", 503, "UNAVAILABLE", True


def _all(cls: type[LockstepError]) -> list[type[LockstepError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _all(child))]


_BY_CODE = {cls.code: cls for cls in _all(LockstepError)}


def from_wire(wire: dict[str, Any]) -> LockstepError:
    """The error that `to_wire` described; an unknown code becomes the base class."""
    cls = _BY_CODE.get(wire["code"], LockstepError)
    return cls(wire["message"], **wire.get("details", {}))
