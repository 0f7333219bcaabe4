"""The REST edge: what a declared method sends, how it answers, and what each error looks like."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import msgspec
import pytest
from django.core.exceptions import PermissionDenied
from django.core.management import call_command
from django.http import Http404
from django.test import RequestFactory
from django.urls import path
from drf_spectacular.drainage import reset_generator_stats
from drf_spectacular.validation import validate_schema
from pytest_django import Settings
from rest_framework import exceptions, serializers
from rest_framework.request import Request
from rest_framework.test import APIClient
from rest_framework.views import APIView

from microservices import RpcContext, RpcException, message_pattern
from microservices.exceptions import NO_HANDLER, ConnectionLost, DeadlineExceeded, Unavailable
from microservices.executor import lending
from microservices.rest import PROBLEM, RpcView, Send, UnknownPath, server_error
from users.models import User

Install = Callable[..., None]

# A gateway to test with: its shapes, its views, and its only service


class Filter(serializers.Serializer[Any]):
    id = serializers.CharField(required=False)
    size = serializers.IntegerField(required=False)
    colour = serializers.CharField(required=False)


class Line(serializers.Serializer[Any]):
    sku = serializers.CharField(max_length=3)
    quantity = serializers.IntegerField(min_value=1)


class Change(serializers.Serializer[Any]):
    id = serializers.CharField(required=False)
    size = serializers.IntegerField(required=False)
    name = serializers.CharField(required=False)


class Order(serializers.Serializer[Any]):
    lines = Line(many=True)
    address = serializers.DictField(child=serializers.CharField(max_length=3), required=False)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if len(attrs["lines"]) > 2:
            raise serializers.ValidationError("Too many lines.", code="too-many")
        return attrs


class Coupon(serializers.Serializer[Any]):
    code = serializers.CharField()
    message = serializers.CharField()


class Shown(serializers.Serializer[Any]):
    id = serializers.CharField()
    price = serializers.DecimalField(max_digits=6, decimal_places=2, required=False)
    stock = serializers.IntegerField(default=0)


class Items(RpcView):
    get = Send("shop", "list", query=Filter, returns=Shown, page="items")
    post = Send("shop", "echo", body=Order, status=201)


class Item(RpcView):
    get = Send("shop", "show", returns=Shown)
    put = Send("shop", "echo", query=Filter, body=Change)
    patch = Send("shop", "echo", body=Change)
    delete = Send("shop", "show", status=204)


class Anything(RpcView):
    get = Send("shop", "show", timeout=0.05)
    post = Send("shop", "echo", body=Coupon)


class Page(RpcView):
    get = Send("shop", "show", page="items")


class Elsewhere(RpcView):
    get = Send("nowhere", "show")


class Handmade(APIView):
    """A view of the project's own, which may raise what Django and DRF know."""

    error: Exception

    def get(self, request: Request) -> None:
        raise self.error

    def get_authenticate_header(self, request: Request) -> str:
        return "Bearer"


urlpatterns = [
    path("items", Items.as_view()),
    path("items/<str:id>", Item.as_view()),
    path("anything", Anything.as_view()),
    path("page", Page.as_view()),
    path("elsewhere", Elsewhere.as_view()),
    path("handmade", Handmade.as_view()),
    path("<path:unknown>", UnknownPath.as_view()),
]
handler500 = "microservices.rest.server_error"

here = pytest.mark.urls(__name__)


class Wanted(msgspec.Struct):
    id: int


@message_pattern("echo")
async def echo(data: Any) -> Any:
    return data


