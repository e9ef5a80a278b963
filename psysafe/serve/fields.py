"""The fields of a request, read one by one, each with its type and range; and errors in OpenAI's shape."""

from collections.abc import Collection, Mapping

from psysafe.cli import hint, shown

# What an error is called, by status. 499 is never sent: it is how a client that has left stands in the log.
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A request that gets an error instead of an answer. param: the field at fault; code: for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        # The name of an unknown field is the client's, and may hold half a surrogate pair, which UTF-8 has not.
        param = None if self.param is None else self.param.encode(errors="replace").decode()
        return {"error": {"message": self.message, "type": kind, "param": param, "code": self.code}}


def invalid(param: str, value: object, expected: str) -> ApiError:
    """The 400 for a field's value."""
    return ApiError(400, f"{param} is {shown(value)}, expected {expected}", param, "invalid_value")


class Fields:
    """A JSON object whose fields are taken one by one; `end` refuses those that nobody has taken. A field that is null
    counts as absent. prefix: where the object stands in the request. Every method raises ApiError (400) for a value of
    another type or out of range."""

    def __init__(self, values: object, prefix: str = ""):
        self.prefix = prefix
        if not isinstance(values, dict):
            raise invalid(prefix.rstrip(".") or "the request", values, "an object")
        self.values = {name: value for name, value in values.items() if value is not None}

    def require(self, name: str, expected: str) -> None:
        if name not in self.values:
            param = self.prefix + name
            raise ApiError(400, f"{param} is missing, expected {expected}", param, "missing")

    def take(self, name: str, default: object = None) -> object:
        return self.values.pop(name, default)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if type(value) is not bool:
            raise invalid(self.prefix + name, value, "true or false")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name, default)
        # True is an int; NaN is in no range.
        if type(value) not in (int, float) or not low <= value <= high:
            raise invalid(self.prefix + name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.take(name, default)
        if type(value) is not int or not low <= value <= high:
            raise invalid(self.prefix + name, value, f"a whole number from {low} to {high}")
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self.take(name, default)
        if not isinstance(value, str):
            raise invalid(self.prefix + name, value, "a text")
        return value

    def list(self, name: str, expected: str) -> list:
        value = self.take(name, [])
        if not isinstance(value, list):
            raise invalid(self.prefix + name, value, expected)
        return value

    def end(self, known: Collection[str], harmless: Collection[str], unsupported: Mapping[str, tuple]) -> None:
        """Refuses what is left, unless it is harmless. unsupported: field -> its values that ask for nothing."""
        for name, value in self.values.items():
            param = self.prefix + name
            if name in harmless or (name in unsupported and value in unsupported[name]):
                continue
            if name in unsupported:
                raise ApiError(400, f"{param} is not supported here; leave it out", param, "unsupported_parameter")
            suggestion = hint(name, known)
            raise ApiError(400, f"unknown field {shown(param)}{suggestion}", param[:100], "unknown_parameter")
