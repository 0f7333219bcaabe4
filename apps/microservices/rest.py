"""REST views that only declare: which pattern a method sends, from which data, in which shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import urlencode

from django.apps import apps
from django.core.exceptions import PermissionDenied, RequestDataTooBig
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from drf_spectacular.utils import extend_schema
from rest_framework import exceptions, parsers, serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.views import exception_handler as drf_exception_handler

from . import conf
from .client import clients
from .dependencies import require
from .exceptions import INTERNAL, RpcException

PROBLEM = "application/problem+json"
_METHODS = ("get", "post", "put", "patch", "delete")

Shape = type[serializers.Serializer[Any]]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What a view asks another service before it sends: who or what an id of the data stands for.

    `pattern` is sent to `service` with the field `id` of the data; `fields` of the reply are passed on.
    """

    service: str
    pattern: Any
    id: str
    fields: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Send:
    """What a method of a view does: send `pattern` to `service` and answer with the reply.

    The data is one object: the query as `query` reads it, the body as `body` does, and the path's
    parameters, which win. `returns` shapes the reply; without it the reply passes as it is. With
    `page` the reply is a list by that name, answered as `{"data": [...], "next": ...}`. `lookups`
    add fields to the data, by name. `timeout` is in seconds.
    """

    service: str
    pattern: Any
    query: Shape | None = None
    body: Shape | None = None
    returns: Shape | None = None
    page: str | None = None
    lookups: Mapping[str, Lookup] = dataclasses.field(default_factory=dict)
    status: int = 200
    timeout: float | None = None
    summary: str = ""


class JSONParser(parsers.JSONParser):
    """DRF's parser, for which a body nested without end is a broken one."""

    def parse(self, stream: Any, media_type: Any = None, parser_context: Any = None) -> Any:
        """Return the body's data. Raises ParseError."""
        try:
            return super().parse(stream, media_type, parser_context)
        except RecursionError as error:
            raise exceptions.ParseError("The body is nested too deeply.") from error


class RpcView(APIView):
    """A DRF view whose methods are declarations: `get = Send("users", {"cmd": "get_user"})`."""

    calls: ClassVar[dict[str, Send]] = {}
    parser_classes = (JSONParser, parsers.FormParser, parsers.MultiPartParser)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.calls = {method: call for method in _METHODS if isinstance(call := getattr(cls, method, None), Send)}
        for method, call in cls.calls.items():
            setattr(cls, method, _documented(call, _method(call), f"{cls.__name__}_{method}"))

    @classmethod
    def as_view(cls, **initkwargs: Any) -> Any:
        """Return the view. With DEBUG: raises ConfigurationError where `calls` of its app lacks a service."""
        app = apps.get_containing_app_config(cls.__module__)
        if conf.debug() and app is not None:
            for call in cls.calls.values():
                require(app.label, [call.service, *(lookup.service for lookup in call.lookups.values())])
        return super().as_view(**initkwargs)

    def answer(self, call: Send, request: Request, path: Mapping[str, Any]) -> Response:
        """Send what `call` declares and shape the reply."""
        query = _valid(call.query, request.query_params)
        body = _valid(call.body, request.data) if call.body else {}
        data = {**query, **body, **path}
        data |= {name: _looked_up(lookup, data) for name, lookup in call.lookups.items()}
        reply = clients[call.service].sync.send(call.pattern, data, timeout=call.timeout)
        if call.status == HTTPStatus.NO_CONTENT:
            return Response(status=call.status)
        if call.page is None:
            return Response(_shaped(call, reply), status=call.status)
        response = Response(_page(call, reply), status=call.status)
        if response.data["next"] is not None:
            query = {**request.query_params.dict(), "cursor": response.data["next"]}
            response["Link"] = f'<{request.path}?{urlencode(query)}>; rel="next"'
        return response


class UnknownPath(APIView):
    """Answers 404 for paths that nothing else takes."""

    schema = None

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Refuse any method."""
        raise exceptions.NotFound("There is nothing at this path.")


class ProblemSerializer(serializers.Serializer[Any]):
    """An error as RFC 9457 describes it."""

    type = serializers.CharField()
    title = serializers.CharField()
    status = serializers.IntegerField()
    detail = serializers.CharField(required=False)
    instance = serializers.CharField()
    code = serializers.CharField()
    errors = serializers.ListField(child=serializers.DictField(), required=False)  # type: ignore[assignment]
    service = serializers.CharField(required=False)
    retryable = serializers.BooleanField()
    retry_after = serializers.IntegerField(required=False)


def exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """Turn an error into an `application/problem+json` answer; REST_FRAMEWORK's EXCEPTION_HANDLER."""
    request: Request = context["request"]
    if isinstance(error, RpcException):
        view, method = context.get("view"), (request.method or "").lower()
        # HEAD runs the declaration of GET.
        call = view.calls.get("get" if method == "head" else method) if isinstance(view, RpcView) else None
        body = _rpc_problem(error, request.path, call.service if call else None)
        headers = {"Retry-After": str(body["retry_after"])} if "retry_after" in body else {}
        if error.status_code == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, RequestDataTooBig):
        body, headers = problem(413, "body-too-large", request.path, "The body is too large."), {}
    else:
        response = drf_exception_handler(error, context)
        if response is None:
            return None
        body = _http_problem(error, response.status_code, request.path)
        if "Retry-After" in response:
            body["retry_after"] = int(response["Retry-After"])
        headers = {name: response[name] for name in ("WWW-Authenticate", "Retry-After", "Allow") if name in response}
    # The browsable page is HTML whatever it shows.
    renderer = getattr(request, "accepted_renderer", None)
    content_type = PROBLEM if renderer is None or renderer.format == "json" else None
    return Response(body, status=body["status"], headers=headers, content_type=content_type)


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Answer 400 for what is refused before any view; the URLconf's handler400."""
    return JsonResponse(problem(400, "bad-request", request.path), status=400, content_type=PROBLEM)


