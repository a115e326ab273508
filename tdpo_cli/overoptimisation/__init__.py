"""Better, or only a higher reward: statistics and verdicts."""