def answering(value: Any) -> Callable[..., Any]:
    """A service's function that answers `show` with `value`, or raises it."""

    @message_pattern("show")
    async def show(data: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return show


@pytest.fixture
def http() -> APIClient:
    """A client that, like any other, sees a failure of the server as a 500."""
    return APIClient(raise_request_exception=False)


@pytest.fixture(autouse=True)
def _own_thread() -> Iterator[None]:
    # So that `def` handlers share the test's database transaction.
    with lending():
        yield


# Requests


@here
def test_the_data_is_query_and_body_and_path_and_the_path_wins(http: APIClient, install: Install) -> None:
    install(shop=[echo])

    answer = http.put("/items/7?id=8&size=1&colour=red", {"id": "9", "size": 2}, format="json")

    assert answer.json() == {"id": "7", "size": 2, "colour": "red"}


@here
def test_what_no_shape_names_is_not_sent(http: APIClient, install: Install) -> None:
    install(shop=[echo])

    answer = http.put("/items/7?admin=1", {"role": "manager", "name": "cup"}, format="json")

    assert answer.json() == {"id": "7", "name": "cup"}


@here
@pytest.mark.parametrize("given", [{}, {"name": "cup"}, {"name": "cup", "size": 3}])
def test_a_patch_sends_only_what_was_given(http: APIClient, install: Install, given: dict[str, Any]) -> None:
    install(shop=[echo])

    answer = http.patch("/items/7", given, format="json")

    assert answer.json() == {"id": "7", **given}


@here
def test_a_form_is_read_like_json(http: APIClient, install: Install) -> None:
    install(shop=[echo])

    answer = http.put("/items/7", "name=cup&size=3", content_type="application/x-www-form-urlencoded")

    assert answer.json() == {"id": "7", "name": "cup", "size": 3}


@here
def test_a_service_is_told_who_called(http: APIClient, install: Install, settings: Settings) -> None:
    seen: list[dict[str, str]] = []

    @message_pattern("show")
    async def show(data: Any, ctx: RpcContext) -> None:
        seen.append(ctx.metadata)

    settings.MICROSERVICES = {**settings.MICROSERVICES, "NAME": "gateway"}
    install(shop=[show])

    http.get("/anything")

    assert seen[0]["source"] == "gateway"
    assert 0 <= int(seen[0]["deadline"]) <= 50


@here
@pytest.mark.parametrize("method", ["head", "get"])
def test_head_acts_as_get(http: APIClient, install: Install, method: str) -> None:
    install(shop=[answering({"id": "1"})])

    answer = getattr(http, method)("/items/1")

    assert answer.status_code == 200
    assert answer["Content-Type"] == "application/json"
    assert answer.content == (b"" if method == "head" else b'{"id":"1","stock":0}')


@here
def test_an_error_of_head_is_that_of_get_without_the_body(http: APIClient, install: Install) -> None:
    install(shop=[answering(RpcException({"statusCode": 503, "message": "later"}))])

    answer = http.head("/items/1")

    assert (answer.status_code, answer["Retry-After"], answer.content) == (503, "1", b"")
    assert answer.data["service"] == "shop"


# Replies


@here
def test_a_shape_leaves_out_what_it_does_not_declare(http: APIClient, install: Install) -> None:
    install(shop=[answering({"id": "1", "price": "2.50", "stock": 4, "password": "secret"})])

    answer = http.get("/items/1")

    assert answer.json() == {"id": "1", "price": "2.50", "stock": 4}


@here
@pytest.mark.parametrize("value", [None, 0, "", [1, 2], {"any": {"thing": True}}])
def test_without_a_shape_the_reply_passes_as_it_is(http: APIClient, install: Install, value: Any) -> None:
    install(shop=[answering(value)])

    answer = http.get("/anything")

    assert answer.status_code == 200
    assert answer.data == value


@here
def test_a_page_is_data_and_the_next_cursor_with_a_link_to_it(http: APIClient, install: Install) -> None:
    @message_pattern("list")
    async def items(data: dict[str, Any]) -> Any:
        return {"items": [{"id": "1", "secret": 1}], "next": "a=b&c", "total": 9}

    install(shop=[items])

    answer = http.get("/items?colour=red&cursor=before")

    assert answer.json() == {"data": [{"id": "1", "stock": 0}], "next": "a=b&c"}
    assert answer["Link"] == '</items?colour=red&cursor=a%3Db%26c>; rel="next"'


@here
@pytest.mark.parametrize("reply", [{"items": []}, {"items": [], "next": None}])
def test_the_last_page_has_no_link(http: APIClient, install: Install, reply: Any) -> None:
    install(shop=[answering(reply)])

    answer = http.get("/page")

    assert answer.json() == {"data": [], "next": None}
    assert "Link" not in answer


@here
@pytest.mark.parametrize("reply", [None, {"id": "1"}])
def test_a_204_is_empty_whatever_the_service_says(http: APIClient, install: Install, reply: Any) -> None:
    install(shop=[answering(reply)])

    answer = http.delete("/items/1")

    assert (answer.status_code, answer.data) == (204, None)


@here
def test_a_method_answers_with_the_status_that_it_declares(http: APIClient, install: Install) -> None:
    install(shop=[echo])

    answer = http.post("/items", {"lines": []}, format="json")

    assert answer.status_code == 201


@here
@pytest.mark.parametrize(
    ("url", "reply"),
    [
        pytest.param("/items/1", None, id="nothing"),
        pytest.param("/items/1", "text", id="a text"),
        pytest.param("/items/1", [], id="a list"),
        pytest.param("/items/1", [{"id": "1"}], id="a list of one"),
        pytest.param("/items/1", {}, id="a field is missing"),
        pytest.param("/items/1", {"id": "1", "stock": "many"}, id="no number"),
        pytest.param("/items/1", {"id": "1", "price": "dear"}, id="no decimal number"),
        pytest.param("/page", None, id="no page"),
        pytest.param("/page", [], id="a list for a page"),
        pytest.param("/page", {"data": []}, id="a page by another name"),
        pytest.param("/page", {"items": None}, id="a page of nothing"),
    ],
)
def test_an_answer_in_another_shape_is_a_bad_gateway(http: APIClient, install: Install, url: str, reply: Any) -> None:
    install(shop=[answering(reply)])

    answer = http.get(url)

    assert (answer.status_code, answer["Content-Type"]) == (502, PROBLEM)
    assert (answer.json()["code"], answer.json()["service"]) == ("bad-answer", "shop")


@here
@pytest.mark.parametrize("item", [None, "text", {}, {"id": "1", "stock": "many"}])
def test_an_item_of_a_page_in_another_shape_is_a_bad_gateway(http: APIClient, install: Install, item: Any) -> None:
    @message_pattern("list")
    async def items(data: Any) -> Any:
        return {"items": [{"id": "1"}, item]}

    install(shop=[items])

    answer = http.get("/items")

    assert (answer.status_code, answer.json()["code"]) == (502, "bad-answer")


# Errors of services: one row each of the table of errors

TABLE = [
    pytest.param({"statusCode": 400, "code": "invalid", "message": "No."}, 400, "Bad Request", False, id="validation"),
    pytest.param({"statusCode": 422, "code": "odd", "message": "No."}, 422, None, False, id="validation-422"),
    pytest.param({"statusCode": 401, "code": "expired", "message": "No."}, 401, "Unauthorized", False, id="token"),
    pytest.param({"statusCode": 402, "code": "declined", "message": "No."}, 402, "Payment Required", False, id="pay"),
    pytest.param({"statusCode": 403, "code": "forbidden", "message": "No."}, 403, "Forbidden", False, id="forbidden"),
    pytest.param({"statusCode": 404, "code": "item-gone", "message": "No."}, 404, "Not Found", False, id="not-found"),
    pytest.param({"statusCode": 409, "code": "taken", "message": "No."}, 409, "Conflict", False, id="state"),
    pytest.param({"statusCode": 412, "code": "stale", "message": "No."}, 412, "Precondition Failed", False, id="stale"),
    pytest.param({"statusCode": 429, "code": "quota", "message": "No."}, 429, "Too Many Requests", True, id="limit"),
    pytest.param({"statusCode": 503, "code": "shed", "message": "No."}, 503, "Service Unavailable", True, id="shed"),
    pytest.param({"statusCode": 504, "code": "late", "message": "No."}, 504, "Gateway Timeout", True, id="deadline"),
    pytest.param({"statusCode": 500, "code": "odd", "message": "No."}, 500, "Internal Server Error", False, id="else"),
    pytest.param({"statusCode": 499, "code": "odd", "message": "No."}, 499, "Error", False, id="without-a-name"),
]


@here
@pytest.mark.parametrize(("error", "status", "title", "retryable"), TABLE)
def test_an_error_of_a_service_is_a_problem(
    http: APIClient, install: Install, error: dict[str, Any], status: int, title: str | None, retryable: bool
) -> None:
    install(shop=[answering(RpcException(error))])

    answer = http.get("/anything?page=2")

    problem = answer.json()
    assert (answer.status_code, answer["Content-Type"]) == (status, PROBLEM)
    assert problem.pop("title") == title or title is None  # Python has renamed this one
    assert problem == {
        "type": f"/problems/{error['code']}",
        "status": status,
        "detail": "No.",
        "instance": "/anything",
        "code": error["code"],
        "service": "shop",
        "retryable": retryable,
    } | ({"retry_after": 1} if status == 503 else {})
    assert answer.get("Retry-After") == ("1" if status == 503 else None)
    assert answer.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)


