"""The HTTP interface over a whole system in one process: no ports, no Ray."""

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgpack
import numpy as np
import pytest

from serve_app import errors
from serve_app.config import AppConfig, EngineConfig, FrameConfig, SessionConfig
from serve_app.directory import Ask, Claim, Grant
from serve_app.errors import LockstepError, SessionEnded
from serve_app.ingress import outbox
from serve_app.ingress.codec import MSGPACK, read_array
from serve_app.ingress.http import build_http
from serve_app.ingress.hub import Hub
from serve_app.models.interface import RecurrentModel
from serve_app.segment import Run
from tests.fakes import FloatSumModel, SumModel
from tests.local import LocalCluster, Mortal, local

pytestmark = pytest.mark.asyncio

CONFIG = AppConfig(
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8, max_step_timesteps=4),
    session=SessionConfig(max_sessions=64, max_segment_timesteps=64, max_window_timesteps=256),
    frame=FrameConfig(answer_within_s=0.05),
)
ALONE = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, checkpoint_timesteps=0))
"""Sessions that end with their owner."""
PACKED = {"content-type": "application/msgpack"}
RAW = {"content-type": "application/octet-stream"}


class System:
    """A client, and what it talks to."""

    def __init__(self, client: httpx.AsyncClient, cluster: LocalCluster, hub: Hub) -> None:
        self.client, self.cluster, self.hub = client, cluster, hub

    async def call(self, method: str, path: str, expected: int = 200, **arguments: Any) -> dict[str, Any]:
        """The answer's body; fails unless its status is as expected."""
        response = await self.client.request(method, path, **arguments)
        assert response.status_code == expected, response.text
        body: dict[str, Any] = response.json()
        return body

    async def refused(
        self, status: int, code: str, message: str, method: str, path: str, **arguments: Any
    ) -> dict[str, Any]:
        """The details of the error that the call is answered with."""
        response = await self.client.request(method, path, **arguments)
        assert response.status_code == status, response.text
        assert response.headers.get("retry-after") == ("1" if status in (429, 503) else None)
        error = response.json()["error"]
        assert error["code"] == code
        assert re.search(message, error["message"]), error["message"]
        assert error["retry"] == errors.from_wire(error).retry
        assert "Traceback" not in response.text
        details: dict[str, Any] = error["details"]
        return details

    async def open(self, **body: Any) -> dict[str, Any]:
        return await self.call("POST", "/v1/sessions", 201, json=body)

    async def post(self, session: str, x: Any, expected: int = 202, **more: int) -> dict[str, Any]:
        body = {"x": np.asarray(x).tolist(), **more}
        return await self.call("POST", f"/v1/sessions/{session}/segments", expected, json=body)

    async def fetch(self, session: str, start: int, end: int) -> list[Any]:
        """The outputs from start on, up to end."""
        values: list[Any] = []
        while start + len(values) < end:
            path = f"/v1/sessions/{session}/outputs?start={start + len(values)}&wait_s=10"
            values += (await self.call("GET", path))["outputs"]["total"]
        return values


@asynccontextmanager
async def system(*models: RecurrentModel, config: AppConfig = CONFIG) -> AsyncIterator[System]:
    async with local(*(models or (SumModel(),)), config=config, ack_on_receipt=False) as (cluster, hub):
        transport = httpx.ASGITransport(build_http(hub))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20) as client:
            yield System(client, cluster, hub)


@asynccontextmanager
async def bystander(sut: System) -> AsyncIterator[None]:
    """A session beside whatever happens within: all its outputs are what they are alone, to the bit."""
    opened = await sut.open()
    name, spec = opened["session"], opened["input"]
    x = (np.arange(40 * spec["shape"][0]) % 7).reshape(40, -1).astype(spec["dtype"])
    await sut.post(name, x[:20])
    yield
    await sut.post(name, x[20:], start=20)
    assert await sut.fetch(name, 0, 40) == x.cumsum(0).tolist()
    assert (await sut.call("DELETE", f"/v1/sessions/{name}"))["reason"] == "closed"


def ones(n: int) -> list[list[int]]:
    return [[1, 1]] * n


