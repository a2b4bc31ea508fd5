"""Images of more pixels than training opens: smaller copies, or a refusal."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realign.building.large_images import shrink_large_images
from realign.data.formats.source_row import SourceRow
from realign.data.images import MAX_PIXELS, decode_image
from realign.errors import RefusedError
from realign.runtime.files import file_sha256


def row(path: Path) -> SourceRow:
    return SourceRow(path.name, path.name, path, ({"role": "user", "content": "x"},), "y")


def draw(path: Path, width: int, height: int) -> Path:
    """Black on the left, white on the right."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    Image.fromarray(pixels).save(path, compress_level=1)
    return path


@pytest.mark.parametrize("suffix", ["jpg", pytest.param("png", marks=pytest.mark.full)])
def test_an_image_beyond_pillows_limit_is_used_at_half_size(tmp_path: Path, suffix: str) -> None:
    large = draw(tmp_path / f"large.{suffix}", 14_000, 13_000)
    assert 2 * MAX_PIXELS < 14_000 * 13_000  # where Pillow refuses to open a file
    small = draw(tmp_path / "small.png", 20, 10)
    rows = [row(small), row(large), row(large)]
    shrunk, failed = shrink_large_images(rows, tmp_path / "copies", 200_000_000)
    assert not failed
    assert shrunk[0] == rows[0]
    assert shrunk[1].path == shrunk[2].path == next((tmp_path / "copies").iterdir())
    assert shrunk[1].source["is_shrunk"]
    pixels = np.asarray(decode_image(shrunk[1].path.read_bytes(), "copy"))
    assert pixels.shape == (6_500, 7_000, 3)
    assert (pixels[::500, :3_490].max(), pixels[::500, 3_510:].min()) == (0, 255)
    written = shrunk[1].path.stat().st_mtime_ns
    assert shrink_large_images(rows, tmp_path / "copies", 200_000_000) == (shrunk, {})
    assert shrunk[1].path.stat().st_mtime_ns == written
    # a copy that another limit allowed is not used
    left, failed = shrink_large_images(rows, tmp_path / "copies", 100_000_000)
    assert (left, failed[large].code) == (rows, "too-many-pixels")


@pytest.mark.full
def test_an_image_of_more_than_four_times_the_pixels_is_halved_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    large = draw(tmp_path / "large.jpg", 20_000, 18_000)
    assert 4 * MAX_PIXELS < 20_000 * 18_000
    shrunk, _ = shrink_large_images([row(large)], tmp_path / "copies", 400_000_000)
    with Image.open(shrunk[0].path) as copy:
        assert copy.size == (5_000, 4_500)
    announced = capfd.readouterr().err
    assert "copies, halved until they have at most that many" in announced


def test_images_too_large_or_damaged_are_reported_and_not_copied(tmp_path: Path) -> None:
    large = draw(tmp_path / "large.jpg", 10_000, 9_000)
    rows = [row(large)]
    for limit in (0, MAX_PIXELS):
        assert shrink_large_images(rows, tmp_path / "copies", limit) == (rows, {})
    assert not (tmp_path / "copies").exists()
    left, failed = shrink_large_images(rows, tmp_path / "copies", MAX_PIXELS + 1)
    assert left == rows
    assert failed[large].code == "too-many-pixels"
    large.write_bytes(large.read_bytes()[:5000])
    left, failed = shrink_large_images(rows, tmp_path / "copies", 100_000_000)
    assert (left, failed[large].code) == (rows, "damaged")
    assert not [*(tmp_path / "copies").iterdir()]


def test_a_copy_that_cannot_be_written_stops_the_build(tmp_path: Path) -> None:
    large = draw(tmp_path / "large.jpg", 10_000, 9_000)
    taken = tmp_path / "copies" / f"{file_sha256(large)}.100000000.jpg"
    taken.mkdir(parents=True)
    with pytest.raises(
        RefusedError, match=rf"^{re.escape(str(taken))} could not be written \(EISDIR: .* --out"
    ):
        shrink_large_images([row(large)], tmp_path / "copies", 100_000_000)
    assert [*(tmp_path / "copies").iterdir()] == [taken]
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match=r"file could not be written \(EEXIST: "):
        shrink_large_images([row(large)], tmp_path / "file", 100_000_000)
