"""What a person sees while work goes on."""

import io

from rich.console import Console as RichConsole

from tdpo_cli.console import Console, PlainProgress


def test_plain_progress_says_the_beginning_then_a_line_a_minute():
    said, now = [], [0.0]
    progress = PlainProgress("epoch 0: sampling", 100, said.append, lambda: now[0])
    for _ in range(100):
        now[0] += 5  # 500 s in all
        progress.advance()
    assert said[0] == "epoch 0: sampling"
    assert said[1] == "epoch 0: sampling, 12% done, about 7 min 20 s left"  # 12 of 100 after 60 s
    assert len(said) == 1 + 500 // 60


def test_progress_off_a_terminal_is_plain_and_in_the_log(tmp_path):
    console = Console()
    console.rich, console.log = RichConsole(file=io.StringIO()), tmp_path / "log.txt"
    with console.progress("scoring", 2) as advance:
        advance()
        advance(1)
    assert console.rich.file.getvalue() == "scoring\n" == console.log.read_text()


def test_quiet_progress_says_nothing(tmp_path):
    console = Console(quiet=True)
    console.rich, console.log = RichConsole(file=io.StringIO()), tmp_path / "log.txt"
    with console.progress("scoring", 2) as advance:
        advance()
    assert console.rich.file.getvalue() == "" and not console.log.exists()
