"""`tdpo score`: reward models on a folder of images."""