@here
def test_the_errors_of_fields_pass_with_their_pointers(http: APIClient, install: Install) -> None:
    errors = [{"pointer": "/lines/0/sku", "message": "Unknown.", "code": "unknown"}]
    install(shop=[answering(RpcException({"statusCode": 400, "code": "invalid", "message": "No.", "errors": errors}))])

    problem = http.get("/anything").json()

    assert problem["errors"] == errors


@here
def test_a_payload_that_does_not_fit_the_handler_points_at_the_field(http: APIClient, install: Install) -> None:
    @message_pattern("show")
    async def show(data: Wanted) -> None:
        """Never called."""

    install(shop=[show])

    answer = http.get("/items/seven")

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")
    assert answer.json()["errors"] == [
        {"pointer": "/id", "message": "Expected 'int', got 'str'", "code": "invalid"},
    ]


@here
def test_a_pattern_that_nobody_handles_is_a_bad_gateway(http: APIClient, install: Install) -> None:
    install(shop=[echo])

    answer = http.get("/anything")

    assert answer.status_code == 502
    assert answer.json() == {
        "type": "/problems/no-handler",
        "title": "Bad Gateway",
        "status": 502,
        "detail": NO_HANDLER,
        "instance": "/anything",
        "code": "no-handler",
        "service": "shop",
        "retryable": False,
    }


