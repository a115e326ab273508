"""What can go wrong, by who can repair it: the request (exit status 2) or the work itself (exit status 1)."""


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
