"""The parent of one VMM process. Runs alone and detached, outlives the worker that started it.

Usage: `vm_supervisor.py NETNS CONSOLE_BYTES VMM [ARGUMENT…]`, in the VM's own directory. Where that
has an `egress.json`, it denies the host's own addresses to the guest and starts what leads it out,
while it is still in the host's network; those that the host gets later are denied when it gets
them. When one of these fails, the VMM ends. It enters the netns, starts the VMM, and writes

- `vmm.json`: pids and start times;
- `console`: what the guest says on its serial console, in whole lines. Of lines that are not of our
  script in the guest, and again of the start command's, the first CONSOLE_BYTES; what decides a
  build (`DECIDING`) has room of its own. The rest is read and dropped: the guest never waits.
  Until it is read it is in memory, of which the VMM's cgroup counts it;
- `console.lost`: how much that was;
- `egress.log`: what leads the guest out says;
- `vmm.log`: the end of what the VMM itself says. It comes by the FIFO `vmm.log.pipe`, if that is
  there, which is also the VMM's standard error;
- at the end `exit.json`.

Standard library only, and it imports nothing of ours: it must start fast and go on running while
the product is upgraded.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys

CLONE_NEWNET = 0x40000000
READ_BYTES = 1 << 20
READS, LAST_READS = 64, 1024
"""So often one thing is read before the others are looked at, and at the end."""
PAGE_BYTES = 4096
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
OURS = b"@tm@ "
DECIDING = (
    *(b"start", b"start-exit", b"ready-attempt", b"ready", b"failed"),
    *(b"exit", b"refused", b"done"),  # of a step
)
DECIDING_BYTES = 1 << 20
LINE_BYTES = 1 << 16
LOG_BYTES = 1 << 18
LOG_KEPT_BYTES = 1 << 16
LOG_PIPE_BYTES = 1 << 20  # more takes CAP_SYS_RESOURCE
LOOK_MS = (20, 200)
"""So often the console is looked at: while the guest talks, and when it has been quiet."""
LOST_WRITE = b"Failed the write to serial"
EGRESS_PLAN, EGRESS_LOG = "egress.json", "egress.log"
# Of a pid namespace of its own: it sees neither us nor the VMM.
EGRESS_PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--")
EGRESS_DEVICE = "out0"
EGRESS_SECONDS = 30
EGRESS_ENDED = "what led the guest to the internet has ended"
EGRESS_TABLE, OWN_SET = "inet template_manager", "own"
"""Of the netns: nftables' table, and the set in it of the host's own networks."""
EGRESS_DENY = "deny"
"""In `egress.json`: the command that takes nftables' words."""
DENY_SECONDS = 30
ASKS = 10
NOT_DENIED = "the host's own addresses cannot be denied to the guest"
# linux/netlink.h, linux/rtnetlink.h
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12
NLMSG_ERROR, NLMSG_DONE, NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 2, 3, 0x1, 0x300, 0x10
RTM_NEWROUTE, RTM_GETROUTE, RTMGRP_IPV4_ROUTE, RTN_LOCAL, RTA_DST = 24, 26, 0x40, 2, 1
HEADER, ERROR = struct.Struct("=IHHII"), struct.Struct("=i")
ROUTE, ATTRIBUTE = struct.Struct("=8BI"), struct.Struct("=HH")

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


def pid_file() -> str:
    """Return where the jailer writes the VMM's pid before it ends itself; '' without one."""
    with contextlib.suppress(FileNotFoundError), open("launch.json", encoding="utf-8") as file:
        return str(json.load(file)["pid_file"])
    return ""


def vmm_pid(started: subprocess.Popen[bytes]) -> int:
    """Return the VMM's pid: what was started, or what the jailer has left; 0 if it has failed."""
    file = pid_file()
    if not file:
        return started.pid
    if started.wait() != 0:
        return 0
    with open(file, encoding="ascii") as content:
        return int(content.read())


def host_pid(pid: int) -> int:
    """Return the host's number for a process: ours is the first of a pid namespace."""
    descriptor = os.pidfd_open(pid)
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
            return int(next(line for line in file if line.startswith("Pid:")).split()[1])
    finally:
        os.close(descriptor)


