"""Images from a policy."""
