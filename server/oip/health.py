"""`grpc.health.v1`: what probes of Kubernetes and balancers of gRPC ask, answered from `server.readiness`.

As `/readyz`, it needs no key, and says of the server and of the protocol's service alike whether this process
should get requests. Its two messages are described here: a package for them would be a dependency more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import grpc
from anyio import to_thread
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from server.errors import NoSuchRouteError

HEALTH: Final = "grpc.health.v1.Health"
SERVING: Final = 1
NOT_SERVING: Final = 2
SERVICE_UNKNOWN: Final = 3  # `Watch` alone says so
MAX_WATCHERS: Final = 16
_EVERY_S: Final = 1.0  # between two looks of somebody who watches
_PACKAGE: Final = "grpc.health.v1"


def _messages() -> tuple[Any, Any]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="health.proto", package=_PACKAGE, syntax="proto3")
    request = file.message_type.add(name="HealthCheckRequest")
    request.field.add(name="service", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    response = file.message_type.add(name="HealthCheckResponse")  # an enum travels as an int32 does
    response.field.add(name="status", number=1, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = (pool.FindMessageTypeByName(f"{_PACKAGE}.{made.name}") for made in file.message_type)
    request_class, response_class = (message_factory.GetMessageClass(each) for each in found)
    return request_class, response_class


HealthCheckRequest, HealthCheckResponse = _messages()


class Health:
    """One server's word on itself; `stop` ends those who watch."""

    def __init__(
        self, problem: Callable[[], str], services: frozenset[str], *, every_s: float = _EVERY_S
    ) -> None:
        self._problem, self._services, self._every_s = problem, services | {"", HEALTH}, every_s
        self._stopped = asyncio.Event()
        self._watching = 0

    def stop(self) -> None:
        """Tell who watches that nothing new is taken, and end their calls."""
        self._stopped.set()

    async def check(self, request: Any) -> Any:
        """Answer `Check`.

        Raises:
            NoSuchRouteError: there is no such service.
        """
        status = await self._status(request.service)
        if status == SERVICE_UNKNOWN:
            raise NoSuchRouteError("there is no service of that name")
        return HealthCheckResponse(status=status)

    async def watch(self, request: Any, call_context: Any) -> None:
        """Answer `Watch`: the status, and each other one that comes after it."""
        if self._watching >= MAX_WATCHERS:
            await call_context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watch already")
        self._watching += 1
        try:
            said = 0
            while True:
                is_last = self._stopped.is_set()
                status = await self._status(request.service)
                if status != said:
                    await call_context.write(HealthCheckResponse(status=status))
                    said = status
                if is_last:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), self._every_s)
        finally:
            self._watching -= 1

    async def _status(self, service: str) -> int:
        if service not in self._services:
            return SERVICE_UNKNOWN
        if self._stopped.is_set():
            return NOT_SERVING
        return NOT_SERVING if await to_thread.run_sync(self._problem) else SERVING
