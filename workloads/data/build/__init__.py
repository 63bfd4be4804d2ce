"""Building datasets: lists sources of images, and turns images into rows and shards."""
