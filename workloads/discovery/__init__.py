"""Finding objects without labels: one box an image from a trunk's features, and what is made of the boxes."""
