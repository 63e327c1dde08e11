from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from activities.microvm.guest_kernel import BUILT_IN, DRIVERS, WANTED, judge_kernel, kernel_options

ENOUGH = {each[0]: "y" for each in (*BUILT_IN, *DRIVERS)} | dict.fromkeys(WANTED, "y")


def kernel(place: Path, options: dict[str, str], *, initrd: bool = False) -> Path:
    text = "# Linux/x86 6.1 Kernel Configuration\nCONFIG_HZ=250\n# CONFIG_MODULES is not set\n"
    text += "".join(f"CONFIG_{name}={how}\n" for name, how in options.items())
    packed = b"IKCFG_ST" + gzip.compress(text.encode()) + b"IKCFG_ED"
    path = place / "vmlinux.bin"
    path.write_bytes(b"\x7fELF" + bytes(5000) + packed + bytes(5000))
    if initrd:
        (place / "initrd.img").touch()
    return path


def test_a_kernel_that_has_everything(tmp_path: Path) -> None:
    verdict = judge_kernel(kernel(tmp_path, ENOUGH))
    assert (verdict.has_config, verdict.missing, verdict.unwanted) == (True, (), ())


@pytest.mark.parametrize("name", sorted({each[0] for each in (*BUILT_IN, *DRIVERS)}))
def test_each_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    options = {other: how for other, how in ENOUGH.items() if other != name}
    [missing] = judge_kernel(kernel(tmp_path, options)).missing
    assert missing.split(" or ")[0] == name


def test_drivers_as_modules_take_an_initrd(tmp_path: Path) -> None:
    options = ENOUGH | {each[0]: "m" for each in DRIVERS}
    names = tuple(each[0] for each in DRIVERS)
    assert judge_kernel(kernel(tmp_path, options)).missing == names
    with_initrd = kernel(tmp_path, options | {"BLK_DEV_INITRD": "y"}, initrd=True)
    assert judge_kernel(with_initrd).missing == ()
    cannot = kernel(tmp_path, options, initrd=True)
    assert judge_kernel(cannot).missing == ("BLK_DEV_INITRD",)


def test_acpi_tells_of_devices_too(tmp_path: Path) -> None:
    options = {**ENOUGH, "ACPI": "y"}
    del options["VIRTIO_MMIO_CMDLINE_DEVICES"]
    assert judge_kernel(kernel(tmp_path, options)).missing == ()


def test_what_guests_do_without_is_said_with_what_it_means(tmp_path: Path) -> None:
    options = {name: how for name, how in ENOUGH.items() if name != "VMGENID"}
    verdict = judge_kernel(kernel(tmp_path, options))
    assert verdict.missing == ()
    assert verdict.unwanted == ("VMGENID: resumed guests share the kernel's random numbers",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF without any",
        b"IKCFG_ST",
        b"IKCFG_STnot a gzipIKCFG_ED",
        b"IKCFG_ED" + bytes(10) + b"IKCFG_ST",
    ],
)
def test_a_kernel_that_does_not_tell_is_no_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vmlinux.bin"
    path.write_bytes(content)
    assert kernel_options(path) is None
    assert not judge_kernel(path).has_config


def test_a_configuration_without_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux.bin"
    bomb = gzip.compress(b"CONFIG_EXT4_FS=y\n" + b"#" * (64 << 20))
    path.write_bytes(b"IKCFG_ST" + bomb + b"IKCFG_ED")
    assert kernel_options(path) == {"EXT4_FS": "y"}
