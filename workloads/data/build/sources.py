"""`list_source`: lists a source's images with their ids, labels and objects, without opening any image."""

import hashlib
import io
import json
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import Field

from workloads.config import config
from workloads.data.build.parquet_source import ParquetRows, list_parquet
from workloads.errors import DataError
from workloads.storage.filesystems import read_bytes, resolve_uri

OBJECTS_TYPE = pa.list_(
    pa.struct(
        [
            ("bbox", pa.list_(pa.float32())),
            ("category", pa.string()),
            ("crowd", pa.bool_()),
            ("difficult", pa.bool_()),
        ]
    )
)
"""Objects of one image: box xywh in pixels of the stored image, category name, COCO's crowd and VOC's difficult flag."""

LISTING_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # within the source; decides the row's place in the dataset
        ("location", pa.string()),  # of its bytes, for `source_reader`
        ("image_id", pa.string()),
        ("label", pa.string()),
        ("objects", OBJECTS_TYPE),
    ]
)

Row: TypeAlias = dict[str, Any]
Inputs = Annotated[tuple[str, ...], Field(min_length=1)]

_NOT_IMAGES = frozenset({".json", ".txt", ".md", ".xml", ".mat", ".csv", ".db", ".ini", ".py", ".html", ".pdf"})


@config
class FolderSourceConfig:
    """A folder of images: one subfolder a class, nested folders, or none."""

    kind: Literal["folder"] = "folder"
    inputs: Inputs
    """Folders (paths or URIs). With several, the last part of each path is a prefix of its images' ids."""


@config
class CocoSourceConfig:
    """Images with a COCO instances file."""

    kind: Literal["coco"] = "coco"
    inputs: Annotated[tuple[str, ...], Field(min_length=1, max_length=1)]
    """The folder (path or URI) of the images."""
    annotations: str
    """COCO json (path or URI): images, annotations with xywh boxes, categories."""


@config
class VocSourceConfig:
    """Pascal VOC: folders with JPEGImages, Annotations and ImageSets/Main."""

    kind: Literal["voc"] = "voc"
    inputs: Inputs
    """VOC folders (as VOCdevkit/VOC2007). With several, the last part of each path is a prefix of its images' ids."""
    image_set: str = "trainval"
    """Name of the list in ImageSets/Main: train, val, trainval or test."""


@config
class CaltechSourceConfig:
    """Caltech-101: one folder a class and, optionally, its annotations (.mat) with a box an image."""

    kind: Literal["caltech101"] = "caltech101"
    inputs: Annotated[tuple[str, ...], Field(min_length=1, max_length=1)]
    """The folder (path or URI) of the class folders (101_ObjectCategories)."""
    annotations: str | None = None
    """The folder (path or URI) of the annotations; none: no boxes."""
    background: bool = True
    """Whether to include the images of BACKGROUND_Google, which is not a class."""


@config
class ParquetSourceConfig:
    """Parquet files with images: a plain binary column, or Hugging Face's struct of bytes and path."""

    kind: Literal["parquet"] = "parquet"
    inputs: Inputs
    """Files or folders (paths or URIs). With several, the last part of each path is a prefix of its images' paths."""
    image_column: str = "image"
    """Column of the encoded images."""
    id_column: str | None = None
    """Column of unique ids; none: `image_id` where there is one, else file name and row number."""
    label_column: str | None = None
    """Column of class names or numbers; none: `label` where there is one."""


AnySource: TypeAlias = (
    FolderSourceConfig | CocoSourceConfig | VocSourceConfig | CaltechSourceConfig | ParquetSourceConfig
)
SourceConfig = Annotated[AnySource, Field(discriminator="kind")]


