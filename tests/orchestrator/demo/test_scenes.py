"""Scenes are the same every time, and their colours tell nothing."""

from pathlib import Path

import numpy as np
from PIL import Image

from orchestrator.demo.scenes import load_textures, write_scenes


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_scenes(tmp_path / name, split="heldout", count=2)
    files = {name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two")}
    assert files["one"] == files["two"]
    assert files["one"][0] != files["one"][1]


def test_tone_is_even_and_without_colour(tmp_path: Path) -> None:
    write_scenes(tmp_path, split="train", count=2)
    for path in tmp_path.iterdir():
        pixels = np.asarray(Image.open(path), dtype=np.float32)
        assert np.abs(pixels - pixels.mean(-1, keepdims=True)).max() < 3  # JPEG's rounding at most
        windows = pixels[..., 0].reshape(4, 64, 4, 64).mean((1, 3))
        assert windows.std() < 6  # of 45, the standard deviation of a texture's own pixels


def test_heldout_scenes_draw_from_other_parts_of_the_photographs() -> None:
    train, heldout = load_textures("train"), load_textures("heldout")
    assert len(train) == len(heldout)
    assert all(a.shape[1] > b.shape[1] for a, b in zip(train[2::3], heldout[2::3], strict=True))
