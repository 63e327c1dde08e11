"""The way out of a VM's network, where a build may use the internet and nothing else.

`slirp4netns` carries it: a TCP/IP stack in a process that turns what comes by the TAP `out0` of the
netns into ordinary connections of this machine, whose firewall and routes stay as they are. What
may come there, one nftables table of the netns decides: of the guest alone, by its own address, to
public IPv4 addresses that are not this machine's. Which these are, the VM's supervisor writes into
it: before anything leads the guest out, and whenever the machine gets another. Whatever else is in
the netns has no way out, be it a VMM that its guest has taken over.

The guest's resolver is any: what it sends to port 53 of any address goes to slirp4netns, which asks
the host's own. So a `resolv.conf` in a snapshot needs nothing of ours when it is resumed.

Both are as the VM's: table and TAP die with the netns, the process with the VM's supervisor, which
is its parent; and the VM ends when the process does.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, collapse_addresses
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError

from activities.contract.errors import HostFaultError, NetworkNameError
from activities.contract.guest_network import GUEST_ADDRESS, TAP
from activities.contract.network_policy import NetworkAccess, NetworkPolicy
from activities.disk.cgroups import Limits
from activities.disk.host_tools import require_program
from activities.disk.programs import child_environment
from activities.microvm.network import in_network
from activities.microvm.vm_supervisor import EGRESS_DEVICE as OUT
from activities.microvm.vm_supervisor import EGRESS_TABLE as TABLE
from activities.microvm.vm_supervisor import OWN_SET as OWN
from activities.process.addresses import INSIDE
from activities.process.settings import Settings
from activities.step.vm_requirements import EGRESS_PROGRAMS

# slirp4netns' own numbers for the netns, the gateway and the resolver.
OUT_ADDRESS, OUT_PREFIX_BITS, GATEWAY, RESOLVER = "10.0.2.100", 24, "10.0.2.2", "10.0.2.3"
METADATA_SERVICE = "169.254.169.254"
"""The VMM's own; what it has left of it gets no answer, which would come before the VMM's."""
MTU = 65520  # the more in a packet, the fewer of them there are
MOST_CONNECTIONS = 4096
"""That the netns keeps track of."""
OPEN_FILES = 1024
"""One for each connection, of slirp4netns."""
LOG_BYTES = 1 << 20
LIMITS = Limits(memory_mb=256, processes=16, cpus=1)
NFT_SECONDS = 30.0
NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
# What becoming slirp4netns takes: entering the netns, a root directory of its own, and giving up
# all of it but the last, which its sandbox wants to keep.
CAPABILITIES = ("sys_admin", "setpcap", "net_bind_service")


@dataclass(frozen=True)
class Egress:
    """What a guest may reach: public addresses but for the host's own and `denied`; of them
    `allowed`, None is all.
    """

    denied: tuple[IPv4Network, ...]
    allowed: tuple[IPv4Network, ...] | None = None


def egress_of(
    settings: Settings, policy: NetworkPolicy, check: Callable[[], None]
) -> Egress | None:
    """Return what a policy means on this host now; None is no way out.

    Names are resolved here, once. Raises NetworkNameError for one that has no address,
    HostFaultError when the resolver does not answer.
    """
    if not policy.leads_out:
        return None
    denied = (*_inside(), *settings.denied_networks)
    if policy.access is NetworkAccess.INTERNET:
        return Egress(denied)
    found = [network for entry in policy.allowed for network in _networks(entry, check)]
    return Egress(denied, tuple(found))


def open_egress(name: str, egress: Egress) -> None:
    """Prepare a netns for slirp4netns: first what keeps the guest to what it may reach.

    What is there is replaced. Raises HostFaultError when the kernel or nft refuses.
    """
    try:
        in_network(name, lambda: _prepare(table(egress)))
    except (OSError, NetlinkError, subprocess.SubprocessError) as error:
        raise HostFaultError(f"cannot open a way out of {name}: {error}") from error


def table(egress: Egress) -> str:
    """Return the nftables table, for `nft -f`; it replaces itself."""
    allowed = ""
    if egress.allowed is not None:
        allowed = "ip daddr != @allowed reject with icmp type admin-prohibited"
    return f"""
