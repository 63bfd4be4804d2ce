"""Images from shards to views: manifest, sample plan, reading, decoding, and views with their geometry."""
