"""The parent of one VMM process. Runs alone and detached, outlives the worker that started it.

Usage: `vm_supervisor.py NETNS CONSOLE_BYTES VMM [ARGUMENT…]`, in the VM's own directory. It enters
the netns, starts the VMM, writes `vmm.json` (pids and start times), its serial output to `console`
(at most CONSOLE_BYTES; what comes later is read and dropped, so the guest never blocks), and at the
end `exit.json`. Standard library only, and it imports nothing of ours: it must start fast and go on
running while the product is upgraded.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
READ_BYTES = 65536

_libc = ctypes.CDLL(None, use_errno=True)


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot (proc(5), field 22 of stat)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def enter_network(name: str) -> None:
    """Move this process into a netns. Single-threaded, so setns(2) is enough."""
    with open(f"/run/netns/{name}", encoding="utf-8") as file:
        if _libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"enter the netns {name}: {os.strerror(code)}")


def write_whole(path: str, content: object) -> None:
    """Write JSON by rename."""
    with open(f".{path}.new", "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(f".{path}.new", path)  # noqa: PTH105 # pathlib would double the start-up time


def die_with_parent() -> None:
    """Runs in the child before exec: a killed supervisor must not leave its VMM unwatched."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def supervise(command: list[str], console_bytes: int) -> int:
    """Run the VMM to its end; returns its exit code, negative for a signal."""
    vmm = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent,  # noqa: PLW1509 # this program has one thread
    )
    pids = {"vmm": vmm.pid, "supervisor": os.getpid()}
    write_whole("vmm.json", {name: [pid, start_ticks(pid)] for name, pid in pids.items()})
    signal.signal(signal.SIGTERM, lambda *_: vmm.terminate())
    assert vmm.stdout is not None
    written = 0
    with open("console", "ab", buffering=0) as console:
        while data := os.read(vmm.stdout.fileno(), READ_BYTES):
            kept = data[: console_bytes - written]
            if kept:
                written += console.write(kept)
    return vmm.wait()


def main() -> int:
    """Run; the exit status of the VMM is on disk, ours says only whether that worked."""
    network, console_bytes, *command = sys.argv[1:]
    try:
        enter_network(network)
        code = supervise(command, int(console_bytes))
        write_whole("exit.json", {"code": code})
    except OSError as error:
        write_whole("exit.json", {"code": None, "error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
