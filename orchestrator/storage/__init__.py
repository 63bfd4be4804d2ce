"""Locks on storage folders, and the S3 operations that pyarrow lacks."""
