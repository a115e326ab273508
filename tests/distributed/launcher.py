"""`launcher.py WORKER ARGUMENTS...` is `tdpo ARGUMENTS...`, with workers that are forks and run the file WORKER."""

import subprocess
import sys
import types

import nursery

from tdpo_cli import cli
from tdpo_cli.machine import launch

launch.PROGRAM = (sys.argv.pop(1),)
launch.subprocess = types.SimpleNamespace(Popen=nursery.Fork, PIPE=subprocess.PIPE)
cli.main()
