"""Fine-tune text-to-image diffusion models against reward models with TDPO and TDPO-R."""

__version__ = "0.2.0"
