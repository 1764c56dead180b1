"""Settings: environment, overrides, and values that are refused in both languages."""

from pathlib import Path

import pytest

from ming_app import entry
from ming_app.errors import UsageError
from ming_app.settings import Settings


def test_environment_then_overrides():
    env = {"MING_MODEL": "ming-moe-0.5b", "MING_PORT": "7001", "MING_CACHE_DIR": "/tmp/somewhere", "OTHER": "x"}
    settings = Settings.load({"model": "ming-moe-1.5b", "threads": None}, env)
    assert (settings.model, settings.port, settings.cache_dir) == ("ming-moe-1.5b", 7001, Path("/tmp/somewhere"))


def test_loopback_by_default_and_open_on_a_space():
    assert Settings.load(env={}).host == "127.0.0.1"
    space = Settings.load(env={"SPACE_ID": "someone/something"})
    assert (space.host, space.port) == ("0.0.0.0", 7860)
    assert Settings.load(env={"SPACE_ID": "a/b", "MING_PORT": "7001"}).port == 7001


@pytest.mark.parametrize(
    "env",
    [
        {"MING_PORT": "x"},
        {"MING_PORT": "70000"},
        {"MING_PRECISION": "3bit"},
        {"MING_DEVICE": "tpu"},
        {"MING_CONTEXT": "1"},
    ],
)
def test_bad_values_are_refused_by_name(env):
    with pytest.raises(UsageError) as caught:
        Settings.load(env=env)
    name = next(iter(env)).removeprefix("MING_").lower()
    assert name in caught.value.message("en").lower() and name in caught.value.message("zh").lower()


def test_the_cache_follows_the_environment_of_the_moment(monkeypatch):
    """The platform's folder is looked up when settings are made, not when the module is first imported."""
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, "/somewhere")
    monkeypatch.setattr("sys.platform", "linux")
    assert Settings().cache_dir == Path("/somewhere/ming-app")


def test_a_context_too_small_for_any_question_is_refused():
    with pytest.raises(UsageError, match="context"):
        Settings(context=255)
    assert Settings(context=256).context == 256


@pytest.mark.parametrize(
    "variables,native,expected",
    [
        ({"LANG": "zh_CN.UTF-8"}, "en_US", "zh"),
        ({"LC_ALL": "en_GB.UTF-8", "LANG": "zh_CN.UTF-8"}, "zh_CN", "en"),
        ({}, "Chinese (Simplified)_China", "zh"),
        ({}, "zh_CN", "zh"),
        ({}, None, "en"),
    ],
)
def test_message_language_follows_the_locale(monkeypatch, variables, native, expected):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("locale.getlocale", lambda: (native, "cp936"))
    assert Settings().message_lang() == expected
    assert Settings(lang="en").message_lang() == "en"


def test_app_explains_a_bad_setting_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setenv("MING_PORT", "many")
    assert entry.main([]) == 2
    assert "MING_PORT" in capsys.readouterr().err


def test_app_takes_the_settings_flags(monkeypatch):
    monkeypatch.setenv("MING_MODEL", "from-environment")
    seen = []
    words = ["--model", "ming-moe-0.5b", "--port", "0", "--host", "::1", "--lang=zh", "--cache-dir", "/tmp/x"]
    assert entry.main(words, serve=lambda settings: seen.append(settings) or 0) == 0
    (settings,) = seen
    assert (settings.model, settings.port, settings.host) == ("ming-moe-0.5b", 0, "::1")
    assert (settings.lang, settings.cache_dir) == ("zh", Path("/tmp/x"))


@pytest.mark.parametrize(
    "words", [["--modle", "x"], ["--mod", "x"], ["--port", "many"], ["--backend", "tpu"], ["extra"]]
)
def test_app_refuses_what_it_does_not_know(words, capsys):
    assert entry.main([*words, "--lang", "zh"], serve=lambda settings: pytest.fail("served")) == 2
    said = capsys.readouterr()
    assert said.err.startswith("错误：") and "python app.py --help" in said.err and said.out == ""
