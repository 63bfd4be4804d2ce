"""The schema and loading of experiment files; the shipped files lie in the folders below."""
