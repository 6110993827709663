"""docs/configuration.md: its tables are made from the code, and its example uses every key there is."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from dialog_supervisor.config import load
from dialog_supervisor.sections import Tables
from scripts import configuration_tables
from tests.docs.page import blocks, sections, tables

PAGE = "configuration.md"
KEYS = {section.name: list(section.type.__struct_fields__) for section in msgspec.structs.fields(Tables)}


def test_the_tables_are_what_the_code_says() -> None:
    written = configuration_tables.PAGE.read_text(encoding="utf-8")
    assert written == configuration_tables.renewed(written), f"run {configuration_tables.COMMAND}"


def test_the_script_says_when_the_page_is_stale_and_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / PAGE
    page.write_text(f"Before.\n{configuration_tables.BEGIN}stale\n{configuration_tables.END}After.\n")
    monkeypatch.setattr(configuration_tables, "PAGE", page)
    assert configuration_tables.main(["--check"]) == 1
    assert capsys.readouterr().err.endswith("run scripts/configuration\n")
    assert configuration_tables.main([]) == 0
    assert configuration_tables.main(["--check"]) == 0
    assert page.read_text().startswith("Before.\n")
    assert "`request_size_limit`" in page.read_text()
    assert page.read_text().endswith("After.\n")


def test_a_page_without_a_place_for_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="to stand between"):
        configuration_tables.renewed("Nothing here.\n")


def test_every_key_has_a_row() -> None:
    rows = [row for table in tables(sections(PAGE)["Every key"]) for row in table if row[0] != "key"]
    assert [row[0].strip("`") for row in rows] == [key for keys in KEYS.values() for key in keys]


def test_the_example_has_every_key_and_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [example] = [block.text for block in blocks(PAGE) if block.language == "toml"]
    assert {name: list(table) for name, table in tomllib.loads(example).items()} == KEYS
    (tmp_path / "receptionist").mkdir()
    for directory in ("keys", "models", "notes"):
        (tmp_path / directory).mkdir()
    for file in ("fullchain.pem", "privkey.pem"):
        (tmp_path / file).touch()
    for file in ("keys/cartesia", "deepgram"):
        (tmp_path / file).write_text("a key\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dialog.toml").write_text(example)
    environ = {"TWILIO_AUTH_TOKEN": "the-token", "OPENAI_API_KEY": "k", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    config = load(tmp_path / "dialog.toml", environ)
    assert config.agent_environ()["CARTESIA_API_KEY"] == "a key"
