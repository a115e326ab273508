"""A worker as the launcher starts it, from a file: `python worker.py ...` is `python -m tdpo_cli ...`."""

from tdpo_cli import cli

cli.main()
