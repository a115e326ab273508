"""How each of the sandbox's models is trained; `python -m tdpo_cli.sandbox.build` runs them."""
