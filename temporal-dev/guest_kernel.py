"""Make a guest kernel out of Debian's cloud kernel package.

`python temporal-dev/guest_kernel.py DIR` leaves `DIR/<version>/` with

- `vmlinux.bin`: the uncompressed ELF that Firecracker boots,
- `bzImage`: the same kernel as QEMU boots it,
- `initrd.img`: the virtio modules that this kernel does not have built in, and an init that loads
  them and hands over to the root file system.

The version's name is the only thing on standard output; progress goes to standard error. Needs
Debian with the packages apt, busybox-static, cpio and lz4 (and xz-utils where modules are packed).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

META_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/usr/bin/busybox")
NEEDED_COMMANDS = ("apt-get", "apt-cache", "dpkg-deb", "cpio", "lz4")
FILES = ("vmlinux.bin", "bzImage", "initrd.img")
RECIPE_MARK = ".recipe"

# A module comes after those it needs: the init loads them in this order with plain insmod.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio-rng",
)

# The kernel's own `ip=` is not compiled into Debian's kernel (and would run before virtio_net is
# there), so the init applies it. It leaves to the real init what a kernel without an initrd would:
# /dev mounted, /proc and /sys not, the same arguments.
INIT_SCRIPT = """\
#!/bin/busybox sh
set -f
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t devtmpfs dev /dev
for module in {modules}; do
    $bb insmod /modules/$module.ko
done

