"""`python -m tdpo_cli` is the command `tdpo`."""

from tdpo_cli.cli import main

main()
