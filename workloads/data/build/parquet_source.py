"""Parquet files as a source: `list_parquet` lists their rows, `ParquetRows` fetches their images.

A dataset's rows are dealt out by hash, so neighbours in a shard come from anywhere in the source: row groups read are kept
for the next row that wants them, as many as fit in `CACHE_BYTES`. A source much larger than that is read several times.
"""

import collections
import threading
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from workloads.errors import DataError
from workloads.storage.filesystems import resolve_uri, with_retries

CACHE_BYTES = 1 << 30


def list_parquet(
    uri: str, *, prefix: str, image_column: str, id_column: str | None, label_column: str | None, schema: pa.Schema
) -> pa.Table:
    """List the rows of one file, or of the files below a folder, as a table of `schema`.

    Raises:
        DataError: no Parquet file there, one that cannot be read, or a column that is missing.
    """
    filesystem, root = resolve_uri(uri)
    tables = []
    for path in _parquet_files(uri, filesystem, root):
        name = prefix + (path.removeprefix(root).lstrip("/") or path.rpartition("/")[2])
        try:
            with filesystem.open_input_file(path) as file:
                parquet = pq.ParquetFile(file)
                columns = _columns(f"{uri}: {name}", parquet.schema_arrow, image_column, id_column, label_column)
                tables.append(_list_file(parquet, path, name, columns, schema))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{uri}: {name} cannot be read as Parquet ({error}); remove it or restore it") from None
    return pa.concat_tables(tables)


def _parquet_files(uri: str, filesystem: pafs.FileSystem, root: str) -> list[str]:
    try:
        if filesystem.get_file_info(root).type == pafs.FileType.File:
            return [root]
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise DataError(f"{uri}: cannot be listed ({error}); give Parquet files or a folder of them") from None
    # The tables beside a dataset's shards hold no images.
    tables = ("row_groups.parquet", "rejects.parquet")
    files = sorted(i.path for i in infos if i.path.endswith(".parquet") and i.base_name not in tables)
    if not files:
        raise DataError(f"{uri}: has no .parquet files; correct source.inputs")
    return files


def _columns(
    name: str, schema: pa.Schema, image_column: str, id_column: str | None, label_column: str | None
) -> dict[str, str | None]:
    """The file's column for each column of the listing."""
    for column in (image_column, id_column, label_column):
        if column is not None and column not in schema.names:
            raise DataError(
                f"{name}: has no column {column!r}, only {', '.join(schema.names)}; correct source.*_column"
            )
    kind = schema.field(image_column).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or "bytes" in _field_names(kind)):
        raise DataError(f"{name}: column {image_column!r} is {kind}, neither binary nor a struct with bytes")
    return {
        "image_id": id_column or ("image_id" if "image_id" in schema.names else None),
        "label": label_column or ("label" if "label" in schema.names else None),
        "objects": "objects" if "objects" in schema.names else None,
    }


def _field_names(kind: pa.DataType) -> set[str]:
    """The names of a struct's fields; none for another type."""
    return {kind.field(i).name for i in range(kind.num_fields)} if pa.types.is_struct(kind) else set()


def _list_file(
    parquet: pq.ParquetFile, path: str, name: str, columns: dict[str, str | None], schema: pa.Schema
) -> pa.Table:
    wanted = [column for column in columns.values() if column is not None]
    table = parquet.read(columns=wanted)
    groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    places = [(group, row) for group, rows in enumerate(groups) for row in range(rows)]
    paths = [f"{name}#{number}" for number in range(len(places))]
    listed: dict[str, Any] = {
        "path": pa.array(paths, pa.string()),
        "location": pa.array([f"{path}#{group}#{row}" for group, row in places], pa.string()),
        "image_id": pa.array(paths, pa.string()),
        "label": pa.nulls(len(places), pa.string()),
        "objects": pa.nulls(len(places), schema.field("objects").type),
    }
    for target, column in columns.items():
        if column is None:
            continue
        if target == "objects":
            listed[target] = _objects(table[column], schema.field("objects").type)
        else:
            listed[target] = table[column].cast(pa.string())
    return pa.table([listed[field.name] for field in schema], schema=schema)


def _objects(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Objects in the form of `OBJECTS_TYPE`; a column of another form gives none."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not (is_list and {"bbox", "category"} <= _field_names(column.type.value_type)):
        return pa.nulls(len(column), kind)
    rows = column.to_pylist()
    return pa.array([row and [_object(item) for item in row] for row in rows], kind)


def _object(item: dict[str, Any]) -> dict[str, Any]:
    return {
        "bbox": item["bbox"],
        "category": str(item["category"]),
        "crowd": bool(item.get("crowd")),
        "difficult": bool(item.get("difficult")),
    }


class ParquetRows:
    """Fetches the image of one row; safe for many threads."""

    def __init__(self, filesystem: pafs.FileSystem, image_column: str) -> None:
        self._filesystem, self._column = filesystem, image_column
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple[str, int], pa.Array] = collections.OrderedDict()
        self._bytes = 0

    def read(self, location: str) -> bytes:
        """The encoded image at `path#row group#row`.

        Raises:
            OSError: it cannot be read, or the row holds none.
        """
        path, group, row = location.rsplit("#", 2)
        value = self._group(path, int(group))[int(row)].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise OSError("the row holds no image bytes")
        return data

    def _group(self, path: str, group: int) -> pa.Array:
        with self._lock:  # one thread reads, the other threads of this shard wait for it
            key = (path, group)
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            column = with_retries(lambda: self._fetch(path, group))
            self._groups[key] = column
            self._bytes += column.nbytes
            while self._bytes > CACHE_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
            return column

    def _fetch(self, path: str, group: int) -> pa.Array:
        try:
            with self._filesystem.open_input_file(path) as file:
                table = pq.ParquetFile(file).read_row_group(group, columns=[self._column])
        except pa.ArrowException as error:
            raise OSError(str(error)) from None
        return table[self._column].combine_chunks()