def server_error(request: HttpRequest) -> HttpResponse:
    """Answer 500 without telling why; the URLconf's handler500."""
    return JsonResponse(problem(500, "internal", request.path), status=500, content_type=PROBLEM)


def problem(status: int, code: str, path: str, detail: str = "", **more: Any) -> dict[str, Any]:
    """Return the members of a problem document (RFC 9457); what is empty is left out."""
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    members = {
        "type": f"/problems/{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": path,
        "code": code,
        "retryable": status in (429, 503, 504),
        **more,
    }
    return {name: value for name, value in members.items() if value not in ("", None, [])}


def only_versioned(endpoints: list[tuple[str, str, str, Any]]) -> list[tuple[str, str, str, Any]]:
    """Leave the unversioned twins of /api/v1 out of the OpenAPI document."""
    return [endpoint for endpoint in endpoints if endpoint[0].startswith("/api/v1/")]


def _rpc_problem(error: RpcException, path: str, service: str | None) -> dict[str, Any]:
    status = error.status_code
    return problem(
        status,
        error.code,
        path,
        "" if error.message == INTERNAL else error.message,
        errors=error.errors,
        service=service,
        retryable=error.retryable,
        retry_after=error.retry_after,
    )


def _http_problem(error: Exception, status: int, path: str) -> dict[str, Any]:
    if isinstance(error, exceptions.ValidationError):
        return problem(status, "invalid", path, "The data is not valid.", errors=error_fields(error))
    if isinstance(error, Http404):
        return problem(status, "not-found", path)
    if isinstance(error, PermissionDenied):
        return problem(status, "permission-denied", path)
    codes = error.get_codes() if isinstance(error, exceptions.APIException) else "error"
    code = codes.replace("_", "-") if isinstance(codes, str) else "error"
    return problem(status, code, path, str(getattr(error, "detail", "")))


def error_fields(error: exceptions.ValidationError) -> list[dict[str, Any]]:
    """Return each error with the JSON pointer (RFC 6901) of its field."""
    return _fields(error.get_full_details())


def _fields(details: Any, pointer: str = "") -> list[dict[str, Any]]:
    if _is_error(details):
        return [{"pointer": pointer, "message": str(details["message"]), "code": details["code"]}]
    if isinstance(details, dict):
        pairs = [("" if key == "non_field_errors" else f"/{_escaped(key)}", value) for key, value in details.items()]
    else:
        # A list of errors belongs to its field; a list of items has an index for each.
        leaves = all(_is_error(item) for item in details)
        pairs = [("" if leaves else f"/{index}", item) for index, item in enumerate(details)]
    return [field for suffix, value in pairs for field in _fields(value, pointer + suffix)]


def _is_error(details: Any) -> bool:
    # Fields may have these names too, but then each holds a list of errors.
    return isinstance(details, dict) and set(details) == {"message", "code"} and isinstance(details["code"], str)


def _escaped(key: Any) -> str:
    return str(key).replace("~", "~0").replace("/", "~1")


def _looked_up(lookup: Lookup, data: Mapping[str, Any]) -> dict[str, Any]:
    found = clients[lookup.service].sync.send(lookup.pattern, {"id": data[lookup.id]})
    return {field: found[field] for field in lookup.fields}


def _valid(shape: Shape | None, given: Any) -> dict[str, Any]:
    if shape is None:
        return {}
    serializer = shape(data=given)
    serializer.is_valid(raise_exception=True)
    return dict(serializer.validated_data)


def _shaped(call: Send, value: Any, *, many: bool = False) -> Any:
    if call.returns is None:
        return value
    if value is None:  # to DRF that is an empty form, which it would fill with blanks
        raise _bad_answer(call)
    try:
        return call.returns(value, many=many).data
    except (KeyError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise _bad_answer(call) from error


def _page(call: Send, reply: Any) -> dict[str, Any]:
    items = reply.get(call.page) if isinstance(reply, Mapping) else None
    if not isinstance(items, list):
        raise _bad_answer(call)
    return {"data": _shaped(call, items, many=True), "next": reply.get("next")}


def _bad_answer(call: Send) -> RpcException:
    message = f"{call.service} answered in another shape than expected."
    return RpcException({"statusCode": 502, "code": "bad-answer", "message": message})


def _method(call: Send) -> Any:
    def method(self: RpcView, request: Request, **path: Any) -> Response:
        return self.answer(call, request, path)

    return method


def _documented(call: Send, method: Any, name: str) -> Any:
    shape: Any = call.returns
    if call.page is not None and call.returns is not None:
        items = call.returns(many=True)
        following = serializers.CharField(allow_null=True, help_text="The cursor of the next page.")
        shape = type(f"{call.returns.__name__}Page", (serializers.Serializer,), {"data": items, "next": following})
    return extend_schema(
        operation_id=name,
        summary=call.summary or None,
        tags=[call.service],
        parameters=[call.query] if call.query else None,
        request=call.body,
        responses={call.status: shape, ("default", PROBLEM): ProblemSerializer},
    )(method)