@here
def test_an_unexpected_exception_of_a_handler_is_told_to_the_log_alone(
    http: APIClient, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(shop=[answering(ValueError("the password is 123"))])

    with caplog.at_level(logging.ERROR, "microservices"):
        answer = http.get("/anything")

    assert answer.json() == {
        "type": "/problems/internal",
        "title": "Internal Server Error",
        "status": 500,
        "instance": "/anything",
        "code": "internal",
        "service": "shop",
        "retryable": False,
    }
    assert "the password is 123" in caplog.text


@here
def test_a_handler_that_takes_too_long_is_a_gateway_timeout(http: APIClient, install: Install) -> None:
    @message_pattern("show")
    async def show(data: Any) -> None:
        await asyncio.Event().wait()

    install(shop=[show])

    answer = http.get("/anything")

    assert (answer.status_code, answer.json()["code"]) == (504, "deadline-exceeded")


@here
def test_a_service_that_cannot_be_reached_is_unavailable(
    http: APIClient, install: Install, settings: Settings, free_port: int
) -> None:
    install(url=f"tcp://127.0.0.1:{free_port}", shop=[])
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVERS": {}}

    answer = http.get("/items/1")

    assert (answer.status_code, answer["Retry-After"]) == (503, "1")
    assert (answer.json()["code"], answer.json()["retryable"], answer.json()["retry_after"]) == ("unavailable", True, 1)


@here
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Unavailable("Shed.", code="overloaded"), 503, "overloaded"),
        (ConnectionLost(), 503, "connection-lost"),
        (DeadlineExceeded(), 504, "deadline-exceeded"),
    ],
)
def test_the_toolkits_own_errors_keep_status_and_code_across_a_service(
    http: APIClient, install: Install, error: RpcException, status: int, code: str
) -> None:
    install(shop=[answering(error)])

    answer = http.get("/anything")

    assert (answer.status_code, answer.json()["code"]) == (status, code)


# Errors of a NestJS service


