"""Taking a kernel package apart."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from emberbox.runtime.firecracker import kernel
from emberbox.runtime.firecracker.errors import GuestFilesError

ELF = b"\x7fELF" + bytes(range(256)) * 5000


def boot_image(payload: bytes, setup_sects: int = 3) -> bytes:
    """A file laid out as the boot protocol says, with `payload` where the packed kernel is."""
    offset = 0x40
    head = bytearray((setup_sects + 1) * 512 + offset)
    head[0x1F1] = setup_sects
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, offset, len(payload))
    return bytes(head) + payload + b"\0" * 100


def lz4_legacy(data: bytes) -> bytes:
    packed = subprocess.run(["lz4", "-l", "-c"], input=data, capture_output=True, check=True, timeout=30).stdout
    return packed + struct.pack("<I", len(data))


def size_trailer(data: bytes) -> bytes:
    return struct.pack("<I", len(data))


@pytest.mark.skipif(shutil.which("lz4") is None, reason="the program lz4 is missing")
def test_an_lz4_kernel_is_unpacked() -> None:
    vmlinuz = boot_image(lz4_legacy(ELF))

    assert kernel.extract_vmlinux(vmlinuz) == ELF


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(ELF) + size_trailer(ELF), lzma.compress(ELF) + size_trailer(ELF), ELF],
    ids=["gzip", "xz", "unpacked"],
)
def test_other_packings_are_unpacked(packed: bytes) -> None:
    assert kernel.extract_vmlinux(boot_image(packed)) == ELF


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"MZ", "not a Linux boot image"),
        (boot_image(b"????" * 9), "packed in an unknown way"),
        (boot_image(lzma.compress(b"text")), "not an ELF"),
        (boot_image(ELF)[:2200], "cut short"),
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(image: bytes, words: str) -> None:
    with pytest.raises(GuestFilesError, match=words):
        kernel.extract_vmlinux(image)


def a_tree(root: Path, modules: dict[str, str], builtin: str = "") -> kernel.KernelTree:
    folder = root / "lib" / "modules" / "6.1.0-9-test" / "kernel"
    folder.mkdir(parents=True)
    (root / "boot").mkdir()
    (root / "boot" / "vmlinuz-6.1.0-9-test").touch()
    (folder.parent / "modules.builtin").write_text(builtin)
    for name, depends in modules.items():
        content = b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0"
        (folder / name).write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    return kernel.open_tree(root)


def test_modules_load_after_what_they_depend_on(tmp_path: Path) -> None:
    tree = a_tree(
        tmp_path,
        {"virtio_blk.ko": "virtio,virtio_ring", "virtio.ko": "virtio_ring", "virtio_ring.ko": "", "other.ko": ""},
    )

    ordered = kernel.modules_in_load_order(tree, ["virtio_blk", "virtio"])

    assert [path.name for path in ordered] == ["virtio_ring.ko", "virtio.ko", "virtio_blk.ko"]


def test_module_names_match_with_either_dash_and_when_packed(tmp_path: Path) -> None:
    tree = a_tree(tmp_path, {"virtio-rng.ko.xz": ""})

    ordered = kernel.modules_in_load_order(tree, ["virtio_rng"])

    assert [path.name for path in ordered] == ["virtio-rng.ko.xz"]
    assert kernel.read_module(ordered[0]).startswith(b"\x7fELF")


def test_a_built_in_module_needs_no_file(tmp_path: Path) -> None:
    tree = a_tree(tmp_path, {"erofs.ko": "libcrc32c"}, builtin="kernel/lib/libcrc32c.ko\n")

    assert [path.name for path in kernel.modules_in_load_order(tree, ["erofs"])] == ["erofs.ko"]


def test_an_optional_module_that_is_missing_is_left_out(tmp_path: Path) -> None:
    tree = a_tree(tmp_path, {"erofs.ko": "", "ptp_kvm.ko": ""})

    ordered = kernel.modules_in_load_order(tree, ["erofs"], optional=["ptp_kvm", "ptp_vmw"])

    assert [path.name for path in ordered] == ["erofs.ko", "ptp_kvm.ko"]


def test_a_missing_module_says_who_needs_it(tmp_path: Path) -> None:
    tree = a_tree(tmp_path, {"erofs.ko": "libcrc32c"})

    with pytest.raises(GuestFilesError, match=r"no module 'libcrc32c', needed by module 'erofs'"):
        kernel.modules_in_load_order(tree, ["erofs"])


def test_a_folder_without_a_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuestFilesError, match="expected one kernel"):
        kernel.open_tree(tmp_path)


def test_package_lists_are_fetched_when_apt_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def apt(command: list[str], cwd: Path | None = None) -> str:
        asked.append(" ".join(command[:2]))
        if command[0] == "apt-cache" and "apt-get update" not in asked:
            raise GuestFilesError("E: No packages found")
        if command[1] == "download":
            (tmp_path / "linux-image-9-cloud-amd64_1_amd64.deb").touch()
        return "linux-image-cloud-amd64\n  Depends: linux-image-9-cloud-amd64\n"

    monkeypatch.setattr(kernel, "_run", apt)

    packages = kernel.fetch_packages(tmp_path)

    assert [package.name for package in packages] == ["linux-image-9-cloud-amd64_1_amd64.deb"]
    assert asked[-3:] == ["apt-cache depends", "apt-cache depends", "apt-get download"]
    assert asked.count("apt-get update") == 1

    asked.clear()
    kernel.fetch_packages(tmp_path, update=True)
    assert asked[0] == "apt-get update"


def test_modules_that_have_a_package_of_their_own_are_fetched_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Ubuntu."""
    known = {
        "linux-image-virtual": "linux-image-virtual\n  Depends: linux-image-6.8.0-1-generic\n",
        "linux-image-6.8.0-1-generic": (
            "linux-image-6.8.0-1-generic\n  Depends: kmod\n  Depends: linux-base\n"
            "  Depends: linux-modules-6.8.0-1-generic\n"
        ),
    }

    def apt(command: list[str], cwd: Path | None = None) -> str:
        if command[1] == "download":
            for name in command[3:]:
                (tmp_path / f"{name}_1_amd64.deb").touch()
            return ""
        if command[-1] not in known:
            raise GuestFilesError("E: No packages found")
        return known[command[-1]]

    monkeypatch.setattr(kernel, "_run", apt)

    assert [package.name for package in kernel.fetch_packages(tmp_path)] == [
        "linux-image-6.8.0-1-generic_1_amd64.deb",
        "linux-modules-6.8.0-1-generic_1_amd64.deb",
    ]


@pytest.mark.parametrize("above", ["lib", "usr/lib"])
def test_modules_are_found_in_both_places(tmp_path: Path, above: str) -> None:
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz-6.12.1-cloud").touch()
    modules = tmp_path / above / "modules" / "6.12.1-cloud"
    modules.mkdir(parents=True)

    assert kernel.open_tree(tmp_path).modules == modules


def test_a_kernel_that_apt_never_heard_of_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_run", lambda command, cwd=None: "")

    with pytest.raises(GuestFilesError, match="EMBERBOX_GUEST_KERNEL"):
        kernel.fetch_packages(tmp_path)
