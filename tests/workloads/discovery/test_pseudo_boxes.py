"""Files of boxes: what is written is read again, foreign pickles are read without executing anything in them."""

import collections
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from workloads.discovery.pseudo_boxes import (
    FoundBoxes,
    boxes_of_pickle,
    pickle_to_json,
    read_boxes,
    write_coco_results,
    write_parquet,
)
from workloads.errors import DataError

BOXES = FoundBoxes(
    image_ids=("17", "a", "17"),
    boxes_xyxy=np.array([[0, 0, 10, 5], [1.5, 2.25, 3, 4], [5, 5, 6, 9]], dtype=np.float64),
    scores=np.array([0.5, 1.0, 0.75]),
    categories=("object", "object", "other"),
)


@pytest.mark.parametrize("ending", ["parquet", "json"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    path = str(tmp_path / "deep" / f"boxes.{ending}")
    (write_parquet if ending == "parquet" else write_coco_results)(BOXES, path)
    found = read_boxes(path)
    assert found.image_ids == BOXES.image_ids
    np.testing.assert_array_equal(found.boxes_xyxy, BOXES.boxes_xyxy)
    np.testing.assert_array_equal(found.scores, BOXES.scores)
    assert found.categories == (BOXES.categories if ending == "parquet" else ("1", "1", "2"))
    assert found.best()["17"].tolist() == [5, 5, 6, 9]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == [f"boxes.{ending}"]  # nothing partial stays


def test_results_are_cocos(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    write_coco_results(BOXES, str(tmp_path / "boxes.json"))
    rows = json.loads((tmp_path / "boxes.json").read_text())
    assert rows[0] == {"image_id": 17, "category_id": 1, "bbox": [0, 0, 10, 5], "score": 0.5}
    truth = coco.COCO()
    truth.dataset = {"images": [{"id": 17}, {"id": "a"}], "categories": [{"id": 1}, {"id": 2}], "annotations": []}
    truth.createIndex()
    assert len(truth.loadRes(rows).anns) == 3


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["int64", "float32", ">f8"])
def test_a_pickle_of_losts_is_read(protocol: int, dtype: str) -> None:
    boxes = {
        "000005.jpg": np.array([16, 32, 480, 320], dtype=dtype),
        "sub/000007.jpg": np.asfortranarray(np.array([[1, 2, 3, 4]], dtype=dtype)),
        "000009": [1, 2, np.float64(3), 4.5],
    }
    data = pickle.dumps(boxes, protocol=protocol)
    found = boxes_of_pickle(data)
    assert found.image_ids == ("000005", "000007", "000009")
    assert found.boxes_xyxy.tolist() == [[16, 32, 480, 320], [1, 2, 3, 4], [1, 2, 3, 4.5]]
    text = json.dumps(pickle_to_json(data))
    assert json.loads(text)["000005.jpg"] == [16, 32, 480, 320]
    nested = collections.defaultdict(collections.defaultdict, {"x": np.arange(4.0)})
    assert pickle_to_json(pickle.dumps(nested, protocol=protocol)) == {"x": [0, 1, 2, 3]}


class _Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["HARM"],)


class _Hidden:
    """Harm as the factory of a defaultdict, and in the state of an array."""

    def __reduce__(self) -> tuple[object, ...]:
        return collections.defaultdict, (_Harm(),)


@pytest.mark.parametrize(
    "content",
    [
        {"x": _Harm()},
        _Harm(),
        {"x": _Hidden()},
        {"x": np.array([_Harm()], dtype=object)},
        {"x": np.array(["text"])},
        {"x": np.dtype("O")},
        [1, 2],
        {"x": print},
        {"x": {1, 2}},
    ],
)
def test_nothing_in_a_pickle_is_executed(content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    (tmp_path / "boxes.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError):
        read_boxes(str(tmp_path / "boxes.pkl"))
    assert not (tmp_path / "harm").exists()


def test_handmade_opcodes_do_not_get_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    for data in (
        b"cos\nsystem\n(S'mkdir harm'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"cnumpy.core.multiarray\n_reconstruct.__init__.__globals__\n.",
        b"\x80\x04\x8c\x0bcollections\x8c\x1bOrderedDict.__init__.__class\x93.",
        b"Pname\n.",
        b"",
        pickle.dumps({"x": np.arange(4.0)})[:-20],
    ):
        with pytest.raises(DataError):
            pickle_to_json(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("boxes.txt", b"", "boxes are read from"),
        ("boxes.json", b"{", "no boxes that can be read"),
        ("boxes.json", b'[{"image_id": 1}]', "no boxes that can be read"),
        ("boxes.json", b'[{"image_id": 1, "bbox": [0, 0, 1e999, 1]}]', "no finite number"),
        ("boxes.parquet", b"PAR1", "no boxes that can be read"),
    ],
)
def test_what_is_not_boxes_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_boxes(str(tmp_path / name))
    with pytest.raises(DataError, match="cannot be read"):
        read_boxes(str(tmp_path / "absent.json"))