@here
@pytest.mark.parametrize(
    ("error", "status", "code", "detail"),
    [
        pytest.param(
            {"statusCode": 404, "message": "Cat not found", "error": "Not Found"},
            404,
            "not-found",
            "Cat not found",
            id="HttpException",
        ),
        pytest.param({"status": 409, "message": "Taken"}, 409, "conflict", "Taken", id="numeric status"),
        pytest.param({"status": "409", "message": "Taken"}, 500, "rpc-error", "Taken", id="status in words"),
        pytest.param({"statusCode": 200, "message": "Fine"}, 500, "rpc-error", "Fine", id="no error status"),
        pytest.param({"statusCode": 600, "message": "Far"}, 500, "rpc-error", "Far", id="no HTTP status"),
        pytest.param({"statusCode": True, "message": "Odd"}, 500, "rpc-error", "Odd", id="no number"),
        pytest.param("Forbidden resource", 403, "forbidden", "Forbidden resource", id="guard"),
        pytest.param("Cats are asleep", 500, "rpc-error", "Cats are asleep", id="any other text"),
        pytest.param("Internal server error", 500, "internal", None, id="internal"),
        pytest.param({"status": "error", "message": "Internal server error"}, 500, "internal", None, id="as a mapping"),
        pytest.param(7, 500, "rpc-error", "7", id="no text at all"),
    ],
)
def test_an_error_of_nestjs_keeps_what_it_says(
    http: APIClient, install: Install, error: Any, status: int, code: str, detail: str | None
) -> None:
    install(shop=[answering(RpcException(error))])

    answer = http.get("/anything")

    problem = answer.json()
    assert (answer.status_code, problem["code"], problem.get("detail")) == (status, code, detail)


MESSAGES = ["name must be a string", "age must not be less than 0"]


@here
@pytest.mark.parametrize("error", [{"statusCode": 400, "message": MESSAGES, "error": "Bad Request"}, MESSAGES])
def test_the_messages_of_class_validator_are_a_list_of_errors(http: APIClient, install: Install, error: Any) -> None:
    install(shop=[answering(RpcException(error))])

    problem = http.get("/anything").json()

    assert problem["detail"] == "The data is not valid."
    assert problem["errors"] == [{"pointer": "", "message": text, "code": "invalid"} for text in MESSAGES]


# Errors of the gateway itself


@here
@pytest.mark.parametrize(
    ("body", "errors"),
    [
        pytest.param({}, [("/lines", "required")], id="a field"),
        pytest.param(
            {"lines": [{"sku": "abcd", "quantity": 0}, {"sku": "a", "quantity": 1}]},
            [("/lines/0/quantity", "min_value"), ("/lines/0/sku", "max_length")],
            id="fields of the first item",
        ),
        pytest.param(
            {"lines": [{"sku": "a", "quantity": 1}, {}]},
            [("/lines/1/quantity", "required"), ("/lines/1/sku", "required")],
            id="fields of the second item",
        ),
        pytest.param({"lines": {}}, [("/lines", "not_a_list")], id="no list"),
        pytest.param({"lines": [3]}, [("/lines/0", "invalid")], id="no object in a list"),
        pytest.param({"lines": [{"sku": "a", "quantity": 1}] * 3}, [("", "too-many")], id="the whole"),
        pytest.param([], [("", "invalid")], id="no object"),
        pytest.param(
            {"lines": [], "address": {"zip": "12345"}}, [("/address/zip", "max_length")], id="a key of the client's"
        ),
        pytest.param(
            {"lines": [], "address": {"a/b~c": "12345"}}, [("/address/a~1b~0c", "max_length")], id="a key to escape"
        ),
    ],
)
def test_data_that_is_not_valid_is_pointed_at(
    http: APIClient, install: Install, body: Any, errors: list[tuple[str, str]]
) -> None:
    install(shop=[echo])

    answer = http.post("/items", body, format="json")

    problem = answer.json()
    assert (answer.status_code, answer["Content-Type"], problem["code"]) == (400, PROBLEM, "invalid")
    assert sorted((error["pointer"], error["code"]) for error in problem["errors"]) == errors
    assert all(error["message"] for error in problem["errors"])


@here
def test_fields_called_code_and_message_are_fields_like_others(http: APIClient, install: Install) -> None:
    install(shop=[echo])

    answer = http.post("/anything", {}, format="json")

    assert sorted(error["pointer"] for error in answer.json()["errors"]) == ["/code", "/message"]


