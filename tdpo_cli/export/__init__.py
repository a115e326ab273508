"""`tdpo export`: a checkpoint in the format of another program."""
