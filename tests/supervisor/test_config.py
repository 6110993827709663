"""dialog.toml: what it may say, and that every mistake is answered with file, key, value and remedy, never with a secret."""

from pathlib import Path

import pytest

from dialog_supervisor.config import ConfigError, load
from dialog_supervisor.sections import Secret
from tests.supervisor.configuration import ENVIRON, GATEWAY, SID, TOKEN, TWILIO, Write, refusal, writer


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


# What is right


def test_the_smallest_configuration_has_defaults_for_the_rest(write: Write) -> None:
    config = load(write(), ENVIRON)
    assert config.gateway.listen == "127.0.0.1:8080"
    assert config.agent.entry == "agent:create"
    assert config.calls.silence_timeout == 10
    assert config.fallback.say
    assert config.log.level == "info"
    assert not config.log.transcripts


def test_the_agents_directory_is_relative_to_the_file(write: Write, tmp_path: Path) -> None:
    assert load(write(), ENVIRON).agent_path == tmp_path / "agent"


def test_a_relative_file_is_found_from_the_working_directory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write()
    monkeypatch.chdir(file.parent)
    assert load("dialog.toml", ENVIRON).file == file


def test_whole_numbers_do_for_seconds(write: Write) -> None:
    assert load(write("[calls]\nsilence_timeout = 7"), ENVIRON).calls.silence_timeout == 7.0


# Secrets


def test_a_secret_by_environment(write: Write) -> None:
    assert load(write(), ENVIRON).twilio.auth_token == TOKEN


