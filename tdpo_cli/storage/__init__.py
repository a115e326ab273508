"""Files written whole or not at all; the run folder."""
