"""Rewards that are a user's own function: `module:function` or `path/file.py:function`.

The function takes (images [b,3,H,W] float in [0,1], prompts) and gives [b] numbers. Nothing else is asked of it.
"""

from __future__ import annotations

import contextlib
import dis
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.errors import RewardError, WorkError
from tdpo_cli.rewards import files

Score = Callable[[Tensor, Sequence[str]], Any]


class FunctionReward:
    """A function as a reward."""

    def __init__(self, name: str, function: Score, needs_prompt: bool):
        self.name = name
        self.function = function
        self.needs_prompt = needs_prompt

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1] -> [b] float32. NaN passes through: what to do about it is the caller's business.

        Raises RewardError where the function does not give one number per image.
        """
        # a copy, which the function may change
        with _guarded(f"reward {self.name}", WorkError):
            result = self.function(images.clone(), list(prompts))
        if isinstance(result, Tensor) and result.is_complex():
            raise RewardError(f"reward {self.name} gave complex numbers, expected [b] real ones")
        try:
            scores = torch.as_tensor(result, dtype=torch.float32, device=images.device).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(f"reward {self.name} gave a {type(result).__name__}, expected [b] numbers") from error
        if scores.shape != (len(images),):
            raise RewardError(f"reward {self.name} gave shape {list(scores.shape)}, expected [{len(images)}], one per image")
        return scores

    def describe(self) -> dict[str, Any]:
        source = _source_file(self.function)
        return {
            "checkpoint": None,
            "sha256": files.fingerprints(source) if source else {},
            "variant": "tdpo",
            "preprocessing": {"resize": None},
            "scale": "the function's own",
        }


def custom(spec: str) -> FunctionReward:
    """`module:function`, also from the working directory, or `path/file.py:function`. Raises RewardError.

    Whether prompts are needed is the function's attribute `needs_prompt`, else whether it reads its second argument.
    """
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute:
        raise RewardError(f"custom reward {spec!r} should be module:function or path/file.py:function")
    module = _from_file(Path(place).expanduser(), spec) if place.endswith(".py") else _from_module(place, spec)
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(f"{place} has no function {attribute!r}; it has: {', '.join(functions) or 'none'}")
    return FunctionReward(spec, function, getattr(function, "needs_prompt", _reads_second_argument(function)))


def _from_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"custom reward {spec!r}: there is no file {path.absolute()}")
    loader = importlib.util.spec_from_file_location(f"tdpo_custom_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(loader)
    sys.path.insert(0, str(path.parent.absolute()))  # its neighbours can be imported, as when it is run as a script
    try:
        with _guarded(f"custom reward {spec!r}: importing {path}", RewardError):
            loader.loader.exec_module(module)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"custom reward {spec!r}: importing {path} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _from_module(name: str, spec: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # an installed command does not have it, unlike `python -m`
    try:
        with _guarded(f"custom reward {spec!r}: importing {name}", RewardError):
            return importlib.import_module(name)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"custom reward {spec!r}: importing {name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)


class _Aside:
    """Standard error in place of standard output, which belongs to --json; closing it closes nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def close(self) -> None:
        """Leave it open."""


@contextlib.contextmanager
def _guarded(what: str, error: type[Exception]) -> Iterator[None]:
    """A user's code: it may print, and it cannot end the program."""
    try:
        with contextlib.redirect_stdout(_Aside()):
            yield
    except SystemExit as left:
        raise error(f"{what}: it called sys.exit({left.code!r}); a reward returns numbers.") from None


def _reads_second_argument(function: Score) -> bool:
    """Whether a plain function's code uses its second parameter; assumed of any other callable."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_argcount < 2:
        return True
    name = code.co_varnames[1]
    used = (instruction.argval for instruction in dis.get_instructions(code))
    return any(name == value or (isinstance(value, tuple) and name in value) for value in used)


def _source_file(function: Score) -> Path | None:
    try:
        return Path(inspect.getsourcefile(function) or "")
    except TypeError:
        return None