def test_a_secret_by_file_is_relative_and_loses_its_newline(write: Write, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    file = write(twilio=f'account_sid = "{SID}"\nauth_token = "file:token"')
    assert load(file, {}).twilio.auth_token == TOKEN


def test_a_secret_by_systemd_credential(write: Write, tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "twilio").write_text(TOKEN)
    file = write(twilio=f'account_sid = "{SID}"\nauth_token = "credential:twilio"')
    assert load(file, {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}).twilio.auth_token == TOKEN


def test_a_secret_may_be_the_value_itself(write: Write) -> None:
    file = write(twilio=f'account_sid = "{SID}"\nauth_token = "{TOKEN}"')
    assert load(file, {}).twilio.auth_token == TOKEN


def test_dotenv_beside_the_file_is_read(write: Write, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"TWILIO_AUTH_TOKEN={TOKEN}\n")
    assert load(write(), {}).twilio.auth_token == TOKEN


def test_the_real_environment_wins_over_dotenv(write: Write, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TWILIO_AUTH_TOKEN=another\nONLY_HERE=1\n")
    config = load(write(), ENVIRON)
    assert config.twilio.auth_token == TOKEN
    assert config.environ["ONLY_HERE"] == "1"


def test_the_process_environment_is_the_default(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", TOKEN)
    assert load(write()).twilio.auth_token == TOKEN


def test_no_repr_shows_a_secret(write: Write) -> None:
    config = load(write('[agent.env]\nOPENAI_API_KEY = "sk-secret"'), ENVIRON)
    for part in (config, config.twilio, config.agent, config.environ, Secret("sk-secret")):
        assert TOKEN not in repr(part)
        assert "sk-secret" not in repr(part)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("env:NOT_SET", "the environment variable NOT_SET is not set; set it, or put it in "),
        ("file:nowhere", "nowhere cannot be read: No such file or directory"),
        ("file:agent", "agent cannot be read: Is a directory"),
        ("file:empty", "empty is empty"),
        ("file:", "a path is missing"),
        ("file:~no such user/token", "there is no home directory for ~no such user/token; write the whole path"),
        ("credential:twilio", "there is no CREDENTIALS_DIRECTORY; run under systemd with LoadCredential="),
        ("", "it is empty; write env:NAME, file:PATH, credential:NAME, or the value"),
    ],
)
def test_a_reference_to_nothing_says_what_is_missing(write: Write, tmp_path: Path, reference: str, reason: str) -> None:
    (tmp_path / "empty").write_text("\n")
    said = refusal(write(twilio=f'account_sid = "{SID}"\nauth_token = "{reference}"'))
    assert said.startswith("twilio.auth_token: ")
    assert reason in said


def test_a_credential_that_systemd_does_not_have_names_its_file(write: Write, tmp_path: Path) -> None:
    file = write(twilio=f'account_sid = "{SID}"\nauth_token = "credential:twilio"')
    assert f"{tmp_path / 'twilio'} cannot be read" in refusal(file, {"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_an_unreadable_dotenv_is_named(write: Write, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"A=\xff\xfe")
    with pytest.raises(ConfigError, match=r"\.env: cannot be read"):
        load(write(), ENVIRON)


# Mistakes


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    assert refusal(tmp_path / "dialog.toml") == "no such file; name your configuration with -c FILE"


def test_a_file_that_is_a_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "cannot be read: Is a directory"


@pytest.mark.parametrize("text", ["[gateway", "a = ", "\x00", f"auth_token = {TOKEN}"])
def test_a_file_that_is_not_toml(write: Write, text: str) -> None:
    assert refusal(write(text=text)).startswith("is not valid TOML: ")


def test_a_file_that_is_not_utf8(write: Write) -> None:
    file = write()
    file.write_bytes(b'a = "\xff"')
    assert refusal(file).startswith("is not valid TOML: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'gateway is missing; add it, for example:\n[gateway]\npublic_url = "https://voice.example.com"'),
        ("[gateway]", 'gateway.public_url is missing; add it, for example: public_url = "https://voice.example.com"'),
        (f"[gateway]\n{GATEWAY}", "twilio is missing; add it, for example:\n[twilio]"),
        (f"[gateway]\n{GATEWAY}\n[twilio]\n{TWILIO}", "agent is missing; add it, for example:\n[agent]"),
    ],
)
def test_what_is_missing_is_shown_by_example(write: Write, text: str, said: str) -> None:
    assert refusal(write(text=text)).startswith(said)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("[call]", "call is not a known key; did you mean 'calls'?"),
        ("[calls]\nsilence_timout = 5", "calls.silence_timout is not a known key; did you mean 'silence_timeout'?"),
        ("[calls]\nsilence-timeout = 5", "calls.silence-timeout is not a known key; did you mean 'silence_timeout'?"),
        ("[log]\nxyzzy = 1", "log.xyzzy is not a known key; known here: format, level, transcripts"),
    ],
)
def test_an_unknown_key_comes_with_what_was_meant(write: Write, more: str, said: str) -> None:
    assert refusal(write(more)) == said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[log]\nlevel = "verbose"', "log.level = 'verbose': is none of debug, info, notice, warning, error"),
        ('[log]\nformat = "xml"', "log.format = 'xml': is none of auto, json, console"),
        ('[log]\ntranscripts = "yes"', "log.transcripts = 'yes': expected `bool`, got `str`"),
        ('[calls]\nsilence_timeout = "5"', "calls.silence_timeout = '5': expected `float`, got `str`"),
        ("[calls]\nsilence_timeout = 0", "calls.silence_timeout = 0: expected `float` > 0.0"),
        ("[calls]\nsilence_timeout = -1", "calls.silence_timeout = -1: expected `float` > 0.0"),
        ("[calls]\nsilence_timeout = nan", "calls.silence_timeout = nan: expected `float` > 0.0"),
        ('[fallback]\nbusy_dial = "911"', "fallback.busy_dial = '911': is not an E.164 number, such as \"+15551234567\""),
        ('[fallback]\ndial = "911"', "fallback.dial = '911': is not an E.164 number, such as \"+15551234567\""),
        ("[control]\nsocket = 7", "control.socket = 7: expected `str`, got `int`"),
        ('[control]\nsocket = ""', "control.socket = '': a path is missing; write one, relative to this file"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_key_and_what_can(write: Write, more: str, said: str) -> None:
    assert refusal(write(more)) == said


@pytest.mark.parametrize("entry", ["agent", "agent:", ":create", "agent:create:now", "agent/create", "agent:Agent.create"])
def test_an_entry_that_is_not_module_and_function(write: Write, entry: str) -> None:
    said = refusal(write(agent=f'path = "agent"\nentry = "{entry}"'))
    assert said.startswith(f"agent.entry = '{entry}': ")
    assert said.endswith(', for example: entry = "agent:create"')


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("canary = 101", "agent.canary = 101: expected `int` <= 100"),
        ("canary = -1", "agent.canary = -1: expected `int` >= 0"),
        ('canary = "10%"', "agent.canary = '10%': expected `int`, got `str`"),
        ("canary_calls = 0", "agent.canary_calls = 0: expected `int` >= 1"),
        ("canary_margin = 101", "agent.canary_margin = 101: expected `float` <= 100.0"),
        ("canary_margin = nan", "agent.canary_margin = nan: expected `float` >= 0.0"),
    ],
)
def test_a_canarys_rule_that_cannot_be(write: Write, line: str, said: str) -> None:
    assert refusal(write(agent=f'path = "agent"\n{line}')) == said


