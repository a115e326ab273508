"""What can go wrong, by who can repair it: the request (exit status 2) or the work itself (exit status 1)."""

import re
from urllib.parse import urlsplit

_PASSWORD = re.compile(r"(?<=://)[^\s/?#'\"]*@")


class RequestError(ValueError):
    """The request was wrong. The message says what was seen, what was expected and what to do."""


class RewardError(RequestError):
    """A reward cannot be had as asked: the message names the file, key, shape or name, and what to do."""


class WorkError(RuntimeError):
    """The request was fine and the work failed. The message names the step and what is safe on disk."""


class LostPeer(WorkError):
    """Another process of the run is gone or silent: a consequence, the cause lies with that process."""


def described(error: BaseException) -> str:
    """What went wrong inside something else: our own messages as they are, others with their kind."""
    return str(error) if isinstance(error, WorkError) else f"{type(error).__name__}: {error}"


def first_line(error: BaseException | None, otherwise: str | None = None) -> str:
    """What an error says first; `otherwise`, or the name of its kind, where it says nothing."""
    return (str(error).strip() or otherwise or type(error).__name__).splitlines()[0]


def holds_password(address: str) -> bool:
    """Whether an address has a user or a password: nothing that is written or printed may hold one."""
    try:
        parts = urlsplit(address)
        _ = parts.port  # is looked at only when it is asked for
        return "@" in parts.netloc
    except ValueError:  # a password with a slash looks like a port
        return "@" in address


def without_password(text: str) -> str:
    """The text with *** for the user and the password of every address in it."""
    return _PASSWORD.sub("***@", text) if "://" in text else text


def without_secrets(address: str) -> str:
    """An address with *** for its user, password, query and fragment."""
    return re.sub(r"[?#].*", "?***", re.sub(r"(?<=://).*@", "***@", address))