@here
@pytest.mark.parametrize(
    ("method", "url", "extra", "status", "code"),
    [
        pytest.param("post", "/items", {"data": "{", "content_type": "application/json"}, 400, "parse-error", id="400"),
        pytest.param("get", "/nothing/here", {}, 404, "not-found", id="404"),
        pytest.param("delete", "/nothing/here", {}, 404, "not-found", id="404-for-any-method"),
        pytest.param("delete", "/items", {}, 405, "method-not-allowed", id="405"),
        pytest.param("get", "/items", {"HTTP_ACCEPT": "image/png"}, 406, "not-acceptable", id="406"),
        pytest.param(
            "post", "/items", {"data": "a", "content_type": "text/csv"}, 415, "unsupported-media-type", id="415"
        ),
    ],
)
def test_an_error_of_http_is_a_problem(
    http: APIClient, install: Install, method: str, url: str, extra: dict[str, Any], status: int, code: str
) -> None:
    install(shop=[echo])

    answer = getattr(http, method)(url, **extra)

    problem = answer.json()
    assert (answer.status_code, answer["Content-Type"]) == (status, PROBLEM)
    assert (problem["status"], problem["code"], problem["retryable"]) == (status, code, False)
    assert problem["detail"]
    assert "service" not in problem


@here
def test_a_method_that_is_not_allowed_names_those_that_are(http: APIClient) -> None:
    answer = http.delete("/items")

    assert answer["Allow"] == "GET, POST, HEAD, OPTIONS"


@here
@pytest.mark.parametrize(
    ("error", "status", "code", "header"),
    [
        (Http404("row 7 of the table"), 404, "not-found", None),
        (PermissionDenied("row 7 of the table"), 403, "permission-denied", None),
        (exceptions.NotAuthenticated(), 401, "not-authenticated", ("WWW-Authenticate", "Bearer")),
        (exceptions.Throttled(wait=6.5), 429, "throttled", ("Retry-After", "7")),
    ],
)
def test_an_error_of_a_handmade_view_is_a_problem_too(
    http: APIClient,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    code: str,
    header: tuple[str, str] | None,
) -> None:
    monkeypatch.setattr(Handmade, "error", error, raising=False)

    answer = http.get("/handmade")

    problem = answer.json()
    assert (answer.status_code, answer["Content-Type"], problem["code"]) == (status, PROBLEM, code)
    assert (problem["retryable"], problem.get("retry_after")) == ((True, 7) if status == 429 else (False, None))
    assert header is None or answer[header[0]] == header[1]
    assert b"row 7" not in answer.content


@here
def test_a_service_that_is_not_on_the_map_is_an_internal_error_without_details(http: APIClient) -> None:
    answer = http.get("/elsewhere")

    assert (answer.status_code, answer["Content-Type"]) == (500, PROBLEM)
    assert answer.json() == {
        "type": "/problems/internal",
        "title": "Internal Server Error",
        "status": 500,
        "instance": "/elsewhere",
        "code": "internal",
        "retryable": False,
    }


def test_handler500_answers_with_a_problem(rf: RequestFactory) -> None:
    answer = server_error(rf.get("/api/users"))

    assert (answer.status_code, answer["Content-Type"]) == (500, PROBLEM)
    assert msgspec.json.decode(answer.content)["instance"] == "/api/users"


# The browsable page


@here
@pytest.mark.parametrize(("value", "status"), [({"id": "1"}, 200), (RpcException("Cats are asleep"), 500)])
def test_a_browser_gets_a_page_of_html_also_for_an_error(
    http: APIClient, install: Install, value: Any, status: int
) -> None:
    install(shop=[answering(value)])

    answer = http.get("/anything", headers={"Accept": "text/html"})

    assert (answer.status_code, answer["Content-Type"]) == (status, "text/html; charset=utf-8")
    assert b"<html" in answer.content


# The shop's own gateway, with the users service in this process


@pytest.fixture
def _quick_hashes(settings: Settings) -> None:
    # The real ones are slow on purpose.
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


ADA = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}


@pytest.mark.usefixtures("_quick_hashes")
@pytest.mark.django_db(databases=["users"])
@pytest.mark.parametrize("root", ["/api/users", "/api/v1/users"])
def test_a_user_is_registered_shown_changed_and_deleted(http: APIClient, root: str) -> None:
    created = http.post(root, ADA, format="json")
    one = f"{root}/{created.json()['id']}"
    shown = http.get(one)
    changed = http.patch(one, {"name": "Ada L.", "version": 1}, format="json")
    deleted = http.delete(one)
    gone = http.get(one)

    assert [answer.status_code for answer in (created, shown, changed, deleted, gone)] == [201, 200, 200, 204, 404]
    assert set(created.json()) == {"id", "name", "email", "role", "status", "version", "created_at"}
    assert shown.json() == created.json()
    assert (changed.json()["name"], changed.json()["email"], changed.json()["version"]) == ("Ada L.", ADA["email"], 2)
    assert User.objects.get().status == "deleted"


