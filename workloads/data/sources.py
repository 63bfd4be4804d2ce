"""What a build reads: a listing of images with their ids, labels and objects, made without opening any image."""

import json
from collections import defaultdict
from dataclasses import field
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import Field

from workloads.config import config
from workloads.data.manifest import DataError, read_bytes, resolve_uri

OBJECTS_TYPE = pa.list_(pa.struct([("bbox", pa.list_(pa.float32())), ("category", pa.string()), ("crowd", pa.bool_())]))
"""Objects of one image: box xywh in pixels of the image as stored, category name, whether it is a crowd."""

LISTING_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the source, what decides the row's place
        ("location", pa.string()),  # where its file system finds it
        ("image_id", pa.string()),
        ("label", pa.string()),
        ("objects", OBJECTS_TYPE),
    ]
)

_NOT_IMAGES = frozenset({".json", ".txt", ".md", ".xml", ".mat", ".csv", ".db", ".ini", ".py", ".html", ".pdf"})


@config
class FolderSourceConfig:
    """A folder of images; one folder a class, nested, or flat."""

    kind: Literal["folder"] = "folder"
    inputs: tuple[str, ...] = field(default=())
    """Folders (paths or URIs). Of several, the last part of each path goes before its images' ids."""


@config
class CocoSourceConfig:
    """Images with a COCO instances file."""

    kind: Literal["coco"] = "coco"
    images: str
    """Folder (path or URI) of the images."""
    annotations: str
    """COCO json (path or URI): images, annotations with xywh boxes, categories."""


SourceConfig = Annotated[FolderSourceConfig | CocoSourceConfig, Field(discriminator="kind")]


def list_source(source: FolderSourceConfig | CocoSourceConfig) -> tuple[pa.Table, dict[str, Any]]:
    """The source's images, `LISTING_SCHEMA`, sorted by path, and what the manifest says of the source.

    Raises:
        DataError: nothing there, or an annotation file that cannot be read.
    """
    match source:
        case FolderSourceConfig():
            table, about = _list_folders(source)
        case CocoSourceConfig():
            table, about = _list_coco(source)
    return table.sort_by("path"), {"kind": source.kind, "listed": len(table), **about}


def source_filesystem(source: FolderSourceConfig | CocoSourceConfig) -> pafs.FileSystem:
    """The file system in which the listing's locations are found."""
    uri = source.images if isinstance(source, CocoSourceConfig) else source.inputs[0]
    return resolve_uri(uri)[0]


def _list_folders(source: FolderSourceConfig) -> tuple[pa.Table, dict[str, Any]]:
    if not source.inputs:
        raise DataError("source.inputs: is empty; name at least one folder of images")
    prefixes = [PurePosixPath(uri.rstrip("/")).name for uri in source.inputs]
    if len(set(prefixes)) < len(prefixes):
        raise DataError(f"source.inputs: two folders are named alike ({', '.join(prefixes)}); rename one")
    rows: list[dict[str, Any]] = []
    for uri, prefix in zip(source.inputs, prefixes, strict=True):
        for location, relative in _files(uri):
            path = f"{prefix}/{relative}" if len(prefixes) > 1 else relative
            parent = PurePosixPath(relative).parent.as_posix()
            label = None if parent == "." else parent
            rows.append({"path": path, "location": location, "image_id": path, "label": label, "objects": None})
    if not rows:
        raise DataError(f"{', '.join(source.inputs)}: holds no files; give a folder of images")
    return pa.Table.from_pylist(rows, schema=LISTING_SCHEMA), {"classes": len({row["label"] for row in rows} - {None})}


def _files(uri: str) -> list[tuple[str, str]]:
    """(location, path relative to `uri`) of every file that may be an image; hidden ones and notes are left out."""
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


def _list_coco(source: CocoSourceConfig) -> tuple[pa.Table, dict[str, Any]]:
    filesystem, path = resolve_uri(source.annotations)
    try:
        data = json.loads(read_bytes(filesystem, path))
        names = {category["id"]: category["name"] for category in data["categories"]}
        objects: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
        for annotation in data["annotations"]:
            objects[annotation["image_id"]].append(
                {
                    "bbox": annotation["bbox"],
                    "category": names[annotation["category_id"]],
                    "crowd": bool(annotation.get("iscrowd", 0)),
                }
            )
        _, root = resolve_uri(source.images)
        rows = [
            {
                "path": image["file_name"],
                "location": f"{root}/{image['file_name']}",
                "image_id": str(image["id"]),
                "label": None,
                "objects": objects[image["id"]],
            }
            for image in data["images"]
        ]
    except OSError as error:
        raise DataError(f"{source.annotations}: cannot be read ({error}); give COCO's instances json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source.annotations}: is not COCO's instances format ({error!r})") from None
    if len({row["image_id"] for row in rows}) < len(rows):
        raise DataError(f"{source.annotations}: lists an image id twice; make the ids unique")
    return pa.Table.from_pylist(rows, schema=LISTING_SCHEMA), {"categories": {n: i for i, n in sorted(names.items())}}