async def test_a_session_from_open_to_close() -> None:
    async with system() as sut:
        opened = await sut.open(session="a")
        assert opened == {
            "session": "a",
            "model": "silero_vad",
            "input": {"shape": [2], "dtype": "int64"},
            "outputs": {"total": {"shape": [2], "dtype": "int64"}},
            "limits": {"max_segment": 64, "max_window": 256, "refuse_nan": True},
            "next": 0,
            "progress": 0,
            "acked": 0,
            "rewind": 0,
        }
        assert (await sut.post("a", ones(3)))["end"] == 3
        assert (await sut.post("a", ones(2), start=3))["next"] == 5
        assert await sut.fetch("a", 0, 5) == [[i, i] for i in range(1, 6)]
        shown = await sut.call("GET", "/v1/sessions/a")
        numbers = {"next": 5, "progress": 5, "acked": shown["acked"], "rewind": 0}
        known = {"model": "silero_vad", "owner": "owner-0", "sender": sut.hub.sender, "resumable": True}
        assert shown == {"session": "a", "epoch": sut.hub.get("a").epoch, **known, **numbers}
        assert await sut.call("DELETE", "/v1/sessions/a?start=5") == {"reason": "closed", **numbers}
        assert await sut.fetch("a", 4, 5) == [[5, 5]]  # until acknowledged
        last = await sut.call("GET", "/v1/sessions/a/outputs?start=5&wait_s=10")
        assert (last["start"], last["end"], last["outputs"], last["ended"]) == (5, 5, {"total": []}, "closed")
        assert last["batch_size"] == 0, "none have come"
        while sut.hub.num_sessions or sut.cluster.engines["owner-0"].gauges()["retained_bytes"]:
            await asyncio.sleep(0.005)
        assert await sut.refused(410, "session_ended", "closed", "GET", "/v1/sessions/a") == {"reason": "closed"}


async def test_sessions_of_all_ways_in_are_listed_and_dropped() -> None:
    async with system() as sut:
        other = Hub(sut.cluster, ack_on_receipt=True)
        theirs = await other.open("b/?")
        for name in ("c", "a", "d"):
            await sut.open(session=name)
        listed = (await sut.call("GET", "/v1/sessions"))["sessions"]
        assert [each["session"] for each in listed] == ["a", "b/?", "c", "d"]
        assert {each["sender"] for each in listed} == {sut.hub.sender, other.sender}
        page = (await sut.call("GET", "/v1/sessions?after=a&limit=2"))["sessions"]
        assert page == listed[1:3]
        await sut.refused(400, "invalid_input", "limit", "GET", "/v1/sessions?limit=0")
        await sut.refused(404, "unknown_session", "'nobody' is not open", "GET", "/v1/sessions/nobody")
        await sut.refused(404, "unknown_session", "'nobody' is not open", "DELETE", "/v1/sessions/nobody?abort=true")
        assert [(await sut.call("GET", "/v1/sessions/c"))[key] for key in ("next", "owner")] == [0, "owner-0"]
        await sut.call("DELETE", "/v1/sessions/c?abort=true")

        path = f"/v1/sessions/{quote(theirs.name, safe='')}"
        theirs.submit(np.array(ones(5)))
        assert await theirs.wait() == 5
        async with bystander(sut):
            assert await sut.call("GET", path) == listed[1]
            await sut.refused(400, "invalid_input", "abort=true", "DELETE", path)
            assert await sut.call("DELETE", path, params={"abort": True}) == {"reason": "aborted"}
            assert await theirs.closed() == "aborted"
            with pytest.raises(SessionEnded):
                theirs.submit(np.array(ones(1)))
        await other.stop()


async def test_a_session_that_is_just_moving_is_not_dropped() -> None:
    async with system() as sut:
        other = Hub(sut.cluster, ack_on_receipt=True)
        theirs = await other.open("b")
        sut.cluster.directory.open("b", "third", claim=Claim(theirs.epoch))  # and its owner has not heard of it yet
        await sut.refused(421, "not_owner", "ask the directory", "DELETE", "/v1/sessions/b?abort=true")
        theirs.submit(np.array(ones(5)))
        assert await theirs.wait() == 5
        await other.stop()


