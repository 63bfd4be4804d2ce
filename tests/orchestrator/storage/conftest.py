"""The datasets that the tests of `workloads.data` read, copied to S3 here."""

from tests.workloads.data.conftest import dataset, folder

__all__ = ["dataset", "folder"]
