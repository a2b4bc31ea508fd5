"""Names of images in a dataset: none leaves the image folder or is a URL that is fetched."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from realign.data.image_names import resolve_image
from realign.data.images import RefusedImage

ESCAPES = [
    *("../secret.png", "../../secret.png", "./../secret.png", "a/../../secret.png", ".."),
    *("a/b/../../../secret.png", "a/./../../secret.png", "a//../..//secret.png", "../"),
    *("../images/../secret.png", "../images/../../etc/passwd", "../" * 20 + "etc/passwd"),
    *("/etc/passwd", "/etc/hostname", "/proc/self/environ", "/dev/zero", "/dev/stdin", "/"),
    *("/tmp/../etc/passwd", "/./etc/passwd", "ROOT/../secret.png", "SECRET", "ROOT-secret"),
    *("link.png", "chain.png", "folder/secret.png", "folder/../secret.png", "a/up/secret.png"),
    *("a/up/up.png", "loop.png", "dangling-outside.png", "absolute.png", "device.png"),
    *("../images-secret/s.png", "a/../../images-secret/s.png", "environment.png"),
    *("a/../link.png", "folder/./secret.png", "a/up/images-secret/s.png", "folder", "a/up"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder with links of every kind out of it."""
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "up").symlink_to("../..")
    (root / "a" / "inside.png").write_bytes(b"x")
    (root / "inside-link.png").symlink_to("a/inside.png")
    (tmp_path / "images-secret").mkdir()
    for secret in ("secret.png", "images-secret/s.png", "up.png"):
        (tmp_path / secret).write_bytes(b"x")
    for name, target in {
        "link.png": "../secret.png",
        "chain.png": "link.png",
        "folder": "..",
        "loop.png": "loop.png",
        "dangling-outside.png": "../nothing.png",
        "absolute.png": str(tmp_path / "secret.png"),
        "device.png": "/dev/zero",
        "environment.png": "/proc/self/environ",
    }.items():
        (root / name).symlink_to(target)
    return root


def test_at_least_forty_escaping_names_are_tested() -> None:
    assert len(set(ESCAPES)) == len(ESCAPES) >= 40


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leaves_the_folder_is_refused(root: Path, name: str) -> None:
    name = name.replace("ROOT", str(root)).replace("SECRET", str(root.parent / "secret.png"))
    with pytest.raises(RefusedImage, match=r"^row 3: image .*\. .*\.$") as refused:
        resolve_image(root, name, "row 3")
    # a loop of links is an error, whose message differs between versions of Python
    codes = {"unreadable", "missing"} if name == "loop.png" else {"outside-root"}
    assert refused.value.code in codes


def test_names_inside_the_folder_are_paths(root: Path) -> None:
    inside = (root / "a" / "inside.png").resolve()
    for name in ("a/inside.png", "inside-link.png", "a/../a/./inside.png", "./a//inside.png"):
        assert resolve_image(root, name, "row 3") == inside


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("", "image-name"),
        ("a\0.png", "image-name"),
        (3, "image-name"),
        (None, "image-name"),
        (["a.png"], "image-name"),
        ("gone.png", "missing"),
        ("a", "missing"),
        ("a/inside.png/b", "missing"),
        ("x" * 5000, "unreadable"),
        ("\ud800.png", "unreadable"),
    ],
)
def test_a_text_that_is_not_a_file_name_is_refused(root: Path, name, code: str) -> None:
    with pytest.raises(RefusedImage, match=r"^row 3: image ") as refused:
        resolve_image(root, name, "row 3")
    assert refused.value.code == code


