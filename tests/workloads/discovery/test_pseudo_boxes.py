"""Files of boxes: what is written is read again; pickles are refused, and the documented converter makes JSON of them."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.places import ROOT
from workloads.discovery.pseudo_boxes import BoxTable, read_boxes, write_coco_results, write_parquet
from workloads.errors import DataError

BOXES = BoxTable(
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


class _Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["HARM"],)


def test_a_pickle_is_refused_and_the_documented_converter_makes_json_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    for name in ("preds.pkl", "preds.pickle"):
        (tmp_path / name).write_bytes(pickle.dumps({"x": _Harm()}))
        with pytest.raises(DataError, match=rf"{name}: pickles are not read.*docs/guides/lost-pickles\.md"):
            read_boxes(str(tmp_path / name))
    assert not (tmp_path / "harm").exists()

    boxes = {
        "000005.jpg": np.array([16, 32, 480, 320]),
        "sub/000007.jpg": np.array([[1, 2, 3, 4]], dtype=np.float32),
        "000009": [1, 2, np.float64(3), 4.5],
    }
    (tmp_path / "preds.pkl").write_bytes(pickle.dumps(boxes))
    page = (ROOT / "docs" / "guides" / "lost-pickles.md").read_text()
    converter = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.setattr("sys.argv", ["convert.py", str(tmp_path / "preds.pkl"), str(tmp_path / "preds.json")])
    exec(compile(converter, "convert.py", "exec"), {})
    found = read_boxes(str(tmp_path / "preds.json"))
    assert found.image_ids == ("000005", "000007", "000009")
    assert found.boxes_xyxy.tolist() == [[16, 32, 480, 320], [1, 2, 3, 4], [1, 2, 3, 4.5]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("boxes.txt", b"", "ending of a file of boxes is .parquet or .json"),
        ("boxes.json", b"{", "is not a file of boxes"),
        ("boxes.json", b'[{"image_id": 1}]', "is not a file of boxes"),
        ("boxes.json", b'[{"image_id": 1, "bbox": [0, 0, 1e999, 1]}]', "not a finite number"),
        ("boxes.parquet", b"PAR1", "is not a file of boxes"),
    ],
)
def test_what_is_not_boxes_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_boxes(str(tmp_path / name))
    with pytest.raises(DataError, match="cannot be read"):
        read_boxes(str(tmp_path / "absent.json"))
