"""Payloads of all kinds: what a handler may be annotated with, and what it may return."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import pytest
from django.contrib.auth.models import User
from rest_framework import serializers

from microservices import codec
from microservices.client import Client
from microservices.exceptions import ConfigurationError, RpcException
from microservices.handlers import Handler, message_pattern
from microservices.transports.local import LocalClient
from tests.toolkit.conftest import service


class Line(serializers.Serializer):
    quantity = serializers.IntegerField(min_value=1)


class Order(serializers.Serializer):
    number = serializers.CharField(max_length=8)
    lines = Line(many=True)


class NewUser(serializers.ModelSerializer):
    class Meta:
        model = User
        fields = ("username",)


class Typed(TypedDict):
    id: int
    note: NotRequired[str]


@dataclasses.dataclass
class Data:
    id: int
    note: str = ""


class Struct(msgspec.Struct):
    id: Annotated[int, msgspec.Meta(ge=1)]
    note: str = ""


@message_pattern("order")
def order(data: Order) -> dict[str, Any]:
    return {"number": data.validated_data["number"], "lines": len(data.validated_data["lines"])}


@message_pattern("again")
def again(data: Order) -> Order:
    return data


@message_pattern("join")
def join(data: NewUser) -> NewUser:
    data.save()
    return data


async def ask(function: Any, pattern: str, data: Any, **options: Any) -> Any:
    """Call a handler of this process."""
    client = Client("shop", lambda: LocalClient(service(function)))
    try:
        return await client.send(pattern, data, **options)
    finally:
        await client.close()


@pytest.mark.asyncio
async def test_a_serializer_comes_with_valid_data() -> None:
    answer = await ask(order, "order", {"number": "o-1", "lines": [{"quantity": 2}], "more": 1})

    assert answer == {"number": "o-1", "lines": 1}


@pytest.mark.asyncio
async def test_a_serializer_names_each_field_that_is_wrong_and_its_handler_never_runs() -> None:
    with pytest.raises(RpcException) as caught:
        await ask(order, "order", {"number": "far too long", "lines": [{"quantity": 1}, {"quantity": 0}]})

    assert caught.value.status_code == 400
    assert [(error["pointer"], error["code"]) for error in caught.value.errors] == [
        ("/number", "max_length"),
        ("/lines/1/quantity", "min_value"),
    ]


@pytest.mark.parametrize("data", [None, 5, "text", [1]])
@pytest.mark.asyncio
async def test_a_serializer_wants_an_object(data: Any) -> None:
    with pytest.raises(RpcException) as caught:
        await ask(order, "order", data)

    assert caught.value.status_code == 400


@pytest.mark.asyncio
async def test_a_serializer_that_is_returned_travels_as_its_data() -> None:
    sent = {"number": "o-1", "lines": [{"quantity": 2}]}

    answer = await ask(again, "again", sent)

    assert answer == sent


@pytest.mark.asyncio
async def test_a_caller_cannot_have_its_answer_as_a_serializer() -> None:
    with pytest.raises(ConfigurationError, match="may ask the database"):
        await ask(again, "again", {}, returns=Order)


@pytest.mark.django_db(transaction=True)
def test_a_validator_may_ask_the_database() -> None:
    from asgiref.sync import async_to_sync

    first = async_to_sync(ask)(join, "join", {"username": "ada"})
    with pytest.raises(RpcException) as caught:
        async_to_sync(ask)(join, "join", {"username": "ada"})

    assert first == {"username": "ada"}
    assert [error["code"] for error in caught.value.errors] == ["unique"]


def test_an_async_handler_cannot_take_a_serializer() -> None:
    @message_pattern("order")
    async def place(data: Order) -> None: ...

    with pytest.raises(ConfigurationError, match="only for a `def` handler"):
        Handler(place)


@pytest.mark.parametrize("kind", [Typed, Data, Struct])
@pytest.mark.asyncio
async def test_every_kind_of_typed_payload_is_checked_alike(kind: Any) -> None:
    def take(data: Any) -> Any:
        return data

    take.__annotations__ = {"data": kind, "return": kind}
    handler = message_pattern("take")(take)

    answer = await ask(handler, "take", {"id": 1, "note": "é", "more": []})
    with pytest.raises(RpcException) as caught:
        await ask(handler, "take", {"id": "one"})

    assert answer == {"id": 1, "note": "é"}
    assert [error["pointer"] for error in caught.value.errors] == ["/id"]


def test_a_kind_of_ones_own_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hex(bytes):
        pass

    class HexPayload(codec.PayloadKind):
        def accepts(self, annotation: Any) -> bool:
            return annotation is Hex

        def decoder(self, annotation: Any) -> codec.Decoder:
            return lambda raw: Hex(bytes.fromhex(msgspec.json.decode(raw)))

        def encode(self, value: Any) -> Any:
            return value.hex()

    monkeypatch.setattr(codec, "_kinds", list(codec._kinds))
    codec.register(HexPayload())

    assert codec.decoder(Hex)(b'"ff00"') == Hex(b"\xff\x00")


def test_what_has_no_kind_has_no_json_form() -> None:
    with pytest.raises(TypeError, match="objects of type object is unsupported"):
        codec.encode(object())