async def test_three_ways_to_write_a_segment_and_two_to_read_outputs() -> None:
    async with system() as sut:
        await sut.open(session="a")
        path, x = "/v1/sessions/a/segments", np.arange(6).reshape(3, 2)
        await sut.call("POST", path, 202, json={"x": x.tolist(), "start": 0})
        await sut.call("POST", path, 202, content=MSGPACK.encode({"x": x, "start": 3}), headers=PACKED)
        await sut.call("POST", path, 202, content=msgpack.packb({"x": x.tobytes()}), headers=PACKED)
        await sut.call("POST", f"{path}?start=9&acked=0", 202, content=x.astype("<i8").tobytes(), headers=RAW)
        expected = np.tile(x, (4, 1)).cumsum(0)
        assert await sut.fetch("a", 0, 12) == expected.tolist()
        accept = {"accept": "application/msgpack"}
        response = await sut.client.get("/v1/sessions/a/outputs?wait_s=10", headers=accept)
        assert response.headers["content-type"] == "application/msgpack"
        body = MSGPACK.decode(response.content).values
        total = read_array(body["outputs"]["total"], "total")
        np.testing.assert_array_equal(total, expected[body["start"] : body["end"]])
        response = await sut.client.get("/v1/sessions/b", headers=accept)
        assert MSGPACK.decode(response.content).values["error"]["code"] == "unknown_session"


BAD_SEGMENTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "feature size": (400, r"shape \[1, 3\] arrived, the model takes \[T, 2\]", {"json": {"x": [[1, 2, 3]]}}),
    "no features": (400, r"shape \[2\] arrived, the model takes \[T, 2\]", {"json": {"x": [1, 2]}}),
    "dtype": (400, r"x\[0\]\[0\] is 1.5, expected a whole number", {"json": {"x": [[1.5, 2]]}}),
    "packed dtype": (
        400,
        "float64 arrived, the model takes int64",
        {"content": MSGPACK.encode({"x": np.ones((1, 2))}), "headers": PACKED},
    ),
    "empty": (400, "an empty segment arrived", {"json": {"x": []}}),
    "too long": (400, "65 timesteps arrived, the limit is 64", {"json": {"x": ones(65)}}),
    "no x": (400, "key 'x' is missing", {"json": {"start": 0}}),
    "ragged": (400, r"x\[1\] has shape \[1\], x\[0\] has \[2\]", {"json": {"x": [[1, 2], [3]]}}),
    "unknown key": (400, "'strat' is not known here: x, start, acked", {"json": {"x": ones(1), "strat": 0}}),
    "start negative": (400, "start is -1, expected a whole", {"json": {"x": ones(1), "start": -1}}),
    "start not a number": (400, "start is '0', expected a whole", {"json": {"x": ones(1), "start": "0"}}),
    "start too high": (409, "starts at 5, 2 was expected: resend from 2", {"json": {"x": ones(1), "start": 5}}),
    "acked too high": (400, "outputs up to timestep 2, 3 was ack", {"json": {"x": ones(1), "acked": 3}}),
    "query": (400, "belong into the body", {"json": {"x": ones(1)}, "params": {"start": 2}}),
    "query not a number": (400, "start: Input should be a valid integer", {"params": {"start": "x"}}),
    "JSON": (400, "not JSON: Expecting", {"content": b'{"x": [[1,'}),
    "no body": (400, "not JSON", {}),
    "msgpack": (400, "not msgpack", {"content": b"\x81\xa1x\xc1", "headers": PACKED}),
    "not a map": (400, "a list, expected a map", {"json": ones(1)}),
    "raw bytes": (400, "body has 7 bytes, not a multiple of a timestep's 16", {"content": b"1234567", "headers": RAW}),
    "content type": (415, "the body is text/csv, expected", {"content": b"1", "headers": {"content-type": "text/csv"}}),
    "too large": (413, "longer than 81920 bytes", {"content": b" " * 81921}),
}