class Spool:
    """The VMM's standard output: a file in memory, of which what has been read is given back.

    Firecracker does not wait for who reads: what a pipe cannot take is lost, and a pipe holds a few
    seconds of what a guest can say. This takes all of it, however long nobody looks.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("console", os.MFD_CLOEXEC)
        self._position = self._given_back = 0

    def take(self) -> bytes:
        """Return more of what has come; b"" when that was all."""
        data = os.pread(self.descriptor, READ_BYTES, self._position)  # the VMM has the offset
        self._position += len(data)
        self._give_back(self._position - self._position % PAGE_BYTES)
        return data

    def _give_back(self, end: int) -> None:
        if end == self._given_back:
            return
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        start, length = (
            ctypes.c_int64(number) for number in (self._given_back, end - self._given_back)
        )
        _libc.fallocate(self.descriptor, mode, start, length)
        self._given_back = end


class Console:
    """The file of what the guest says, bounded, and the count of what is not in it."""

    def __init__(self, console_bytes: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open("console", flags, 0o600)
        self._room = {"other": console_bytes, "said": console_bytes, "deciding": DECIDING_BYTES}
        self._rest = b""
        self._is_endless = self._is_torn = False
        self._told = self.lost = {"lines": 0, "writes": 0}

    def take(self, data: bytes) -> None:
        """Take what has come, b"" at the end.

        Of a line without an end the beginning is kept: what follows must not stand as a line.
        """
        *whole, self._rest = (self._rest + data).split(b"\n")
        if self._is_endless and whole:
            del whole[0]
            self._is_endless = False
        if self._is_endless:
            self._rest = b""
        elif len(self._rest) > LINE_BYTES or not data:
            whole, self._rest, self._is_endless = [*whole, self._rest], b"", True
        kept = [line + b"\n" for line in whole if self._has_room(line)]
        self._write(b"".join(kept), len(kept))

    def tell(self) -> None:
        """Leave the counts where the worker finds them."""
        if self.lost != self._told:
            with contextlib.suppress(OSError):  # a full disk: the next time, perhaps
                write_whole("console.lost", self.lost)
                self._told = self.lost

    def lose(self, what: str, count: int) -> None:
        """Count what is lost."""
        self.lost = {**self.lost, what: self.lost[what] + count}

    def _has_room(self, line: bytes) -> bool:
        kind = "other"
        if line.startswith(OURS):
            word = line[len(OURS) :].split(b" ", 1)[0].rstrip(b"\r")
            kind = "deciding" if word in DECIDING else "said"
        self._room[kind] -= len(line) + 1
        if self._room[kind] >= 0:
            return True
        if line.rstrip(b"\r"):
            self.lose("lines", 1)
        return False

    def _write(self, data: bytes, lines: int) -> None:
        if not data:
            return
        wanted = b"\n" + data if self._is_torn else data
        written = 0
        with contextlib.suppress(OSError):  # the disk is full: the guest must not wait for it
            written = os.write(self._file, wanted)
        self._is_torn = written not in (0, len(wanted)) or (self._is_torn and written == 0)
        if written < len(wanted):
            self.lose("lines", lines - wanted[:written].count(b"\n"))


class Log:
    """The end of what the VMM says, in a file; its beginning is given up for it."""

    def __init__(self) -> None:
        self.pipe = self.errors = -1
        with contextlib.suppress(FileNotFoundError):  # read and write: it has no end, and no wait
            self.pipe = os.open("vmm.log.pipe", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self.errors = os.open("vmm.log.pipe", os.O_WRONLY | os.O_CLOEXEC)
            fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, LOG_PIPE_BYTES)
        self._end = b""

    def take(self) -> int:
        """Move what has come to the file; returns how often the console lost a write."""
        if self.pipe < 0:
            return 0
        lost = 0
        with contextlib.suppress(BlockingIOError):
            for _ in range(READS):
                data = os.read(self.pipe, READ_BYTES)
                self._keep(data)
                lost += data.count(LOST_WRITE)
        return lost

    def _keep(self, data: bytes) -> None:
        self._end += data
        mode = "ab"
        if len(self._end) > LOG_BYTES:
            self._end = data = self._end[-LOG_KEPT_BYTES:]
            mode = "wb"
        with contextlib.suppress(OSError), open("vmm.log", mode, buffering=0) as file:
            file.write(data)


class OwnNetworks:
    """What the host takes to be itself, and is denied to the guest: its kernel's local routes.

    These are its addresses, and whole networks that are routed to it, as load balancers of clouds
    have it. What it has had stays denied.
    """

    def __init__(self, network: str, deny: list[str]) -> None:
        """Deny what there is. To be made in the host's network, from which it goes on to hear."""
        self._network = network
        self._deny = deny
        self._denied: set[str] = set()
        self._told = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._told.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)  # local ones alone, if it can
        self._told.bind((0, RTMGRP_IPV4_ROUTE))
        self._ask()

    def fileno(self) -> int:
        """Return what is ready to read when there is more to deny."""
        return self._told.fileno()

    def update(self) -> None:
        """Deny what has been told since. Raises OSError when that cannot be."""
        try:
            networks, _, _ = local_networks(self._told.recv(READ_BYTES))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._ask()  # more was told than there was room for
        else:
            self._add(networks)

    def _ask(self) -> None:
        """Have all of it told, and deny it."""
        route = ROUTE.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, RTN_LOCAL, 0)
        flags = NLM_F_REQUEST | NLM_F_DUMP
        self._told.settimeout(DENY_SECONDS)
        for _ in range(ASKS):
            self._told.send(
                HEADER.pack(HEADER.size + ROUTE.size, RTM_GETROUTE, flags, 0, 0) + route
            )
            if self._hear_answer():
                self._told.setblocking(False)
                return
        raise OSError("the host's addresses change all the time")

    def _hear_answer(self) -> bool:
        """Deny what is told until the end of an answer; returns whether that was all of it."""
        found, is_end, is_whole = set[str](), False, True
        while not is_end:
            try:
                networks, is_end, is_torn = local_networks(self._told.recv(READ_BYTES))
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                networks, is_torn = set(), True
            found |= networks
            is_whole = is_whole and not is_torn
        self._add(found)
        return is_whole

    def _add(self, networks: set[str]) -> None:
        all_of_them = self._denied | networks
        if all_of_them == self._denied:
            return
        of_it = f"{EGRESS_TABLE} {OWN_SET}"
        elements = ", ".join(sorted(all_of_them))
        try:
            subprocess.run(
                self._deny,
                input=f"flush set {of_it}\nadd element {of_it} {{ {elements} }}\n".encode(),
                check=True,
                timeout=DENY_SECONDS,
                env={},
                preexec_fn=lambda: enter_network(self._network),  # it has no other thread
            )
        except subprocess.SubprocessError as error:
            raise OSError(f"{NOT_DENIED}: {error}") from None
        self._denied = all_of_them


