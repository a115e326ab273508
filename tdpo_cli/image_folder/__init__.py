"""A folder of images with prompts, and the file of their scores: reading both as streams, however many there are."""
