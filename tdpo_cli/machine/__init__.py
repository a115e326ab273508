"""The computer: processes, memory, signals, transfers."""