table {TABLE} {{}}
delete table {TABLE}
table {TABLE} {{
    {_set(OWN, ())}
    {_set("denied", egress.denied)}
    {_set("allowed", egress.allowed or ())}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "{TAP}" meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {RESOLVER}
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        iifname "{TAP}" ip saddr != {GUEST_ADDRESS} drop
        meta nfproto != ipv4 drop
        ct state new ct count over {MOST_CONNECTIONS} drop
        ip daddr {RESOLVER} meta l4proto {{ tcp, udp }} th dport 53 accept
        iifname "{TAP}" ip daddr @{OWN} reject with icmp type admin-prohibited
        ct state established,related accept
        ip daddr {METADATA_SERVICE} drop
        ip daddr @denied reject with icmp type admin-prohibited
        {allowed}
        iifname "{TAP}" oifname "{OUT}" meta l4proto {{ tcp, udp, icmp }} accept
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        ct state established,related accept
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oifname {{ "lo", "{TAP}" }} accept
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{OUT}" masquerade
    }}
}}
"""


def nft_command() -> list[str]:
    """Return the command that takes nftables' words. Raises HostFaultError when it is missing."""
    return [require_program("nft", EGRESS_PROGRAMS["nft"]), "-f", "-"]


def command() -> list[str]:
    """Return the command of slirp4netns; its supervisor adds `--ready-fd`, the netns and `OUT`.

    Raises HostFaultError when a program is missing.
    """
    limits = [f"--nofile={OPEN_FILES}", f"--fsize={LOG_BYTES}", "--core=0"]
    only = ",".join(["-all", *(f"+{name}" for name in CAPABILITIES)])
    return [
        *(require_program("prlimit", "util-linux"), *limits, "--"),
        *(require_program("setpriv", "util-linux"), "--no-new-privs"),
        *("--inh-caps=-all", f"--bounding-set={only}", "--"),
        *(require_program("slirp4netns", EGRESS_PROGRAMS["slirp4netns"]), "--netns-type=path"),
        *(f"--mtu={MTU}", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp"),
    ]


def resolver_file() -> Path | None:
    """Return where the host's resolver is told; None on a host that has none."""
    path = Path("/etc/resolv.conf").resolve()
    return path if path.is_file() else None


def _prepare(rules: str) -> None:
    """In the netns: the table, then forwarding, then the TAP."""
    subprocess.run(
        nft_command(),
        input=rules,
        text=True,
        check=True,
        timeout=NFT_SECONDS,
        env=child_environment(),
    )
    for name, value in (("ipv4/ip_forward", "1"), ("ipv6/conf/all/disable_ipv6", "1")):
        path = Path("/proc/sys/net") / name
        if path.exists():  # a kernel without IPv6 has nothing to turn off
            path.write_text(value)
    with IPRoute() as route:
        for index in route.link_lookup(ifname=OUT):
            route.link("del", index=index)
        # Root's: the VMM in the same netns, which is another user's, must not take it.
        route.link("add", ifname=OUT, kind="tuntap", mode="tap", uid=0)
        index = route.link_lookup(ifname=OUT)[0]
        route.addr("add", index=index, address=OUT_ADDRESS, prefixlen=OUT_PREFIX_BITS)
        route.link("set", index=index, mtu=MTU, state="up")
        route.route("add", dst="default", gateway=GATEWAY)


def _set(name: str, networks: Sequence[IPv4Network]) -> str:
    listed = ", ".join(map(str, collapse_addresses(networks)))
    elements = f"elements = {{ {listed} }}" if listed else ""
    return f"set {name} {{ type ipv4_addr; flags interval; auto-merge; {elements} }}"


def _inside() -> Iterable[IPv4Network]:
    return [network for network in INSIDE if isinstance(network, IPv4Network)]


def _networks(entry: str, check: Callable[[], None]) -> list[IPv4Network]:
    """Return what an entry of a policy means: a network, or the addresses of a name."""
    check()
    try:
        return [IPv4Network(entry)]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(entry, None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in NO_SUCH_NAME:
            raise NetworkNameError(f"{entry} has no IPv4 address") from None
        raise HostFaultError(f"cannot resolve {entry}: {error.strerror}") from error
    return [IPv4Network(str(address[0])) for *_, address in found]