@pytest.mark.parametrize("bad", BAD_SEGMENTS)
async def test_a_bad_segment_is_refused_and_nothing_else_notices(bad: str) -> None:
    status, message, arguments = BAD_SEGMENTS[bad]
    code, details = ("start_mismatch", {"expected": 2, "rewind": 0}) if status == 409 else ("invalid_input", {})
    async with system() as sut, bystander(sut):
        await sut.open(session="a")
        await sut.post("a", ones(2))
        assert await sut.fetch("a", 0, 2) == [[1, 1], [2, 2]]
        assert await sut.refused(status, code, message, "POST", "/v1/sessions/a/segments", **arguments) == details
        await sut.post("a", ones(1), start=2)  # it goes on where it was
        assert await sut.fetch("a", 2, 3) == [[3, 3]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"session": "\\ud800"}', "session is .*, expected a text"),
        ('{"initial_state": [[1' + "0" * 30 + "]]}", "too large for any dtype"),
    ],
)
async def test_a_session_that_cannot_be_opened_costs_no_other(body: str, message: str) -> None:
    async with system() as sut, bystander(sut):
        headers = {"content-type": "application/json"}
        await sut.refused(400, "invalid_input", message, "POST", "/v1/sessions", content=body, headers=headers)


async def test_a_body_without_end_is_refused_after_as_much_as_could_be_one() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1024
            yield b" " * 1024

    async with system() as sut, bystander(sut):
        await sut.open(session="a")
        for path in ("/v1/sessions/a/segments", "/v1/sessions"):
            sent = 0
            await sut.refused(413, "invalid_input", "longer than", "POST", path, content=endless())
            assert sent <= 128 * 1024


async def test_nan_is_refused() -> None:
    async with system(FloatSumModel()) as sut, bystander(sut):
        await sut.open(session="a")
        path = "/v1/sessions/a/segments"
        for body in (b'{"x": [[NaN]]}', b'{"x": [[-Infinity]]}'):
            await sut.refused(400, "invalid_input", "NaN or infinity", "POST", path, content=body)
        await sut.refused(400, "invalid_input", r"x\[0\]\[0\] is null", "POST", path, content=b'{"x": [[null]]}')
        await sut.post("a", [[2.5]], start=0)
        assert await sut.fetch("a", 0, 1) == [[2.5]]


async def test_nan_is_passed_if_so_configured_and_stays_in_its_session() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, nan="pass"))
    async with system(FloatSumModel(), config=config) as sut, bystander(sut):
        await sut.open(session="a")
        await sut.call("POST", "/v1/sessions/a/segments", 202, content=b'{"x": [[1], [NaN], [2]]}')
        assert await sut.fetch("a", 0, 3) == [[1.0], [None], [None]]  # JSON has no NaN


async def test_unknown_sessions_and_models() -> None:
    async with system() as sut, bystander(sut):
        for method, path in (("POST", "/segments"), ("GET", "/outputs"), ("GET", ""), ("DELETE", "")):
            await sut.refused(404, "unknown_session", "'nobody' is not open", method, f"/v1/sessions/nobody{path}")
        body = {"model": "whisper"}
        await sut.refused(
            404, "unknown_model", "'whisper' is not served here: silero_vad", "POST", "/v1/sessions", json=body
        )


async def test_session_ids() -> None:
    async with system() as sut, bystander(sut):
        await sut.open(session="a", model="silero_vad")
        for name, status, code, message in (
            ("a", 409, "session_exists", "'a' is open already"),
            ("", 400, "invalid_input", "session is '', expected a text"),
            (7, 400, "invalid_input", "session is 7, expected a text"),
            ("a/b", 400, "invalid_input", "has a '/' in it"),
            ("a" * 300, 400, "invalid_input", "expected a text of 1 to 256 characters"),
        ):
            await sut.refused(status, code, message, "POST", "/v1/sessions", json={"session": name})
        await sut.open(session="ü ?")
        assert (await sut.post("%C3%BC%20%3F", ones(1)))["next"] == 1
        assert (await sut.call("POST", "/v1/sessions", 201))["session"]  # without a body


async def test_a_closed_session_takes_nothing() -> None:
    async with system() as sut, bystander(sut):
        await sut.open(session="a")
        await sut.post("a", ones(2))
        path = "/v1/sessions/a"
        message = "to close at timestep 9, 2 are submitted"
        assert await sut.refused(409, "start_mismatch", message, "DELETE", path, params={"start": 9}) == {
            "expected": 2,
            "rewind": 0,
        }
        assert (await sut.call("DELETE", path))["reason"] == "closed"
        assert (await sut.call("DELETE", path))["reason"] == "closed"  # again, as after a lost answer
        body = {"x": ones(1)}
        await sut.refused(410, "session_ended", "'a' has ended", "POST", f"{path}/segments", json=body)
        assert await sut.fetch("a", 0, 2) == [[1, 1], [2, 2]]
        await sut.call("DELETE", path, params={"abort": True})  # gives the outputs up
        while sut.hub.num_sessions > 1:
            await asyncio.sleep(0.01)
        await sut.refused(410, "session_ended", "'a' has ended", "POST", f"{path}/segments", json=body)


