"""What the REST API refuses: its error document, and the faults that a test or a demonstration has it show."""

from typing import Literal, TypeAlias

import trio
from starlette.responses import JSONResponse

Resource: TypeAlias = Literal["Calls", "Recordings", "Transcriptions"]  # by the name that stands in the request's path


class RestError(Exception):
    """A REST request that is refused: the HTTP status, Twilio's number for the error, and why."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def response(self) -> JSONResponse:
        """Return Twilio's error document."""
        more_info = f"https://www.twilio.com/docs/errors/{self.code}"
        body = {"code": self.code, "message": str(self), "more_info": more_info, "status": self.status}
        return JSONResponse(body, self.status)


class Faults:
    """What is wrong with a REST API from now on; at first nothing. Set what should go wrong, at any time.

    `busy` more requests are answered with 429/20429 (Twilio docs: not processed, may be sent again). While `out`, all are
    answered with 503; those that come while `silent` never get an answer. `refusals` has the error that requests for a
    resource are answered with.
    """

    def __init__(self) -> None:
        self.busy = 0
        self.out = False
        self.silent = False
        self.refusals: dict[Resource, RestError] = {}

    async def strike(self, resource: Resource) -> None:
        """Have a request fare as it should. Raises `RestError`."""
        if self.silent:
            await trio.sleep_forever()
        if self.out:
            raise RestError(503, 20503, "Service Unavailable")
        if self.busy:
            self.busy -= 1
            raise RestError(429, 20429, "Too Many Requests")
        if resource in self.refusals:
            raise self.refusals[resource]
