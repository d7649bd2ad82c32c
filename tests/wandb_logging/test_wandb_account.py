import os

import pytest

from lrf_lightning.wandb_logging.account import offline_without_account


@pytest.fixture(autouse=True)
def stranger(tmp_path, monkeypatch):
    """A home without any account."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.setenv(name, "")  # so that the test's own change is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def test_without_account_the_mode_becomes_offline():
    assert offline_without_account()
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_an_account_in_the_environment_counts(monkeypatch, variable):
    monkeypatch.setenv(variable, "x" * 40)
    assert not offline_without_account()
    assert "WANDB_MODE" not in os.environ


@pytest.mark.parametrize("mode", ["online", "disabled", "offline"])
def test_a_mode_that_was_chosen_stays(monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert not offline_without_account()
    assert os.environ["WANDB_MODE"] == mode


@pytest.mark.parametrize("named", [True, False])
def test_an_account_in_netrc_counts_for_its_server_only(stranger, monkeypatch, named):
    path = stranger / ("accounts" if named else ".netrc")
    path.write_text("machine api.wandb.ai\n  login user\n  password nothing\n")
    path.chmod(0o600)
    if named:
        monkeypatch.setenv("NETRC", str(path))
    assert not offline_without_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert offline_without_account()


def test_settings_files_give_server_and_mode(stranger, monkeypatch):
    (stranger / ".netrc").write_text("machine wandb.example.org\n  login user\n  password nothing\n")
    (stranger / ".netrc").chmod(0o600)
    settings = stranger / "config" / "settings"
    settings.parent.mkdir()
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(settings.parent))
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert not offline_without_account()
    (stranger / ".netrc").unlink()
    settings.write_text("[default]\nmode = offline\n")
    assert not offline_without_account()


def test_a_process_without_a_home_has_no_account(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "USERPROFILE", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert offline_without_account()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", "~/accounts")
    assert offline_without_account()


@pytest.mark.parametrize("text", ["machine", "\udcff"])
def test_damaged_files_are_no_account(stranger, monkeypatch, text):
    (stranger / ".netrc").write_bytes(text.encode("utf-8", "surrogateescape"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(stranger))
    (stranger / "settings").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert offline_without_account()