def local_networks(data: bytes) -> tuple[set[str], bool, bool]:
    """Return the networks that news of netlink's make the host's own; whether they end an answer;
    and whether that answer has changed while it was told. Raises OSError for an error.
    """
    found, is_end, is_torn = set[str](), False, False
    while data:
        length, kind, flags, _, _ = HEADER.unpack_from(data)
        content, data = data[HEADER.size : length], data[(length + 3) & ~3 :]
        is_end = is_end or kind == NLMSG_DONE
        is_torn = is_torn or bool(flags & NLM_F_DUMP_INTR)
        if kind == NLMSG_ERROR:
            code = -ERROR.unpack_from(content)[0]
            raise OSError(code, f"{NOT_DENIED}: {os.strerror(code)}")
        if kind == RTM_NEWROUTE:
            found |= local_network(content)
    return found, is_end, is_torn


def local_network(route: bytes) -> set[str]:
    """Return the network that a route of netlink's makes the host's own, or nothing.

    A route of everything makes nothing its own: whoever has one marks the packets that it is for.
    """
    family, bits, *_, kind, _ = ROUTE.unpack_from(route)
    if family != socket.AF_INET or kind != RTN_LOCAL or not bits:
        return set()
    attributes = route[ROUTE.size :]
    while attributes:
        length, name = ATTRIBUTE.unpack_from(attributes)
        if name == RTA_DST:
            return {f"{socket.inet_ntoa(attributes[ATTRIBUTE.size : length])}/{bits}"}
        attributes = attributes[(length + 3) & ~3 :]
    return set()


