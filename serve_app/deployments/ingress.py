"""The way in for clients that know nothing of Ray: HTTP, WebSocket and gRPC."""

import asyncio
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from serve_app.config import GrpcConfig
from serve_app.deployments.own_port import keep_port
from serve_app.deployments.peer_channels import PeerChannels, peer_server
from serve_app.deployments.serve_models import ServeModels
from serve_app.deployments.transport import BatchedHandles, OtherReplicas, RayDirectory
from serve_app.garbage import collect_seldom
from serve_app.ingress.http import build_http
from serve_app.ingress.hub import Hub
from serve_app.ingress.oip import InferenceServer
from serve_app.ingress.oip_grpc import InferenceService
from serve_app.ingress.peers import Asked, Peers, sender_at
from serve_app.ingress.siblings import Question


@serve.ingress()
class Ingress(InferenceService):
    """Protocol adapters over a hub. `owners` are there for Serve to deploy them; the directory says where they are."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, owners: list[Any], batched: dict[str, Any], grpc: GrpcConfig, deployments: dict[str, str]
    ) -> None:
        """batched: handles of the stateless models, by name. deployments: of all models."""
        keep_port()
        collect_seldom()
        self._owners = owners
        context = serve.get_replica_context()
        app = context.app_name
        directory = RayDirectory(app)
        self._peer_server = peer_server(self._answer_peer)
        address = await self._peer_server.start(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._hub = Hub(directory, ack_on_receipt=False, sender=sender_at(address))
        self._channels = PeerChannels()
        peers = Peers(self._hub, self._channels)
        self._batched = BatchedHandles(batched)
        self._models = ServeModels(app, directory, deployments)
        siblings = OtherReplicas(context.replica_id, "tell")
        self.inference = InferenceServer(self._hub, self._batched, self._models, peers, siblings)
        self._watching = asyncio.create_task(self.inference.watch())
        self._server = self.server()
        if grpc.port:
            await self._server.start(grpc.host, grpc.port)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http(self._hub, self.inference)

    async def tell(self, question: Question) -> Any:
        """What another replica of this deployment asks."""
        return self.inference.tell(question)

    async def _answer_peer(self, asked: Asked, asker_lost: asyncio.Event) -> Any:
        return await self.inference.peers.answer(asked, asker_lost)

    async def __del__(self) -> None:
        self._server.refuse()
        self._watching.cancel()
        await self._peer_server.stop()
        await self._channels.stop()
        await self._models.stop()
        await self._batched.stop()
        await self._hub.stop()
        self._server.stop()