def list_source(source: AnySource) -> tuple[pa.Table, dict[str, Any]]:
    """List the source's images as `LISTING_SCHEMA`, sorted by path, with a description of the source for the manifest.

    Raises:
        DataError: nothing there, or an annotation file that cannot be read.
    """
    match source:
        case FolderSourceConfig():
            table, about = _list_folders(source)
        case CocoSourceConfig():
            table, about = _list_coco(source)
        case VocSourceConfig():
            table, about = _list_voc(source)
        case CaltechSourceConfig():
            table, about = _list_caltech(source)
        case ParquetSourceConfig():
            table, about = _list_parquet(source)
    if not len(table):
        raise DataError(f"{', '.join(source.inputs)}: has no images of a {source.kind} source; correct source.inputs")
    table = table.sort_by("path")
    digest = hashlib.sha256()
    for path in table["path"].to_pylist():
        digest.update(path.encode(errors="surrogateescape") + b"\0")
    return table, {"kind": source.kind, "listed": len(table), "listing_sha256": digest.hexdigest(), **about}


def source_reader(source: AnySource) -> Callable[[str], bytes]:
    """A function that reads the bytes of a location, and raises OSError where it cannot."""
    filesystem, _ = resolve_uri(source.inputs[0])
    if isinstance(source, ParquetSourceConfig):
        return ParquetRows(filesystem, source.image_column).read
    return lambda location: read_bytes(filesystem, location)


def column_reader(source: AnySource, column: str) -> Callable[[str], bytes]:
    """A function that reads another binary column at a location.

    Raises:
        DataError: the source is not Parquet.
    """
    if not isinstance(source, ParquetSourceConfig):
        raise DataError(f"regions.column: a {source.kind} source has no columns; use --source parquet")
    filesystem, _ = resolve_uri(source.inputs[0])
    return ParquetRows(filesystem, column).read


def _table(rows: Iterable[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=LISTING_SCHEMA)


def _row(path: str, location: str, image_id: str, label: str | None = None, objects: list[Row] | None = None) -> Row:
    return {"path": path, "location": location, "image_id": image_id, "label": label, "objects": objects}


def object_row(xywh: Iterable[float], category: str, *, crowd: bool = False, difficult: bool = False) -> Row:
    """One object as `OBJECTS_TYPE` stores it."""
    return {"bbox": [float(side) for side in xywh], "category": category, "crowd": crowd, "difficult": difficult}


def _prefixed(source: AnySource) -> list[tuple[str, str]]:
    """(input, prefix of its paths) of each input."""
    if len(source.inputs) == 1:
        return [(source.inputs[0], "")]
    names = [PurePosixPath(uri.rstrip("/")).name for uri in source.inputs]
    if len(set(names)) < len(names):
        raise DataError(f"source.inputs: two inputs have the same name ({', '.join(names)}); rename one")
    return [(uri, f"{name}/") for uri, name in zip(source.inputs, names, strict=True)]


def _list_folders(source: FolderSourceConfig) -> tuple[pa.Table, dict[str, Any]]:
    rows = []
    for uri, prefix in _prefixed(source):
        for location, relative in list_files(uri):
            path = prefix + relative
            rows.append(_row(path, location, path, _class_of(relative)))
    return _table(rows), {"classes": len({row["label"] for row in rows} - {None})}


def _class_of(relative: str) -> str | None:
    parent = PurePosixPath(relative).parent.as_posix()
    return None if parent == "." else parent


def list_files(uri: str) -> list[tuple[str, str]]:
    """(location, path relative to `uri`) of every file that may be an image; hidden files and notes are left out.

    Raises:
        DataError: not a folder, or it cannot be listed.
    """
    filesystem, root = resolve_uri(uri)
    try:
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{uri}: is not a folder; give a folder of images") from None
    except OSError as error:
        raise DataError(f"{uri}: cannot be listed ({error}); check the address and credentials") from None
    files = []
    for info in infos:
        relative = info.path.removeprefix(root).lstrip("/")
        path = PurePosixPath(relative)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        if info.type == pafs.FileType.File and not hidden and path.suffix.lower() not in _NOT_IMAGES:
            files.append((info.path, relative))
    return files


def _read_annotations(uri: str, what: str) -> bytes:
    filesystem, path = resolve_uri(uri)
    try:
        return read_bytes(filesystem, path)
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error}); give {what}") from None


