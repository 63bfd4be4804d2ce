"""Reading a dataset's files: manifest, row groups, annotations, image files, disk cache."""
