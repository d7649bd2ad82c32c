"""Whether W&B has an account to log to, without asking anybody."""

from __future__ import annotations

import logging
import os
from configparser import ConfigParser
from configparser import Error as ConfigError
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["offline_without_account"]

logger = logging.getLogger(__name__)

PUBLIC_SERVER = "https://api.wandb.ai"
ACCOUNT_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def offline_without_account() -> bool:
    """Switch W&B to offline mode for this process and its children if no account is set up.

    Without this, W&B stops and asks at a terminal, and raises an error elsewhere. Call it before the first
    ``WandbLogger`` is made. A mode that the user chose, by ``WANDB_MODE`` or ``wandb offline``, is respected, and an
    account counts wherever W&B itself looks for one: in its environment variables and in the netrc file.

    Returns:
        Whether the mode was switched.
    """
    settings = _settings()
    if os.environ.get("WANDB_MODE") or settings.get("mode") or any(map(os.environ.get, ACCOUNT_VARIABLES)):
        return False
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or PUBLIC_SERVER
    if _in_netrc(urlsplit(server).netloc):
        return False
    os.environ["WANDB_MODE"] = "offline"
    logger.info("No W&B account is set up; runs are kept offline and can be sent later with 'wandb sync'.")
    return True


def _settings() -> dict[str, str]:
    """W&B's settings files: the user's, and on top of them that of the working folder."""
    named = os.environ.get("WANDB_CONFIG_DIR")
    users = [Path(named)] if named else _at_home("~/.config/wandb")
    folder = Path(os.environ.get("WANDB_DIR") or ".")
    values: dict[str, str] = {}
    for path in (*(place / "settings" for place in users), folder / "wandb" / "settings"):
        values |= _read_settings(path)
    return values


def _read_settings(path: Path) -> dict[str, str]:
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
    except (ConfigError, OSError, UnicodeDecodeError):
        logger.debug("Could not read %s", path, exc_info=True)
    return dict(parser["default"]) if parser.has_section("default") else {}


def _in_netrc(host: str) -> bool:
    named = os.environ.get("NETRC")
    return any(_knows(path, host) for path in _at_home(*([named] if named else ["~/.netrc", "~/_netrc"])))


def _at_home(*names: str) -> list[Path]:
    """The paths whose ``~`` is known: a process in a container may be nobody, without a home."""
    paths = (os.path.expanduser(name) for name in names)
    return [Path(path) for path in paths if not path.startswith("~")]


def _knows(path: Path, host: str) -> bool:
    try:
        return netrc(path).authenticators(host) is not None
    except (OSError, UnicodeDecodeError, NetrcParseError):
        return False