async def test_an_aborted_session_drops_what_is_pending() -> None:
    model = SumModel()
    async with system(model) as sut, bystander(sut):
        await sut.open(session="a")
        for _ in range(4):
            await sut.post("a", ones(64))
        assert (await sut.call("DELETE", "/v1/sessions/a", params={"abort": True}))["reason"] == "aborted"
        assert model.ended == [("a", "aborted")]
        await sut.refused(410, "session_ended", "aborted", "GET", "/v1/sessions/a/outputs")


async def test_a_resend_is_run_once_and_its_outputs_come_again() -> None:
    async with system() as sut, bystander(sut):
        await sut.open(session="a")
        for _ in range(3):
            assert (await sut.post("a", ones(4), start=0))["end"] == 4
            assert await sut.fetch("a", 0, 4) == [[i, i] for i in range(1, 5)]
        assert (await sut.post("a", ones(4), start=2))["next"] == 6  # half of it
        assert await sut.fetch("a", 0, 6) == [[i, i] for i in range(1, 7)]


async def test_asking_from_a_timestep_acknowledges_what_lies_below() -> None:
    async with system() as sut, bystander(sut):
        await sut.open(session="a")
        await sut.post("a", ones(4))
        path = "/v1/sessions/a/outputs"
        assert await sut.fetch("a", 0, 4) == await sut.fetch("a", 0, 4)
        assert (await sut.call("GET", path, params={"start": 3}))["acked"] == 3
        assert (await sut.call("GET", path))["outputs"] == {"total": [[4, 4]]}  # from acked on
        for start, status in ((2, 400), (5, 400), (-1, 400), ("x", 400)):
            await sut.refused(status, "invalid_input", "start|from timestep", "GET", path, params={"start": start})
        assert (await sut.post("a", ones(1), acked=4))["acked"] == 4
        assert (await sut.post("a", ones(1), acked=0))["acked"] == 4  # lower is no error


async def test_an_acknowledgement_outlives_a_frame_that_cannot_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "ACK_AFTER_S", 0.0)
    async with system() as sut:
        await sut.open(session="a")
        session = sut.hub.get("a")
        session.deliver(0, 0, Run(0, 4, {"total": np.ones((4, 2), np.int64)}))
        session.in_flight = True  # as while its close is on its way
        session.ack(4)
        await sut.open()  # sends a frame, which could overtake the close
        assert session.acked_told == 0
        session.arrived(session.handed)
        await sut.open()
        assert session.acked_told == 4


async def test_an_acknowledgement_waits_for_inputs_of_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "ACK_AFTER_S", 3600.0)
    async with system() as sut:
        await sut.open(session="a")
        session = sut.hub.get("a")
        session.submit(np.ones((4, 2), np.int64))
        await session.wait()
        session.ack(4)
        await sut.open()  # sends a frame
        assert session.acked_told == 0
        session.submit(np.ones((1, 2), np.int64))
        await session.wait()
        assert session.acked_told == 4


async def test_waiting_for_outputs_ends_with_the_first_or_with_the_time() -> None:
    async with system() as sut:
        await sut.open(session="a")
        path = "/v1/sessions/a/outputs"
        for wait_s in (0, 0.01):
            body = await sut.call("GET", path, params={"wait_s": wait_s})
            assert (body["start"], body["end"], body["outputs"], body["progress"]) == (0, 0, {"total": []}, 0)
        await sut.refused(400, "invalid_input", "wait_s: .* not '-1'", "GET", path, params={"wait_s": -1})
        waiting = asyncio.create_task(sut.call("GET", path, params={"wait_s": 1e9}))
        await asyncio.sleep(0)
        await sut.post("a", ones(1))
        assert (await waiting)["outputs"] == {"total": [[1, 1]]}