def test_an_account_sid_of_another_form(write: Write) -> None:
    said = refusal(write(twilio='account_sid = "AC12"\nauth_token = "x"'))
    assert said.startswith("twilio.account_sid = 'AC12': ")
    assert "for example" in said


def test_an_agent_that_is_not_there(write: Write, tmp_path: Path) -> None:
    said = refusal(write(agent='path = "nowhere"'))
    assert (
        said == f"agent.path = 'nowhere': there is no directory {tmp_path / 'nowhere'}; the path is relative to dialog.toml"
    )


def test_certificate_and_key_go_together(write: Write) -> None:
    assert "certificate and key go together" in refusal(write(gateway=f'{GATEWAY}\ncertificate = "c.pem"'))
    assert "certificate and key go together" in refusal(write(gateway=f'{GATEWAY}\nkey = "k.pem"'))


def test_a_certificate_that_is_not_there(write: Write, tmp_path: Path) -> None:
    said = refusal(write(gateway=f'{GATEWAY}\ncertificate = "c.pem"\nkey = "k.pem"'))
    assert said == f"gateway.certificate = 'c.pem': there is no file {tmp_path / 'c.pem'}"


# Errors keep secrets


@pytest.mark.parametrize(
    "twilio",
    [
        f'account_sid = "{TOKEN}"\nauth_token = "{SID}"',
        f'account-sid = "{SID}"\nauth-token = "{TOKEN}"',
        f'account_sid = "{SID}"\nauth_token = ["{TOKEN}"]',
        f'account_sid = ["{TOKEN}"]\nauth_token = "x"',
        f'account_sid = "{SID}"\nauth_tokn = "{TOKEN}"',
        f'account_sid = "{SID}"\nauth_token = "{TOKEN}"\ntimeout = "{TOKEN}"',
        f'account_sid = "{SID}"\nauth_token = "{TOKEN}"\napi_url = "https://{SID}:{TOKEN}@api.twilio.com"',
    ],
)
def test_a_mistake_around_the_token_does_not_show_it(write: Write, twilio: str) -> None:
    assert refusal(write(twilio=twilio)).startswith("twilio.")


def test_a_section_of_the_wrong_shape_is_not_shown(write: Write) -> None:
    text = f'[gateway]\n{GATEWAY}\n[[twilio]]\naccount_sid = "{SID}"\nauth_token = "{TOKEN}"'
    assert refusal(write(text=text)).startswith("twilio: expected `object`, got `array`")


def test_a_mistake_in_the_agents_environment_names_the_variable_and_no_value(write: Write) -> None:
    said = refusal(write('[agent.env]\nDEEPGRAM_API_KEY = "top secret"\nWORKERS = 5'))
    assert said == "agent.env.WORKERS: expected `str`, got `int`"


def test_a_missing_variable_of_the_agents_environment_shows_no_other(write: Write) -> None:
    said = refusal(write('[agent.env]\nA = "top secret"\nB = "env:NOT_SET"'))
    assert said.startswith("agent.env: the environment variable NOT_SET is not set")
    assert "top secret" not in said


def test_a_password_in_a_url_is_not_shown(write: Write) -> None:
    said = refusal(write(gateway='public_url = "https://user:pass@word@voice.example.com"'))
    assert said.startswith("gateway.public_url = 'https://********@voice.example.com': must be a bare origin")


# The agent's environment


def environ_of(file: Path, **more: str) -> dict[str, str]:
    return load(file, ENVIRON | more).agent_environ()


def test_the_agent_gets_the_environment_and_what_is_written_for_it(write: Write) -> None:
    environ = environ_of(write('[agent.env]\nOPENAI_API_KEY = "env:KEY"'), KEY="sk-1", LANG="C")
    assert environ["LANG"] == "C"
    assert environ["OPENAI_API_KEY"] == "sk-1"
    assert type(environ["OPENAI_API_KEY"]) is str


def test_the_environment_wins_over_what_is_written_for_the_agent(write: Write) -> None:
    assert environ_of(write('[agent.env]\nLANG = "de"'), LANG="C")["LANG"] == "C"


def test_the_agent_gets_no_variable_of_a_carriers(write: Write) -> None:
    environ = environ_of(write(), TWILIO_API_KEY_SECRET="x", TELNYX_API_KEY="y")
    assert not [name for name in environ if name.startswith(("TWILIO", "TELNYX"))]


