"""Untrusted images in worker processes: in order, limited, and without effect on each other."""

from __future__ import annotations

import hashlib
import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realign.data.image_pool import ImagePool, inspect_images
from realign.data.images import MAX_PIXELS, ImageFacts, RefusedImage, decode_image
from realign.data.perceptual_hash import perceptual_hash
from realign.errors import RefusedError
from tests.conftest import running
from tests.processes import is_running, wait_until


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Twenty different images of different sizes."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(20):
        shape = (10 + 7 * (number % 5), 12 + number, 3)
        path = tmp_path / f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def facts(path: Path) -> ImageFacts:
    raw = path.read_bytes()
    image = decode_image(raw, "here")
    digest = hashlib.sha256(raw).hexdigest()
    return ImageFacts(digest, image.width, image.height, perceptual_hash(image))


def fifo(folder: Path) -> Path:
    """A file that never opens: what reads it hangs."""
    path = folder / "hangs.png"
    os.mkfifo(path)
    return path


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_running, pids)), 60)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_facts_come_in_the_order_of_the_paths(paths: list[Path], workers: int) -> None:
    assert list(inspect_images(paths, workers=workers)) == [facts(path) for path in paths]
    assert list(inspect_images([], workers=workers)) == []


def test_a_refused_image_gives_its_refusal_in_place_of_facts(
    paths: list[Path], tmp_path: Path
) -> None:
    bad, gone = tmp_path / "bad.png", tmp_path / "gone.png"
    bad.write_bytes(b"no image")
    found = list(inspect_images([paths[0], bad, gone, paths[1]], workers=2))
    assert [found[0], found[3]] == [facts(paths[0]), facts(paths[1])]
    assert isinstance(found[1], RefusedImage)
    with pytest.raises(RefusedImage) as refused:
        decode_image(b"no image", str(bad))
    assert (str(found[1]), found[1].code) == (str(refused.value), "format")
    assert isinstance(found[2], RefusedImage)
    assert (found[2].code, found[2].where) == ("missing", str(gone))


def test_an_image_that_hangs_does_not_affect_other_images(
    paths: list[Path], tmp_path: Path
) -> None:
    order = [paths[0], fifo(tmp_path), *paths[1:6]]
    found = list(inspect_images(order, workers=1, timeout_s=0.5))
    assert isinstance(found[1], RefusedImage)
    assert found[1].code == "timeout"
    assert "must be read and decoded in 5 seconds" in str(found[1])
    assert [found[0], *found[2:]] == [facts(path) for path in (paths[0], *paths[1:6])]


def test_waiting_for_a_file_does_not_count_towards_the_time_limit(
    paths: list[Path], tmp_path: Path
) -> None:
    """An image that waits for a busy machine is not refused: limits count CPU time."""
    pipe = fifo(tmp_path)
    with ImagePool(1, timeout_s=0.5) as pool:
        waiting = pool.submit(pipe, "a")
        with pipe.open("wb") as file:  # opens as soon as the worker reads
            time.sleep(1)
            file.write(paths[0].read_bytes())
        assert waiting.result() == facts(paths[0])


def test_a_decoder_over_the_time_limit_is_stopped_in_its_worker(tmp_path: Path) -> None:
    Image.new("RGB", (6000, 6000)).save(tmp_path / "large.png", compress_level=1)
    (found,) = inspect_images([tmp_path / "large.png"], workers=1, timeout_s=0.02)
    assert isinstance(found, RefusedImage)
    assert found.code == "timeout"
    assert "must decode in 0.02 seconds of CPU time" in str(found)


def test_an_image_that_crashes_its_worker_does_not_affect_other_images(
    paths: list[Path], tmp_path: Path
) -> None:
    with ImagePool(1) as pool:
        assert pool.submit(paths[0], "a").result() == facts(paths[0])
        hanging = pool.submit(fifo(tmp_path), "b")
        process = pool._crew[0]._process
        assert process is not None
        threading.Timer(0.2, lambda: os.kill(process.pid, signal.SIGSEGV)).start()
        found = hanging.result()
        assert isinstance(found, RefusedImage)
        assert found.code == "crashed"
        assert "status -11" in str(found)
        assert pool.submit(paths[1], "c").result() == facts(paths[1])


def test_an_image_beyond_the_memory_limit_is_refused(tmp_path: Path, paths: list[Path]) -> None:
    Image.new("RGBA", (6000, 6000)).save(tmp_path / "large.png", compress_level=1)
    order = [tmp_path / "large.png", paths[0]]
    large, small = inspect_images(order, workers=1, memory_bytes=400 << 20)
    assert isinstance(large, RefusedImage)
    assert large.code == "memory"
    assert small == facts(paths[0])


