"""docs/providers.md: its option tables and figures are the adapters' own."""

import inspect
from typing import Any

import pytest

from dialog_worker import CartesiaTTS, DeepgramSTT, ElevenLabsTTS, OpenAIAgent, OpenAISTT, provider
from dialog_worker.agent import completion, tools
from dialog_worker.agent import openai as model
from dialog_worker.stt import buffer, deepgram, openai
from dialog_worker.tts import cartesia, contexts, elevenlabs
from tests.docs.page import DOCS, sections, tables

PAGE = "providers.md"
TEXT = " ".join((DOCS / PAGE).read_text(encoding="utf-8").split())
ADAPTERS = (DeepgramSTT, OpenAISTT, CartesiaTTS, ElevenLabsTTS, OpenAIAgent)
URLS = {"DEEPGRAM_URL": deepgram.URL, "OPENAI_REALTIME_URL": openai.URL, "CARTESIA_URL": cartesia.URL}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_option_table_is_the_signature(adapter: type[Any]) -> None:
    [_, *rows] = next(tables(sections(PAGE)[adapter.__name__]))
    documented = [(name.strip("`"), default.strip("`").replace('"', "'")) for name, default, _ in rows]
    assert documented == [
        (parameter.name, "required" if parameter.default is parameter.empty else repr(parameter.default))
        for parameter in inspect.signature(adapter).parameters.values()
    ], f"mend the table of {adapter.__name__} in docs/{PAGE}"


def test_the_addresses_are_the_defaults() -> None:
    [_, *rows] = next(tables((DOCS / PAGE).read_text(encoding="utf-8")))
    addresses = {variable.strip("`"): default.strip("`") for _, _, variable, default in rows}
    assert addresses == {**URLS, "ELEVENLABS_URL": elevenlabs.URL, "OPENAI_BASE_URL": "https://api.openai.com/v1/"}


@pytest.mark.parametrize("row", next(tables((DOCS / PAGE).read_text(encoding="utf-8")))[1:], ids=lambda row: row[0])
def test_an_adapter_without_its_key_names_the_variable(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter: type[Any] = next(one for one in ADAPTERS if one.__name__ == row[0].strip("`"))
    variables = [name.strip("` ") for name in row[1].split(", else ")]
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    needed = {
        name: "v" if name.startswith("voice") else None
        for name, parameter in inspect.signature(adapter).parameters.items()
        if parameter.default is parameter.empty
    }
    with pytest.raises(ValueError, match=variables[0]):
        adapter(**needed)
    for variable in variables:
        monkeypatch.setenv(variable, "k")
        adapter(**needed)
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    "said",
    [
        f"tried again after {provider.BACKOFF_S:g} s, then twice as long each time, up to {provider.BACKOFF_LIMIT_S:g} s",
        f"up to {provider.WAITED_BACKOFF_S:g} s while somebody waits",
        f"no connection, with TLS and upgrade, within {provider.CONNECT_TIMEOUT_S:g} s",
        f"{provider.GIVE_UP_S:g} s without a connection (`give_up_s`), or {provider.PATIENCE_S:g} s while the caller waits",
        f"the session was not made within {openai.SETUP_S:g} s",
        f"Cartesia is asked again for {contexts.REFUSED_S:g} s",
        f"of which {elevenlabs.LIVE_LIMIT} are used",
        f"`inactivity_timeout={elevenlabs.INACTIVITY_TIMEOUT_S}`",
        f"a KeepAlive every {elevenlabs.KEEP_ALIVE_S:g} s",
        f"no connection within {completion.CONNECT_TIMEOUT_S:g} s",
        f"after {completion.FIRST_CHUNK_TIMEOUT_S:g} s without a first chunk",
        f"after {model.CHUNK_TIMEOUT_S:g} s without a chunk",
        f"after `patience_s` ({OpenAIAgent.patience_s:g} s)",
        f"more than {model.MAX_ROUNDS} times in a turn",
        f"takes over {tools.TOOL_TIMEOUT_S:g} s",
    ],
)
def test_a_figure_is_the_codes(said: str) -> None:
    assert said in TEXT


def test_the_statuses_that_are_tried_again_are_the_codes() -> None:
    *most, last = sorted(provider.RETRYABLE)
    assert f"except {', '.join(map(str, most))} and {last}" in TEXT


@pytest.mark.parametrize("code", sorted(openai.FATAL))
def test_what_is_fatal_at_openai_is_named(code: str) -> None:
    assert code in sections(PAGE)["OpenAISTT"]


@pytest.mark.parametrize(
    ("adapter", "formats"),
    [("DeepgramSTT", buffer.BYTES_PER_SAMPLE), ("OpenAISTT", openai.FORMATS), ("CartesiaTTS", cartesia.BYTES_PER_SAMPLE)],
)
def test_the_formats_are_the_codes(adapter: str, formats: dict[str, Any]) -> None:
    sentence = " ".join(sections(PAGE)[adapter].split()).partition("Formats: ")[2].partition(" at ")[0].rstrip(",")
    assert [name.strip("` ") for name in sentence.split(",")] == list(formats)