def test_the_agent_gets_no_variable_that_the_token_is_in(write: Write) -> None:
    environ = environ_of(write(), TOKEN_TOO=TOKEN, URL=f"https://{SID}:{TOKEN}@api.twilio.com", CONFIG=f'{{"t":"{TOKEN}"}}')
    assert environ == {"PATH": "/usr/bin", "XDG_RUNTIME_DIR": "/run/user/1"}


def test_the_agent_gets_no_token_from_dotenv(write: Write, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MY_TOKEN={TOKEN}\nDEEPGRAM_API_KEY=d\n")
    environ = load(write(twilio=f'account_sid = "{SID}"\nauth_token = "env:MY_TOKEN"'), {}).agent_environ()
    assert environ == {"DEEPGRAM_API_KEY": "d"}


def test_the_agent_gets_nothing_that_systemd_gave_the_supervisor(write: Write) -> None:
    names = [
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "CREDENTIALS_DIRECTORY",
        "JOURNAL_STREAM",
    ]
    assert not environ_of(write(), **dict.fromkeys(names, "1")).keys() & set(names)


def test_the_token_cannot_be_written_into_the_agents_environment(write: Write) -> None:
    said = refusal(write('[agent.env]\nSMS_TOKEN = "env:TWILIO_AUTH_TOKEN"'))
    assert said == "agent.env.SMS_TOKEN: holds twilio.auth_token, which agent code must not have; remove it"


# Recordings


def test_recordings_go_beside_the_file(write: Write, tmp_path: Path) -> None:
    assert load(write(), ENVIRON).recordings.directory == tmp_path / "recordings"


def test_recordings_go_where_systemd_keeps_a_services_state(write: Write) -> None:
    environ = ENVIRON | {"STATE_DIRECTORY": "/var/lib/dialog:/var/lib/other"}
    assert load(write(), environ).recordings.directory == Path("/var/lib/dialog/recordings")


def test_recordings_go_where_the_file_says(write: Write, tmp_path: Path) -> None:
    environ = ENVIRON | {"STATE_DIRECTORY": "/var/lib/dialog"}
    assert load(write('[recordings]\ndirectory = "kept"'), environ).recordings.directory == tmp_path / "kept"


def test_recordings_are_wav_files_unless_told_otherwise(write: Write) -> None:
    assert load(write(), ENVIRON).recordings.format == "wav"
    assert load(write('[recordings]\nformat = "mp3"'), ENVIRON).recordings.format == "mp3"


def test_where_recordings_go_changes_nothing_else_of_their_table(write: Write) -> None:
    assert load(write("[recordings]\nsize_limit = 5"), ENVIRON).recordings.size_limit == 5


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ('[recordings]\nformat = "ogg"', "recordings.format = 'ogg': is none of wav, mp3"),
        ("[recordings]\nsize_limit = 0", "recordings.size_limit = 0: "),
        ('[recordings]\ndirectory = ""', "recordings.directory = '': a path is missing"),
        ("[recordings]\ndirectory = 5", "recordings.directory = 5: expected `str`"),
        ('[recordings]\nfolder = "here"', "recordings.folder is not a known key; known here: directory, format, size_limit"),
        ("[calls]\ncallbacks_timeout = 0", "calls.callbacks_timeout = 0: "),
        ("[calls]\nfarewell_time = -1", "calls.farewell_time = -1: "),
        ("[calls]\ncallback_timeout = 5", "calls.callback_timeout is not a known key; did you mean 'callbacks_timeout'?"),
    ],
)
def test_a_mistake_about_recordings_or_calls_is_named(write: Write, table: str, reason: str) -> None:
    assert refusal(write(table)).startswith(reason)


def test_what_a_call_is_given_after_its_conversation_is_configured(write: Write) -> None:
    calls = load(write("[calls]\ncallbacks_timeout = 7\nfarewell_time = 3.5"), ENVIRON).calls
    assert (calls.callbacks_timeout, calls.farewell_time) == (7, 3.5)


@pytest.mark.parametrize("key", ["readable", "writable"])
def test_what_agents_may_read_or_write_is_there(write: Write, tmp_path: Path, key: str) -> None:
    said = f"workers.{key}[1] = '{tmp_path / 'nowhere'}': there is no such file or directory"
    assert refusal(write(f'[workers]\n{key} = ["agent", "nowhere"]')) == said
