"""Schedules and the Gaussian step of each kind of diffusion."""