init=/sbin/init root= mode=ro type=ext4 flags= ip=
for argument in $($bb cat /proc/cmdline); do
    case $argument in
        init=*) init=${{argument#*=}} ;;
        root=*) root=${{argument#*=}} ;;
        ip=*) ip=${{argument#*=}} ;;
        rootfstype=*) type=${{argument#*=}} ;;
        rootflags=*) flags=,${{argument#*=}} ;;
        ro|rw) mode=$argument ;;
    esac
done

# client:server:gateway:netmask:hostname:device:autoconf:dns
configure_network() {{
    old_ifs=$IFS
    IFS=:
    set -- $ip
    IFS=$old_ifs
    device=${{6:-eth0}}
    $bb ip link set lo up
    $bb ifconfig "$device" "$1" ${{4:+netmask "$4"}} up
    if [ "$3" ]; then $bb route add default gw "$3" dev "$device"; fi
    if [ "$5" ]; then $bb hostname "$5"; fi
}}

fail() {{
    echo "initrd: $1"
    exit 1 # the kernel panics: its init is gone
}}

case $ip in
    *.*) configure_network ;;
esac

case $root in
    /dev/*) ;;
    *) fail "no root=/dev/... on the kernel command line" ;;
esac
tries=0
while [ ! -b "$root" ]; do
    tries=$((tries + 1))
    [ $tries -lt 500 ] || fail "$root did not appear"
    $bb usleep 10000
done
$bb mount -t "$type" -o "$mode$flags" "$root" /root || fail "cannot mount $root"
if [ -d /root/dev ]; then $bb mount -o move /dev /root/dev; fi
$bb umount /proc
unset SHLVL OLDPWD
exec $bb switch_root /root "$init" "$@"
"""


class KernelError(Exception):
    """The guest kernel cannot be made; the message says what to do."""


def main() -> int:
    """Make the kernel below the directory named on the command line."""
    parser = argparse.ArgumentParser(description="Make a guest kernel from Debian's cloud kernel.")
    parser.add_argument("directory", type=Path, help="where <version>/vmlinux.bin shall be")
    directory: Path = parser.parse_args().directory
    try:
        print(make_kernel(directory))
    except (KernelError, OSError, subprocess.CalledProcessError) as error:
        print(f"guest_kernel: {error}", file=sys.stderr)
        return 1
    return 0


def make_kernel(directory: Path) -> str:
    """Make `directory/<version>/` unless it is there already; answer the version."""
    require_tools()
    package = concrete_package()
    version = package.removeprefix("linux-image-")
    directory.mkdir(parents=True, exist_ok=True)
    with lock(directory / ".lock"):
        if is_made(directory / version):
            say(f"{directory / version} is there already")
        else:
            build(package, directory / version)
    return version


def build(package: str, target: Path) -> None:
    """Make all files in a directory beside the target and rename it into place."""
    with tempfile.TemporaryDirectory(prefix=".kernel-", dir=target.parent) as temporary:
        unpacked = download_and_unpack(package, Path(temporary))
        made = Path(temporary) / "made"
        made.mkdir()
        version = package.removeprefix("linux-image-")
        shutil.copyfile(unpacked / "boot" / f"vmlinuz-{version}", made / "bzImage")
        say("extracting vmlinux.bin")
        extract_vmlinux(made / "bzImage", made / "vmlinux.bin")
        say("making initrd.img")
        make_initrd(unpacked, Path(temporary) / "initrd", made / "initrd.img")
        (made / RECIPE_MARK).write_text(recipe())
        replace(made, target, Path(temporary) / "old")
    say(f"{target} is ready")


def replace(made: Path, target: Path, old: Path) -> None:
    """Rename a directory over another one; the old one goes with the temporary directory."""
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if target.exists():
        target.rename(old)
    made.rename(target)


def is_made(target: Path) -> bool:
    """Whether the files are there and this very script made them."""
    mark = target / RECIPE_MARK
    return (
        all((target / name).is_file() for name in FILES)
        and mark.is_file()
        and mark.read_text() == recipe()
    )


def recipe() -> str:
    """What the files depend on besides the package: this script."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def require_tools() -> None:
    """Name all missing Debian packages at once."""
    missing = [name for name in NEEDED_COMMANDS if shutil.which(name) is None]
    if not BUSYBOX.is_file():
        missing.append(str(BUSYBOX))
    if missing:
        raise KernelError(
            f"missing: {', '.join(missing)}; run: apt-get install busybox-static cpio lz4"
        )
    if b"INTERP" in run_output(["readelf", "-lW", str(BUSYBOX)], missing_ok=True):
        raise KernelError(f"{BUSYBOX} is not static; run: apt-get install busybox-static")


def run_output(command: list[str], *, missing_ok: bool = False) -> bytes:
    """The standard output of a command; empty if it may be missing and is."""
    if missing_ok and shutil.which(command[0]) is None:
        return b""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def concrete_package(meta_package: str = META_PACKAGE) -> str:
    """The versioned package that Debian's meta package stands for today."""
    for line in run_output(["apt-cache", "depends", meta_package]).decode().splitlines():
        relation, _, name = line.strip().partition(": ")
        if relation == "Depends" and name.startswith("linux-image-"):
            return name
    raise KernelError(f"apt knows no {meta_package}; run: apt-get update")


def download_and_unpack(package: str, temporary: Path) -> Path:
    """Download a package without installing it; answer the directory with its files."""
    say(f"downloading {package}")
    # apt drops to the user _apt for downloads, who may not write here: stay root without a warning.
    command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package]
    subprocess.run(command, check=True, cwd=temporary, stdout=sys.stderr)
    archive = next(temporary.glob("*.deb"))
    unpacked = temporary / "unpacked"
    say(f"unpacking {archive.name}")
    subprocess.run(["dpkg-deb", "-x", str(archive), str(unpacked)], check=True)
    return unpacked


def extract_vmlinux(bz_image: Path, vmlinux: Path) -> None:
    """Write the ELF inside a bzImage: an LZ4 (legacy format) payload plus its length."""
    payload = lz4_payload(bz_image.read_bytes())
    with vmlinux.open("wb") as out:
        subprocess.run(["lz4", "-d", "-c"], input=payload, stdout=out, check=True)
    with vmlinux.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            raise KernelError(f"what {bz_image} holds is not an ELF file")


def lz4_payload(image: bytes) -> bytes:
    """Cut the compressed payload out, as Linux' boot protocol describes it."""
    if image[0x202:0x206] != b"HdrS":
        raise KernelError("not a bzImage: no boot protocol header")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if payload[:4] != b"\x02\x21\x4c\x18":
        raise KernelError("the kernel is not packed with LZ4: this Debian kernel is unknown here")
    # The kernel's build appends the unpacked size, which lz4 would take for another block.
    return payload[:-4]


def make_initrd(unpacked: Path, tree: Path, initrd: Path) -> None:
    """Pack busybox, the modules and the init script into a cpio archive."""
    for name in ("bin", "modules", "proc", "dev", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copyfile(BUSYBOX, tree / "bin" / "busybox")
    (tree / "bin" / "busybox").chmod(0o755)
    for module in MODULES:
        copy_module(unpacked, module, tree / "modules" / f"{module}.ko")
    (tree / "init").write_text(INIT_SCRIPT.format(modules=" ".join(MODULES)))
    (tree / "init").chmod(0o755)
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    with initrd.open("wb") as out:
        command = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "--reproducible"]
        subprocess.run(command, input="\n".join(names).encode(), stdout=out, cwd=tree, check=True)


def copy_module(unpacked: Path, module: str, target: Path) -> None:
    """Copy one kernel module, unpacked where the distribution packs it."""
    found = next((unpacked / "lib" / "modules").rglob(f"{module}.ko*"), None)
    if found is None:
        raise KernelError(f"the kernel package has no module {module}")
    if found.suffix == ".xz":
        target.write_bytes(run_output(["xz", "-dc", str(found)]))
    else:
        shutil.copyfile(found, target)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let one process at a time build in a directory."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(message: str) -> None:
    """Report progress to whoever waits."""
    print(f"guest_kernel: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
