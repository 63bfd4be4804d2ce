"""The files of a dataset: manifest, row groups, annotations, cache."""
