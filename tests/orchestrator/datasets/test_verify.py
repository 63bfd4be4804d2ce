"""`data verify` finds what was damaged, `data stats` counts what is there."""

import pyarrow.parquet as pq
import pytest

from orchestrator.datasets.build import build_dataset
from orchestrator.datasets.stats import dataset_stats, draw_stats, log_stats
from orchestrator.datasets.verify import verify_dataset
from tests.workloads.data.images import make_folder
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.errors import ConfigError, DataError


@pytest.fixture
def built(tmp_path):
    source = make_folder(tmp_path / "images", classes=3, per_class=6)
    (source / "words.jpg").write_text("words")
    output = tmp_path / "out"
    build_dataset(
        BuildConfig(
            source=FolderSourceConfig(inputs=(str(source),)),
            output=str(output),
            rows_per_shard=10,
            row_group_bytes=5000,
        )
    )
    return output


def test_a_sound_dataset(built):
    calls = []
    report = verify_dataset(str(built), progress=lambda done, total: calls.append((done, total)))
    assert str(report) == "sound: 18 images, every hash as listed, 18 decoded"
    assert calls[-1] == (18, 18)
    assert 0 < verify_dataset(str(built), decode_share=0.5).decoded < 18


def test_a_flipped_byte_is_found_though_sizes_agree(built):
    path = built / "shard-000001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r": 1 fault:\nshard-000001\.parquet: does not match its SHA-256;"):
        verify_dataset(str(built))


def test_a_folder_of_two_datasets_names_them(tmp_path):
    source = make_folder(tmp_path / "images", classes=3, per_class=6)
    folder = FolderSourceConfig(inputs=(str(source),))
    build_dataset(BuildConfig(source=folder, output=str(tmp_path / "out"), val_share=0.3))
    with pytest.raises(DataError) as caught:
        dataset_stats(str(tmp_path / "out"))
    out = tmp_path / "out"
    assert str(caught.value) == f"{out}: holds no manifest.json, but two datasets: name {out}/train or {out}/val"


def test_stats(built, tmp_path):
    stats = dataset_stats(str(built))
    assert stats.num_images == 18
    assert stats.labels == {"class_0": 6, "class_1": 6, "class_2": 6}
    assert stats.rejects == {"not an image": 1}
    text = str(stats)
    for part in ("18 in 2 shards", "64x48 median", "not an image 1", "class_0 6"):
        assert part in text
    assert draw_stats(stats, tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_stats_become_artifacts_of_a_run(built, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("data", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment, run_name="mine").info.run_id
    assert log_stats(dataset_stats(str(built)), "mine", tracking_uri=uri) == run_id
    label = built.name
    assert sorted(item.path for item in client.list_artifacts(run_id, "report/data")) == [
        f"report/data/{label}.{kind}" for kind in ("csv", "png", "txt")
    ]
    table = (tmp_path / "artifacts" / run_id / "artifacts" / "report" / "data" / f"{label}.csv").read_text()
    assert "label,class_0,6" in table and "reject,not an image,1" in table and ",images,18" in table
    assert str(built) not in (tmp_path / "artifacts" / run_id / "artifacts/report/data" / f"{label}.txt").read_text()
    with pytest.raises(ConfigError, match="no run with this name"):
        log_stats(dataset_stats(str(built)), "other", tracking_uri=uri)


def test_pandas_and_ray_data_read_the_shards(built):
    pandas = pytest.importorskip("pandas")
    frame = pandas.concat(pandas.read_parquet(path) for path in sorted(built.glob("shard-*.parquet")))
    assert len(frame) == 18
    assert frame["image"].iloc[0]["bytes"][:2] == b"\xff\xd8"
    metadata = pq.read_schema(built / "shard-000000.parquet").metadata
    assert b'"_type": "Image"' in metadata[b"huggingface"]