def _list_coco(source: CocoSourceConfig) -> tuple[pa.Table, dict[str, Any]]:
    text = _read_annotations(source.annotations, "COCO's instances json as source.annotations")
    _, root = resolve_uri(source.inputs[0])
    try:
        data = json.loads(text)
        names = {category["id"]: category["name"] for category in data["categories"]}
        objects: defaultdict[Any, list[Row]] = defaultdict(list)
        for item in data["annotations"]:
            crowd = bool(item.get("iscrowd", 0))
            objects[item["image_id"]].append(object_row(item["bbox"], names[item["category_id"]], crowd=crowd))
        rows = [
            _row(name := image["file_name"], f"{root}/{name}", str(image["id"]), objects=objects[image["id"]])
            for image in data["images"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source.annotations}: is not in COCO's instances format ({error!r})") from None
    return _table(rows), {"categories": {name: number for number, name in sorted(names.items())}}


def _list_voc(source: VocSourceConfig) -> tuple[pa.Table, dict[str, Any]]:
    rows = []
    for uri, prefix in _prefixed(source):
        list_uri = f"{uri}/ImageSets/Main/{source.image_set}.txt"
        names = (
            _read_annotations(list_uri, "a VOC folder, and source.image_set as one of its lists").decode().split("\n")
        )
        _, root = resolve_uri(uri)
        for name in (line.split()[0] for line in names if line.strip()):
            xml = _read_annotations(f"{uri}/Annotations/{name}.xml", "VOC's Annotations")
            objects = _voc_objects(xml, f"{uri}/Annotations/{name}.xml")
            rows.append(_row(f"{prefix}{name}.jpg", f"{root}/JPEGImages/{name}.jpg", prefix + name, objects=objects))
    return _table(rows), {"image_set": source.image_set}


def _voc_objects(xml: bytes, name: str) -> list[Row]:
    """VOC counts pixels from 1 and its boxes include their last pixel."""
    try:
        objects = []
        for item in ET.fromstring(xml).iter("object"):
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            difficult = item.findtext("difficult", "0").strip() == "1"
            xywh = (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1)
            objects.append(object_row(xywh, item.findtext("name", ""), difficult=difficult))
        return objects
    except (ET.ParseError, ValueError) as error:
        raise DataError(f"{name}: is not a VOC annotation ({error}); restore it") from None


_CALTECH_FOLDERS = {
    "Faces": "Faces_2",
    "Faces_easy": "Faces_3",
    "Motorbikes": "Motorbikes_16",
    "airplanes": "Airplanes_Side_2",
}


def _list_caltech(source: CaltechSourceConfig) -> tuple[pa.Table, dict[str, Any]]:
    rows = []
    for location, relative in list_files(source.inputs[0]):
        label = _class_of(relative)
        if label is None or (label == "BACKGROUND_Google" and not source.background):
            continue
        objects = None
        if source.annotations is not None and label != "BACKGROUND_Google":
            number = PurePosixPath(relative).stem.removeprefix("image_")
            folder = _CALTECH_FOLDERS.get(label, label)
            objects = [_caltech_object(f"{source.annotations}/{folder}/annotation_{number}.mat", label)]
        rows.append(_row(relative, location, relative, label, objects))
    return _table(rows), {"classes": len({row["label"] for row in rows} - {"BACKGROUND_Google"})}


def _caltech_object(uri: str, label: str) -> Row:
    """`box_coord` is [first row, last row, first column, last column], counted from 1."""
    from scipy.io import loadmat

    data = _read_annotations(uri, "Caltech-101's Annotations folder as source.annotations, or none")
    try:
        y0, y1, x0, x1 = (float(side) for side in loadmat(io.BytesIO(data))["box_coord"].ravel())
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{uri}: is not a Caltech-101 annotation ({error!r}); restore it") from None
    return object_row((x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1), label)


def _list_parquet(source: ParquetSourceConfig) -> tuple[pa.Table, dict[str, Any]]:
    tables = [
        list_parquet(
            uri,
            prefix=prefix,
            image_column=source.image_column,
            id_column=source.id_column,
            label_column=source.label_column,
            schema=LISTING_SCHEMA,
        )
        for uri, prefix in _prefixed(source)
    ]
    return pa.concat_tables(tables), {}
