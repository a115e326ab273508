"""The command line: thin commands, one file each, heavy imports inside them; here the app and its exit statuses."""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from tdpo_cli import __version__
from tdpo_cli.cli import cross_eval, doctor, export, presets, report, runs, sample, score, serve, train
from tdpo_cli.console import printable
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.machine import launch

app = typer.Typer(
    name="tdpo",
    help="Fine-tune text-to-image diffusion models against reward models with TDPO, TDPO-R, DDPO or GRPO, "
    "and see when the reward is being over-optimised.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "train": train.train, "sample": sample.sample, "score": score.score, "cross-eval": cross_eval.cross_eval, "doctor": doctor.doctor,
    "presets": presets.list_or_show, "report": report.report, "runs": runs.runs, "export": export.export,
    "serve": serve.serve,
}  # fmt: skip
EXAMPLES = {
    "train": ["tdpo train --preset hpsv2 --gpus 8", "tdpo train --preset sdxl-pickscore --dry-run", "tdpo train --preset hpsv2 --out RUN --resume"],
    "sample": ['tdpo sample RUN "a red fox" --per-prompt 8', "tdpo sample base prompts.txt --preset quickstart"],
    "score": ["tdpo score FOLDER --rewards all", "tdpo score FOLDER --rewards hpsv2 --prompts prompts.txt --out scores.csv"],
    "cross-eval": ["tdpo cross-eval RUN --per-prompt 4", "tdpo cross-eval RUN OTHER_RUN"],
    "doctor": ["tdpo doctor --preset hpsv2", "tdpo doctor --preset hpsv2 --fetch"],
    "presets": ["tdpo presets hpsv2", "tdpo presets --keys"],
    "report": ["tdpo report RUN", "tdpo report RUN OTHER_RUN --out comparison.html"],
    "runs": ["tdpo runs", "tdpo runs /shared/runs --json"],
    "export": ["tdpo export RUN --format kohya"],
    "serve": ["tdpo serve hpsv2 imagereward --port 8765"],
}
for _name, _command in COMMANDS.items():
    app.command(_name, epilog="\n\n".join(["Examples:", *EXAMPLES[_name]]))(_command)
# what the system answers to a path that no file can have
IMPOSSIBLE_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)


def main() -> None:
    """Run the command line with the exit status of the contract: 0 done, 1 the work failed, 2 the request was wrong."""
    signal.signal(signal.SIGTERM, _terminated)
    launch.end_with_launcher()
    try:
        _check_text(sys.argv[1:])
        status = app(standalone_mode=False)
        code = status if isinstance(status, int) else 0
        if code in (130, 143):  # the parser's own answer to Ctrl-C; workers that were stopped
            _stopped(code)
    except KeyboardInterrupt:
        code = _stopped(130)
    except _Terminated:
        code = _stopped(143)
    except RequestError as error:
        code = _failed(error, 2)
    except WorkError as error:
        code = _failed(error, 1)
    except Exception as error:  # noqa: BLE001 - what typer's own parser raises has a message and an exit status
        if isinstance(error, OSError) and error.errno in IMPOSSIBLE_PATHS and error.filename is not None:
            raise SystemExit(_failed(f"{error.filename}: {error.strerror}", 2)) from None
        if not hasattr(error, "format_message"):
            if launch.last_words(error, traceback.format_exc()):
                raise SystemExit(1) from None
            raise
        code = _failed(error.format_message(), getattr(error, "exit_code", 2))
    sys.stdout.flush()
    raise SystemExit(code)


def _check_text(arguments: list[str]) -> None:
    """RequestError for an argument that is not text: nothing could write it down again."""
    for argument in arguments:
        if not argument.isprintable():  # surrogates stand for bytes that are not UTF-8
            try:
                argument.encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError(f"{argument!r}: not UTF-8 text. Rename the file, or write the argument in UTF-8.") from None


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminated(signum: int, frame: Any) -> None:
    raise _Terminated


def _stopped(code: int) -> int:
    if launch.last_words(None, "stopped."):
        return code  # the launcher says it once
    training = "train" in sys.argv[1:2]
    how = "Finished epochs are on disk; continue with tdpo train --resume --out RUN." if training else "What was finished is on disk."
    print(f"\ntdpo: stopped. {how}", file=sys.stderr)
    return code


def _failed(message: object, code: int) -> int:
    if not launch.last_words(message if isinstance(message, BaseException) else None, str(message)):
        print(f"tdpo: {printable(str(message))}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"tdpo {__version__}")
        raise typer.Exit