@pytest.mark.usefixtures("_quick_hashes")
@pytest.mark.django_db(databases=["users"])
def test_users_are_listed_page_by_page(http: APIClient) -> None:
    for name in ("Ada", "Ben", "Clara"):
        http.post("/api/users", ADA | {"name": name, "email": f"{name}@example.org"}, format="json")

    first = http.get("/api/users?limit=2")
    second = http.get(first["Link"].partition(">")[0].strip("<"))
    found = http.get("/api/users?search=cla")

    assert [user["name"] for user in first.json()["data"]] == ["Ada", "Ben"]
    assert [user["name"] for user in second.json()["data"]] == ["Clara"]
    assert "Link" not in second
    assert [user["name"] for user in found.json()["data"]] == ["Clara"]


@pytest.mark.usefixtures("_quick_hashes")
@pytest.mark.django_db(databases=["users"])
def test_what_the_users_service_refuses_is_told_with_its_own_code(http: APIClient) -> None:
    ada = http.post("/api/users", ADA, format="json").json()

    taken = http.post("/api/users", ADA | {"email": "ADA@example.org"}, format="json")
    stale = http.patch(f"/api/users/{ada['id']}", {"name": "Eve", "version": 7}, format="json")
    unknown = http.get("/api/users/nobody")
    cursor = http.get("/api/users?cursor=x")
    blank = http.post("/api/users", ADA | {"name": "a\tb"}, format="json")

    assert (taken.status_code, taken.json()["code"]) == (409, "email-taken")
    assert (stale.status_code, stale.json()["code"]) == (412, "version-mismatch")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "user-not-found")
    assert (cursor.status_code, cursor.json()["errors"][0]["pointer"]) == (400, "/cursor")
    assert (blank.status_code, blank.json()["errors"][0]["pointer"]) == (400, "/name")


def test_a_path_that_nothing_takes_is_a_problem(http: APIClient) -> None:
    answer = http.get("/api/v1/nothing")

    assert (answer.status_code, answer["Content-Type"]) == (404, PROBLEM)
    assert answer.json()["code"] == "not-found"


# The OpenAPI document


def test_the_document_lists_each_versioned_path_once_with_the_problem_as_its_other_answer(http: APIClient) -> None:
    document = http.get("/api/openapi.json").json()

    operations = [
        (path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    assert all(path.startswith("/api/v1/") for path, _, _ in operations)
    assert {(path, method) for path, method, _ in operations if path.startswith("/api/v1/users")} == {
        ("/api/v1/users", "get"),
        ("/api/v1/users", "post"),
        ("/api/v1/users/{id}", "get"),
        ("/api/v1/users/{id}", "patch"),
        ("/api/v1/users/{id}", "delete"),
    }
    for _, _, operation in operations:
        shape = operation["responses"]["default"]["content"][PROBLEM]["schema"]
        assert shape == {"$ref": "#/components/schemas/Problem"}
    problem = document["components"]["schemas"]["Problem"]
    assert set(problem["required"]) == {"type", "title", "status", "instance", "code", "retryable"}


def test_the_document_shows_what_goes_in_and_what_comes_out(http: APIClient) -> None:
    document = http.get("/api/openapi.json").json()

    listing, creation = (document["paths"]["/api/v1/users"][method] for method in ("get", "post"))
    deletion = document["paths"]["/api/v1/users/{id}"]["delete"]
    page = listing["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert set(document["components"]["schemas"][page]["properties"]) == {"data", "next"}
    assert {parameter["name"] for parameter in listing["parameters"]} == {"search", "cursor", "limit"}
    assert "201" in creation["responses"]
    assert creation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/UserCreate")
    assert "content" not in deletion["responses"]["204"]
    assert len({listing["operationId"], creation["operationId"], deletion["operationId"]}) == 3


def test_the_document_is_valid_and_made_without_a_warning(http: APIClient) -> None:
    reset_generator_stats()
    written = StringIO()

    call_command("spectacular", fail_on_warn=True, validate=True, stdout=written)
    validate_schema(http.get("/api/openapi.json").json())

    assert "openapi: 3." in written.getvalue()