class Egress:
    """What leads the guest out, and keeps it from the host while it does."""

    def __init__(self, network: str) -> None:
        """Start it by its plan, and wait until it leads out. Raises OSError."""
        with open(EGRESS_PLAN, encoding="utf-8") as file:
            deny = json.load(file)[EGRESS_DENY]
        self._own = OwnNetworks(network, deny)
        self._carrier = start_carrier(network)

    def fileno(self) -> int:
        """Return what is ready to read when there is something to look at."""
        return self._own.fileno()

    def look(self) -> str:
        """Keep the guest from what the host has come to be; returns why it must end, or ''."""
        if self._carrier.poll() is not None:
            return EGRESS_ENDED
        try:
            self._own.update()
        except OSError as error:
            return str(error)
        return ""


def start_carrier(network: str) -> "subprocess.Popen[bytes]":
    """Start what leads the guest out, and wait until it does. Raises OSError."""
    launcher = f"{__file__.rpartition('/')[0]}/vm_launcher.py"
    inner = os.open(f"/run/netns/{network}", os.O_RDONLY)
    ready, tell_ready = os.pipe()
    told = [f"--ready-fd={tell_ready}", f"/proc/self/fd/{inner}", EGRESS_DEVICE]
    with open(EGRESS_LOG, "ab") as log:
        egress = subprocess.Popen(
            [*EGRESS_PROCESSES, sys.executable, "-I", "-S", launcher, EGRESS_PLAN, *told],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": os.defpath},
            pass_fds=(inner, tell_ready),
        )
    os.close(inner)
    os.close(tell_ready)
    is_told, _, _ = select.select([ready], [], [], EGRESS_SECONDS)
    if not is_told or not os.read(ready, 1):
        raise OSError(f"the guest cannot be led to the internet: {last_line(EGRESS_LOG)}")
    os.close(ready)
    return egress


def last_line(path: str) -> str:
    """Return the last line of a small file."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "it says nothing"


def supervise(command: list[str], console_bytes: int, egress: Egress | None = None) -> int:
    """Run the VMM to its end; returns its exit code, negative for a signal.

    Raises OSError when what leads the guest out has ended, or failed, before it.
    """
    log, spool = Log(), Spool()
    vmm = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=spool.descriptor,
        stderr=spool.descriptor if log.errors < 0 else log.errors,
    )
    if log.errors >= 0:
        os.close(log.errors)
    pid = vmm_pid(vmm)
    if pid:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
        pids = {"vmm": host_pid(pid), "supervisor": host_pid(os.getpid())}
        write_whole("vmm.json", {name: [pid, start_ticks(pid)] for name, pid in pids.items()})
    why = follow(os.pidfd_open(pid) if pid else -1, spool, log, Console(console_bytes), egress)
    if why:
        raise OSError(why)
    if pid in (0, vmm.pid):
        return vmm.wait()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def follow(
    vmm: int,
    spool: Spool,
    log: Log,
    console: Console,
    egress: Egress | None = None,
) -> str:
    """Move what guest and VMM say to their files until the VMM has ended.

    `vmm` is its pidfd, -1 if it has not even started. The VMM is ended when `egress` ends or fails:
    what its guest does from then on would fail for no reason of its own, or reach the host. Returns
    why that was, '' if it was not.
    """
    why = ""
    poll = select.poll()
    for descriptor in (vmm, log.pipe, egress.fileno() if egress else -1):
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
    is_alive, pause = True, LOOK_MS[0]
    while is_alive:
        ready = {descriptor for descriptor, _ in poll.poll(pause)}
        is_alive = vmm >= 0 and vmm not in ready
        if is_alive and egress and not why and (why := egress.look()):
            signal.pidfd_send_signal(vmm, signal.SIGKILL)
        pause = min(2 * pause, LOOK_MS[1])
        for _ in range(READS if is_alive else LAST_READS):
            if not (data := spool.take()):
                break
            console.take(data)
            pause = LOOK_MS[0]
        if lost := log.take():
            console.lose("writes", lost)
        console.tell()
    console.take(b"")
    console.tell()
    return why


def main() -> int:
    """Run; the exit status of the VMM is on disk, ours says only whether that worked."""
    network, console_bytes, *command = sys.argv[1:]
    try:
        is_led_out = os.path.exists(EGRESS_PLAN)  # noqa: PTH110 # pathlib would start slower
        egress = Egress(network) if is_led_out else None
        enter_network(network)
        code = supervise(command, int(console_bytes), egress)
        write_whole("exit.json", {"code": code})
    except OSError as error:
        write_whole("exit.json", {"code": None, "error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