def test_an_unwritable_copy_is_refused_without_restarting_the_worker(
    paths: list[Path], tmp_path: Path
) -> None:
    with ImagePool(1) as pool:
        gone = pool.shrink(paths[0], "a", tmp_path / "gone" / "a.jpg", MAX_PIXELS)
        with pytest.raises(RefusedError, match=r"gone/a\.jpg could not be written \(ENOENT: "):
            gone.result()
        process = pool._crew[0]._process
        copy = pool.shrink(paths[0], "a", tmp_path / "a.jpg", MAX_PIXELS).result()
        assert pool._crew[0]._process is process is not None
    assert copy == facts(tmp_path / "a.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P", "CMYK"])
def test_the_largest_image_fits_into_the_default_memory(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("large.jpg" if mode == "CMYK" else "large.png")
    options = {"transparency": 0} if mode == "P" else {}
    side = math.isqrt(MAX_PIXELS)
    Image.new(mode, (side, side)).save(path, compress_level=1, **options)
    # the time is none of the claim: a busy machine takes many times as long
    (found,) = inspect_images([path], workers=1, timeout_s=600)
    assert isinstance(found, ImageFacts), found


def test_bytes_give_the_same_facts_as_files(paths: list[Path]) -> None:
    with ImagePool(2) as pool:
        futures = [pool.submit(path.read_bytes(), "image") for path in paths]
        assert [future.result() for future in futures] == [facts(path) for path in paths]
        large = pool.submit(bytes(3_000_000), "image").result()  # many times a pipe's buffer
    assert isinstance(large, RefusedImage)
    assert str(large.at("row 3, images")).startswith("row 3, images: image must be a readable")
    assert large.code == large.at("row 3, images").code == "format"


def test_closing_the_iterator_does_not_wait_for_pending_images(
    paths: list[Path], tmp_path: Path
) -> None:
    images = inspect_images([*paths, fifo(tmp_path)], workers=2, timeout_s=600)
    assert next(images) == facts(paths[0])
    started = time.monotonic()
    images.close()
    assert time.monotonic() - started < 60


def test_only_few_images_are_inspected_ahead(paths: list[Path]) -> None:
    """A million paths must not become a million results in memory."""
    seen: list[int] = []

    class Watched(list[Path]):
        def __iter__(self):
            for number, path in enumerate(paths * 50):
                seen.append(number)
                yield path

    images = inspect_images(Watched(), workers=1)
    next(images)
    assert len(seen) <= 16
    images.close()


def test_workers_import_neither_torch_nor_transformers() -> None:
    code = (
        "import realign.data.image_worker, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'scipy', 'yaml', 'rich'}\n"
        "assert not heavy & {name.partition('.')[0] for name in sys.modules}, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_in_the_current_folder_is_not_imported(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hashlib.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert list(inspect_images(paths[:1], workers=1)) == [facts(paths[0])]


PARENT = """
import sys
import time
from pathlib import Path
from realign.data.image_pool import ImagePool

with ImagePool(3, timeout_s=2) as pool:
    good, hangs = map(Path, sys.argv[1:])
    # which worker takes an image is open, so images are sent until each has started
    while not all(worker._process for worker in pool._crew):
        pool.submit(good, "a").result()
    pids = [worker._process.pid for worker in pool._crew]
    pool.submit(hangs, "b")
    print(*pids, flush=True)
    time.sleep(600)
"""


def test_killing_the_parent_leaves_no_worker(paths: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(paths[0]), str(fifo(tmp_path))]
    with running(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        # the one that hangs ends at its time limit, which may be over, the others with the parent
        assert sum(map(is_running, pids)) >= 2
    wait_until_gone(pids)


def test_the_end_of_the_pool_leaves_no_worker(paths: list[Path]) -> None:
    with ImagePool(2) as pool:
        for future in [pool.submit(path, "a") for path in paths]:
            future.result()
        pids = [worker._process.pid for worker in pool._crew if worker._process]
        assert pids
    wait_until_gone(pids)


def test_a_refusal_can_be_sent_between_processes() -> None:
    import pickle

    error = RefusedImage("row 1", "image is damaged. Replace it.", "damaged")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code, again.field) == (str(error), "damaged", "image")


def test_a_damaged_image_prints_nothing(capfd, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[:300])
    list(inspect_images([tmp_path / "a.jpg"], workers=1))
    assert capfd.readouterr() == ("", "")
