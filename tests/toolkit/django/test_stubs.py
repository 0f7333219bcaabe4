"""`clients.grpc(...)`: a gRPC service as an object, of this process or elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct
from pytest_django import Settings

from microservices import RpcException, clients, grpc_method
from microservices.exceptions import ConfigurationError
from microservices.microservice import get_microservice
from microservices.stubs import where
from tests import brokers

Install = Callable[..., None]

PROTO = """
syntax = "proto3";
package shop;
service ItemsService {
  rpc FindOne (ItemById) returns (Item) {}
  rpc ListAll (ItemById) returns (stream Item) {}
}
message ItemById { string id = 1; }
message Item { string id = 1; int64 price = 2; }
"""


class ItemById(Struct):
    id: str


class Item(Struct):
    id: str
    price: int
    secret: str = "not in the message"


@grpc_method("ItemsService")
def find_one(data: ItemById) -> Item:
    if data.id == "nobody":
        raise RpcException({"statusCode": 404, "code": "item-not-found", "message": "nf"})
    return Item(data.id, 2**53)


@grpc_method("ItemsService")
async def list_all(data: ItemById) -> AsyncIterator[Item]:
    for number in range(3):
        yield Item(f"{data.id}{number}", number)


@pytest.fixture
def items(install: Install, settings: Settings, tmp_path: Path) -> None:
    """A service that lives here, and its .proto file."""
    (tmp_path / "items.proto").write_text(PROTO, encoding="utf-8")
    install(shop=[find_one, list_all])
    settings.MICROSERVICES = {**settings.MICROSERVICES, "PROTO_PATH": [str(tmp_path)], "DATA_DIR": str(tmp_path)}


@pytest.mark.usefixtures("items")
@pytest.mark.parametrize("name", ["FindOne", "findOne", "find_one"])
def test_an_rpc_of_a_service_that_lives_here_is_called_in_each_spelling(name: str) -> None:
    async def call() -> Any:
        try:
            return await getattr(clients.grpc("shop").service("ItemsService"), name)({"id": "a"})
        finally:
            await clients.close()

    assert asyncio.run(call()) == {"id": "a", "price": 2**53}


@pytest.mark.usefixtures("items")
def test_a_thread_without_an_event_loop_has_the_same_methods() -> None:
    service = clients.grpc("shop").service("shop.ItemsService").sync

    assert service.FindOne({"id": "a"}, returns=Item).price == 2**53
    assert [item["id"] for item in service.list_all({"id": "a"})] == ["a0", "a1", "a2"]
    with pytest.raises(RpcException) as caught:
        service.FindOne({"id": "nobody"})
    assert caught.value.code == "item-not-found"


@pytest.mark.usefixtures("items")
def test_an_rpc_that_is_not_there_is_told_with_those_that_are() -> None:
    service = clients.grpc("shop").service("ItemsService")

    with pytest.raises(AttributeError, match="no RPC 'FindNone'; there is FindOne, ListAll"):
        service.FindNone  # noqa: B018
    assert {"FindOne", "ListAll"} <= set(dir(service))


@pytest.mark.usefixtures("items")
def test_a_service_that_is_not_known_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'shop'"):
        clients.grpc("shops")
    with pytest.raises(ConfigurationError, match=r"none has it among shop\.ItemsService"):
        clients.grpc("shop").service("Items")


@pytest.mark.usefixtures("items")
def test_a_service_elsewhere_needs_a_grpc_address(settings: Settings) -> None:
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVERS": {}}

    async def call() -> None:
        await clients.grpc("shop").service("ItemsService").FindOne({"id": "a"})

    with pytest.raises(ConfigurationError, match=r"CLIENTS'\]\['shop'\] has no `grpc` address"):
        asyncio.run(call())


@pytest.mark.usefixtures("items")
def test_a_service_elsewhere_is_called_where_its_grpc_address_is(settings: Settings, free_port: int) -> None:
    url = f"grpc://127.0.0.1:{free_port}"

    async def serve_and_call() -> Any:
        shop = get_microservice("shop")
        await shop.listen([url])
        places = {"shop": {"url": "tcp://127.0.0.1:1", "grpc": url, "rpcs": {"get_item": "ItemsService/FindOne"}}}
        settings.MICROSERVICES = {**settings.MICROSERVICES, "CLIENTS": places, "SERVERS": {}}
        try:
            async with asyncio.timeout(10):
                by_name = await clients.grpc("shop").service("ItemsService").FindOne({"id": "a"})
                settings.MICROSERVICES = {**settings.MICROSERVICES, "CLIENTS": {"shop": {**places["shop"], "url": url}}}
                by_pattern = await clients["shop"].send({"cmd": "get_item"}, {"id": "b"})
                return by_name, by_pattern
        finally:
            await clients.close()
            await shop.close(0)

    assert asyncio.run(serve_and_call()) == ({"id": "a", "price": 2**53}, {"id": "b", "price": 2**53})


@pytest.mark.usefixtures("items")
def test_the_options_of_the_main_door_are_not_those_of_the_grpc_door(settings: Settings) -> None:
    url, grpc = (f"{scheme}://127.0.0.1:{brokers.free_port()}" for scheme in ("tcp", "grpc"))
    places = {"shop": {"url": url, "grpc": grpc, "options": {"max_in_flight": 7}}}
    settings.MICROSERVICES = {**settings.MICROSERVICES, "CLIENTS": places, "SERVERS": places, "LISTEN": True}

    async def limited() -> dict[str, bool]:
        shop = get_microservice("shop")
        await shop.listen()
        try:
            return {server.address.scheme: server.options.max_in_flight == 7 for server in shop.servers}
        finally:
            await shop.close(0)

    assert asyncio.run(limited()) == {"tcp": True, "grpc": False}
    assert "max_in_flight" not in where("shop")[0].options


@pytest.mark.usefixtures("items")
def test_a_grpc_door_that_is_the_main_one_has_its_options(settings: Settings) -> None:
    places = {"shop": {"url": "grpc://127.0.0.1:1", "options": {"max_in_flight": 7}}}
    settings.MICROSERVICES = {**settings.MICROSERVICES, "CLIENTS": places}

    assert where("shop")[0].options["max_in_flight"] == 7