HOSTS = [
    *("169.254.169.254/latest/meta-data/", "[::1]/a.png", "0x7f.1/a.png", "127.1/a.png"),
    *("2130706433/a.png", "0177.0.0.1/a.png", "localhost:8000/a.png", "[::ffff:127.0.0.1]/a"),
    *("metadata.google.internal/", "example.org@127.0.0.1/a.png", "127.0.0.1.nip.io/a.png"),
    *("example.org/redirect?to=http://127.0.0.1/", "rebind.example.org/a.png", "①②⑦.0.0.1/a.png"),
]
URLS = [
    *(f"http://{host}" for host in HOSTS),
    *(f"https://{host}" for host in HOSTS),
    *(f"//{host}" for host in HOSTS),
    *("HTTP://example.org/a.png", "hTtPs://example.org/a.png", " http://example.org/a.png"),
    *("\thttp://example.org/a.png", "http:/example.org/a.png", "http:\\\\example.org\\a.png"),
    *("ftp://example.org/a.png", "sftp://example.org/a", "gopher://127.0.0.1:6379/_INFO"),
    *("file:///etc/passwd", "file:/etc/passwd", "FILE:etc/passwd", "file://localhost/etc/passwd"),
    *("data:image/png;base64,AAAA", "DATA:image/png,AAAA", "data:,", "blob:http://a/b"),
    *("javascript:alert(1)", "jar:http://a!/b", "s3://bucket/a.png", "gs://bucket/a.png"),
    *("hf://datasets/a/b.png", "dict://127.0.0.1:11211/", "ldap://127.0.0.1/", "urn:a:b"),
    *("\\\\server\\share\\a.png", "/\\example.org/a.png", "a.png?next=http://127.0.0.1/"),
]


def test_at_least_sixty_urls_are_tested() -> None:
    assert len(set(URLS)) == len(URLS) >= 60


@pytest.mark.parametrize("name", URLS)
def test_a_url_is_refused_without_a_socket(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened or a name looked up")

    for call in ("socket", "create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, call, refuse)
    with pytest.raises(RefusedImage, match=r"^row 3: image must be a file name, got the URL") as no:
        resolve_image(root, name, "row 3")
    assert no.value.code == "url"


@pytest.mark.parametrize("name", ["coco:1.png", "a:b.png", "c.data:1.png", "http.png"])
def test_a_name_with_a_colon_is_not_a_url(root: Path, name: str) -> None:
    (root / name).write_bytes(b"x")
    assert resolve_image(root, name, "row 3") == (root / name).resolve()


def test_a_symbolic_link_out_of_the_folder_is_refused_as_a_link(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(RefusedImage, match=r"'link\.png', a link that leaves it\. Copy it there"):
        resolve_image(tmp_path / "root", "link.png", "row 1")
    with pytest.raises(RefusedImage, match=r"got '\.\./a\.png'\. Copy it there"):
        resolve_image(tmp_path / "root", "../a.png", "row 1")


def test_a_missing_name_with_backslashes_is_refused_with_the_slash_remedy(root: Path) -> None:
    with pytest.raises(RefusedImage, match=r"Write / between folders instead of \\, check") as no:
        resolve_image(root, "a\\inside.png", "row 1")
    assert (no.value.code, no.value.missing) == ("missing", "a\\inside.png")
    with pytest.raises(RefusedImage, match=r"exist in .*\. Check --images"):
        resolve_image(root, "a/gone.png", "row 1")
    # the message does not reveal whether a file exists outside the folder
    with pytest.raises(RefusedImage, match=r"does not exist in .*\. Write / between"):
        resolve_image(root, "..\\secret.png", "row 1")
    # where files are so named, they are found
    (root / "a\\b.png").write_bytes(b"x")
    assert resolve_image(root, "a\\b.png", "row 1") == (root / "a\\b.png").resolve()


@pytest.mark.parametrize("name", ["C:\\coco\\1.jpg", "d:/coco/1.jpg"])
def test_a_path_with_a_drive_letter_is_refused_as_a_path(root: Path, name: str) -> None:
    with pytest.raises(RefusedImage, match=r"got the Windows path .*Name it relative") as no:
        resolve_image(root, name, "row 1")
    assert no.value.code == "outside-root"