async def test_more_outputs_than_an_answer_holds_come_in_parts() -> None:
    session = dataclasses.replace(CONFIG.session, max_window_timesteps=10_000, max_segment_timesteps=10_000)
    async with system(config=dataclasses.replace(CONFIG, session=session)) as sut:
        await sut.open(session="a")
        await sut.post("a", ones(10_000))
        await sut.call("DELETE", "/v1/sessions/a")
        body = await sut.call("GET", "/v1/sessions/a/outputs")
        assert 0 < body["end"] < 10_000
        assert "ended" not in body
        assert await sut.fetch("a", 0, 10_000) == [[i, i] for i in range(1, 10_001)]


async def test_a_full_window_asks_to_come_back_later() -> None:
    async with system() as sut, bystander(sut):
        await sut.open(session="a")
        for _ in range(4):
            await sut.post("a", ones(64))
        body = {"x": ones(1), "start": 256}
        message = "257 timesteps submitted and not acknowledged, the limit is 256"
        await sut.refused(429, "window_full", message, "POST", "/v1/sessions/a/segments", json=body)
        await sut.fetch("a", 0, 256)
        await sut.post("a", ones(1), start=256, acked=1)


async def test_too_many_sessions_ask_to_come_back_later() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, max_sessions=2))
    async with system(config=config) as sut, bystander(sut):
        await sut.open(session="a")
        await sut.refused(
            429, "too_many_sessions", "2 sessions are open", "POST", "/v1/sessions", json={"session": "b"}
        )
        await sut.call("DELETE", "/v1/sessions/a")
        await sut.open(session="b")


async def test_a_failed_step_is_told_and_the_session_goes_on() -> None:
    async with system(SumModel(poison=0)) as sut:
        await sut.open(session="a")
        await sut.post("a", ones(3))
        await sut.fetch("a", 0, 3)
        await sut.post("a", [[-1, -1]], start=3)
        path = "/v1/sessions/a"
        arguments: dict[str, Any] = {"params": {"start": 3, "wait_s": 10}}
        details = await sut.refused(500, "step_failed", "resend from 3", "GET", f"{path}/outputs", **arguments)
        assert details == {"expected": 3, "rewind": 1}
        body = {"x": ones(1), "start": 4}
        assert (await sut.refused(409, "start_mismatch", "", "POST", f"{path}/segments", json=body))["expected"] == 3
        await sut.post("a", ones(1), start=3)
        assert await sut.fetch("a", 3, 4) == [[4, 4]]
        await sut.post("a", [[-1, -1]], start=4)
        assert (await sut.refused(500, "step_failed", "resend from 4", "DELETE", path))["rewind"] == 2
        assert (await sut.call("DELETE", path))["reason"] == "closed"


