"""The local speech server seen from a command: text becomes telephone audio, telephone audio becomes text.

Cartesia docs, POST /tts/bytes; Deepgram docs, POST /v1/listen for pre-recorded audio.
"""

import os
from urllib.parse import urljoin

import httpx
import msgspec
import trio

URL_VARIABLE = "DIALOG_LOCAL_URL"
DEFAULT_URL = "http://127.0.0.1:8070"
SECONDS = 60.0  # for one request: the server may be loading, or busy with others
_POLL_SECONDS = 0.05  # while a server starts
_KEY = "local"  # the local server takes any


class SpeechUnavailable(Exception):
    """The speech server cannot be used; the message says why, and what to do."""


class SpeechClient:
    """Asks the speech server at `url`, by default the one that the environment names. Use as an async context manager."""

    def __init__(self, url: str = "") -> None:
        self._url = url or os.environ.get(URL_VARIABLE, DEFAULT_URL)
        self._client = httpx.AsyncClient(base_url=self._url, timeout=SECONDS, trust_env=False)

    async def __aenter__(self) -> "SpeechClient":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.aclose()

    async def started(self, within: float) -> None:
        """Wait until the models are loaded, at most so many seconds."""
        await started(self._url, within)

    async def say(self, text: str) -> bytes:
        """Return mu-law audio at 8 kHz. Raises `SpeechUnavailable`."""
        body = {
            "model_id": "sonic-2",
            "transcript": text,
            "voice": {"mode": "id", "id": "default"},
            "output_format": {"container": "raw", "encoding": "pcm_mulaw", "sample_rate": 8000},
        }
        headers = {"X-API-Key": _KEY, "Cartesia-Version": "2026-08-14", "Content-Type": "application/json"}
        return (await self._post("/tts/bytes", msgspec.json.encode(body), headers)).content

    async def recognise(self, audio: bytes) -> str:
        """Return what is said in mu-law audio at 8 kHz, "" for nothing. Raises `SpeechUnavailable`."""
        headers = {"Authorization": f"Token {_KEY}", "Content-Type": "audio/basic"}
        answer = await self._post("/v1/listen?encoding=mulaw&sample_rate=8000", audio, headers)
        try:
            return str(answer.json()["results"]["channels"][0]["alternatives"][0]["transcript"])
        except (ValueError, LookupError, TypeError) as error:
            raise SpeechUnavailable(f"{self._url}/v1/listen answered what is no transcript: {answer.text[:200]}") from error

    async def _post(self, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        try:
            answer = await self._client.post(path, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise SpeechUnavailable(
                f"no speech server answers at {self._url} ({error or type(error).__name__}); start one with: "
                f"python -m dialog_local, or set {URL_VARIABLE}"
            ) from error
        if answer.is_error:
            raise SpeechUnavailable(f"{self._url}{path} answered HTTP {answer.status_code}: {answer.text[:200]}")
        return answer


async def started(url: str, within: float) -> None:
    """Wait until the server that `url` leads to says that it is healthy, at most so many seconds: the next request tells."""
    health = urljoin(url, "/healthz")
    with trio.move_on_after(within):
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                try:
                    if (await client.get(health)).is_success:
                        return
                except httpx.HTTPError:
                    pass  # not yet
                await trio.sleep(_POLL_SECONDS)
