"""Calls of an ingress's HTTP routes, for what needs no conversation. Needs neither Ray nor torch."""

import httpx

from serve_app.errors import InvalidInput, Unavailable, from_wire
from serve_app.ingress.codec import JSON, Message

WITHIN_S = 30.0


async def call(address: str, method: str, path: str, **query: str) -> Message:
    """What the ingress at an address like ws://host:8000 answers. Raises what it refuses with, Unavailable.

    Of several addresses, with commas between, it is the first that answers.
    """
    first, _, others = address.partition(",")
    try:
        return await _call(first.strip(), method, path, **query)
    except Unavailable:
        if not others:
            raise
    return await call(others, method, path, **query)


async def _call(address: str, method: str, path: str, **query: str) -> Message:
    if not address.startswith(("ws://", "wss://")):
        raise InvalidInput(f"{address!r} is no address of an ingress, expected one like ws://host:8000")
    url = f"http{address.removeprefix('ws').rstrip('/')}{path}"
    try:
        async with httpx.AsyncClient(timeout=WITHIN_S) as http:
            response = await http.request(method, url, params=query)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"no answer from {url}: {str(error) or type(error).__name__}") from error
    answer = JSON.decode(response.content)
    if "error" in answer.values:
        raise from_wire(answer.mapping("error").values)
    return answer