async def test_whoever_waits_when_a_step_fails_is_told() -> None:
    async with system(SumModel(poison=0)) as sut:
        await sut.open(session="a")
        session = sut.hub.get("a")
        waiting = [asyncio.create_task(wait) for wait in (session.wait(0), session.available(), session.closed())]
        session.submit(np.array([[-1, -1]]))
        waiting += [asyncio.create_task(session.wait()) for _ in range(2)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [getattr(result, "code", result) for result in results] == [0, *["step_failed"] * 4]
        session.submit(np.ones((1, 2), np.int64))  # told, and so no error any more
        assert await session.wait() == 1


async def test_an_initial_state() -> None:
    async with system() as sut, bystander(sut):
        await sut.open(session="a", initial_state=[[[41, 0]]])
        await sut.post("a", ones(1))
        assert await sut.fetch("a", 0, 1) == [[42, 1]]
        state = MSGPACK.encode({"session": "b", "initial_state": [np.array([[1, 2]])]})
        await sut.call("POST", "/v1/sessions", 201, content=state, headers=PACKED)
        await sut.post("b", ones(1))
        assert await sut.fetch("b", 0, 1) == [[2, 3]]
        for body, message in (
            ({"initial_state": [[[1, 2, 3]]]}, "an initial state of shapes"),
            ({"initial_state": 7}, "initial_state is 7, expected a list of arrays"),
            ({"initial_state": [[[1, "2"]]]}, r"initial_state\[0\]\[0\]\[1\] is '2', expected a number"),
        ):
            await sut.refused(400, "invalid_input", message, "POST", "/v1/sessions", json=body)


async def test_a_dead_owner() -> None:
    async with system(config=ALONE) as sut:
        await sut.open(session="a")
        waiting = asyncio.create_task(sut.client.get("/v1/sessions/a/outputs", params={"wait_s": 10}))
        await asyncio.sleep(0)
        await sut.cluster.kill("owner-0")
        response = await waiting
        assert (response.status_code, response.json()["error"]["code"]) == (410, "state_lost")
        await sut.refused(503, "unavailable", "no replica is ready", "POST", "/v1/sessions")
        await sut.refused(503, "unavailable", "no replica is ready", "GET", "/v1/health/ready")
        assert await sut.call("GET", "/v1/health/live") == {"status": "alive"}


async def test_models_and_health() -> None:
    async with system() as sut:
        tensor = {"shape": [2], "dtype": "int64"}
        model = {"model": "silero_vad", "input": tensor, "outputs": {"total": tensor}}
        assert await sut.call("GET", "/v1/models") == {"models": [model]}
        assert await sut.call("GET", "/v1/health/ready") == {"status": "ready", "models": ["silero_vad"]}


async def test_unknown_routes_and_methods() -> None:
    async with system() as sut:
        await sut.refused(404, "invalid_input", "GET /v1/sesions: Not Found", "GET", "/v1/sesions")
        await sut.refused(405, "invalid_input", "PATCH /v1/sessions: Method Not Allowed", "PATCH", "/v1/sessions")


async def test_what_nobody_foresaw_is_logged_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> None:
        raise RuntimeError("the secret reason")

    async with system() as sut:
        monkeypatch.setattr(sut.hub, "models", broken)
        response = await sut.client.get("/v1/models")
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
        assert "secret" not in response.text
    assert "the secret reason" in caplog.text


async def test_the_interface_describes_itself() -> None:
    async with system() as sut:
        described = await sut.call("GET", "/openapi.json")
        assert (await sut.client.get("/docs")).status_code == 200
    segment = described["paths"]["/v1/sessions/{session}/segments"]["post"]
    assert set(segment["requestBody"]["content"]) == {
        "application/json",
        "application/msgpack",
        "application/octet-stream",
    }
    assert {"202", "4XX", "5XX"} <= segment["responses"].keys()
    documented = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    for path, methods in described["paths"].items():
        for method in methods:
            assert re.search(rf"`{method.upper()} {re.escape(path)}[`?\[]", documented), f"{method} {path}"


def subclasses(cls: type[LockstepError]) -> Iterator[type[LockstepError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from subclasses(child)


async def test_the_documented_errors_are_those_that_exist() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| (\w+) \| (yes|no) \|", documented, re.MULTILINE)
    known = [cls for cls in subclasses(LockstepError) if cls.__module__ == errors.__name__]
    assert sorted(rows) == sorted(
        (cls.__name__, cls.code, str(cls.http), cls.grpc, "yes" if cls.retry else "no") for cls in known
    )


async def test_a_session_that_its_owner_has_just_given_back_is_not_said_to_be_dropped() -> None:
    async with system(SumModel(), SumModel()) as sut:
        theirs = Mortal(sut.cluster)
        other = Hub(theirs, ack_on_receipt=True)
        session = await other.open("a")
        assert await session.wait(session.submit(np.array(ones(3)))) == 3
        asked, may_ask = asyncio.Event(), asyncio.Event()

        async def slow(ask: Ask) -> Grant:
            asked.set()
            await may_ask.wait()
            return await sut.cluster.open(ask)

        theirs.open = slow  # type: ignore[attr-defined]
        await sut.call("POST", "/v1/sessions/a/migrate")
        await asked.wait()
        await sut.refused(421, "not_owner", "'a' is just moving", "DELETE", "/v1/sessions/a?abort=true")
        may_ask.set()
        assert await session.wait(session.submit(np.array(ones(2)))) == 5
        await sut.call("DELETE", "/v1/sessions/a?abort=true")
        assert await session.closed() == "aborted"
        await other.stop()


async def test_a_session_of_which_its_owner_has_not_heard_is_not_dropped_and_it_is_said_when_its_name_is_free() -> None:
    async with system() as sut:
        sut.cluster.directory.open("a", "nobody")
        message = "'a' is being opened at 'owner-0', .* try again .* the name is free within a minute"
        await sut.refused(421, "not_owner", message, "DELETE", "/v1/sessions/a?abort=true")
