"""A fleet at work: many builds of several tenants on many hosts, for `make bench`.

Everything is real but the steps' work, which is a sleep (`fleet_hosts.py`): workflows, holds,
admission, leases, logs, Temporal's dev server and the bucket. All builds wait before the hosts
open, so that each tenant has a line until the last of its builds has a host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import psutil
from devstack.environment import HERE, REPOSITORY
from devstack.stack import Stack
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

from temporalio.client import Client, WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter

from activities.contract.inputs import BuildInput
from activities.contract.names import WORKFLOW_TASK_QUEUE, Step, build_workflow_id
from activities.contract.requests import TemplateConfig
from activities.contract.search_attributes import RUNNING_BUILDS
from activities.contract.sources import FromImage
from activities.contract.status import BuildResult, StepRecord
from workflows.build_template import BuildTemplate

HOSTS_IN_A_PROCESS = 5
SERVICES = ("gcs-emulator", "gcs", "bucket", "temporal")
REQUEST = re.compile(r"^service_requests\{(?P<labels>[^}]*)\} (?P<count>[0-9.e+]+)$", re.MULTILINE)
OPERATION = re.compile(r'operation="(?P<name>\w+)"')
# What the bench itself asks.
OWN_CALLS = {
    "CountWorkflowExecutions",
    "DescribeWorkflowExecution",
    "GetSystemInfo",
    "GetWorkflowExecutionHistory",
}
PERIODS = 5
POLL_SECONDS = 0.5
LEAST_OF_IDEAL = 0.95
MOST_EVENTS = 120

Handle = WorkflowHandle[BuildTemplate, BuildResult]


@dataclass(frozen=True)
class Fleet:
    """How many hosts there are, and what they are to build."""

    hosts: int
    slots: int
    builds: Mapping[str, int]
    """By tenant."""
    weights: Mapping[str, float]
    seconds: float
    """What the steps of one build take together."""

    @property
    def slot_count(self) -> int:
        """The slots of all hosts."""
        return self.hosts * self.slots

    @property
    def ideal_seconds(self) -> float:
        """How long all builds take when no slot ever waits."""
        return sum(self.builds.values()) * self.seconds / self.slot_count


SMALL = Fleet(2, 2, {"a": 2, "b": 2, "c": 4}, {"a": 1, "b": 1, "c": 2}, 5)
USUAL = Fleet(20, 2, {"a": 50, "b": 50, "c": 100}, {"a": 1, "b": 1, "c": 2}, 25)
WHOLE = Fleet(100, 2, {"a": 250, "b": 250, "c": 500}, {"a": 1, "b": 1, "c": 2}, 25)


@dataclass(frozen=True)
class Held:
    """The time in which a build had its host; seconds of the wall clock."""

    tenant: str
    begin: float
    end: float


@dataclass(frozen=True)
class Process:
    """What a process of the fleet has used."""

    name: str
    peak_mb: float
    cpu_seconds: float


@dataclass(frozen=True)
class Ran:
    """What came out of it."""

    fleet: Fleet
    opened: float
    """When the hosts began to take builds, in seconds of the wall clock."""
    held: Sequence[Held]
    events: Sequence[int]
    """Of each build's history."""
    bytes: Sequence[int]
    calls: Mapping[str, int]
    """Of Temporal's frontend, by operation, from the first start to the last end."""
    processes: Sequence[Process]
    """From their own start on, which is before the hosts open."""
    open_cpu_seconds: float
    """What they have used since the hosts opened."""

    @property
    def makespan(self) -> float:
        """Seconds until the last build had let go of its host."""
        return max(held.end for held in self.held) - self.opened

    @property
    def of_ideal(self) -> float:
        """What part of the time is the steps' own; 1 is the best."""
        return self.fleet.ideal_seconds / self.makespan

    @property
    def cpu_seconds(self) -> float:
        """What all processes have used for one build."""
        return _cpu_seconds(self.processes) / len(self.held)

    @property
    def processors(self) -> float:
        """How many processors they kept busy while the hosts were open, on the average."""
        return self.open_cpu_seconds / self.makespan

    @property
    def carried_slots(self) -> float:
        """How many slots could be busy at once if this machine's processors did nothing else."""
        return (os.cpu_count() or 1) * self.fleet.seconds / self.cpu_seconds

    @property
    def busy(self) -> float:
        """How many slots had a build, on the average."""
        return sum(held.end - held.begin for held in self.held) / self.makespan


def all_wait(held: Sequence[Held], opened: float) -> tuple[float, float]:
    """Return the time in which every tenant has a build that waits for a host."""
    last = {tenant: max(h.begin for h in held if h.tenant == tenant) for tenant in _tenants(held)}
    return opened, min(last.values())


def shares(held: Sequence[Held], begin: float, end: float) -> dict[str, float]:
    """Return what part of the slots' time each tenant had between two times."""
    spent = {
        tenant: sum(
            max(0.0, min(h.end, end) - max(h.begin, begin)) for h in held if h.tenant == tenant
        )
        for tenant in _tenants(held)
    }
    total = sum(spent.values())
    return {tenant: seconds / total if total else 0.0 for tenant, seconds in spent.items()}


def _tenants(held: Sequence[Held]) -> list[str]:
    return sorted({each.tenant for each in held})


def run_fleet(fleet: Fleet) -> Ran:
    """Build with such a fleet, on a stack of its own."""
    with Stack(only=SERVICES, apps=("worker",)) as stack:
        place = stack.environment.state_dir
        with _hosts(fleet, stack.variables, place) as hosts:
            return asyncio.run(_run(fleet, stack, hosts))


@contextlib.contextmanager
def _hosts(
    fleet: Fleet, variables: Mapping[str, str], place: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Have the hosts' processes, ready to be opened by a line each."""
    program = [sys.executable, str(HERE / "fleet_hosts.py")]
    started = []
    try:
        for first in range(0, fleet.hosts, HOSTS_IN_A_PROCESS):
            count = min(HOSTS_IN_A_PROCESS, fleet.hosts - first)
            started.append(
                subprocess.Popen(
                    [*program, *map(str, (first, count, fleet.slots, fleet.seconds, place))],
                    env={**os.environ, **variables},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a process of hosts did not start")
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


async def _run(fleet: Fleet, stack: Stack, hosts: Sequence[subprocess.Popen[str]]) -> Ran:
    client = await Client.connect(
        stack.variables["TEMPORAL_ADDRESS"], data_converter=pydantic_data_converter
    )
    before = _calls(stack)
    tenants = [tenant for tenant, count in fleet.builds.items() for _ in range(count)]
    handles = [await _start(client, tenant, fleet.weights[tenant]) for tenant in tenants]
    await _until_all_wait(handles)
    used = _cpu_seconds(_processes(stack, hosts))
    opened = time.time()
    _open(hosts)
    await _until_none_runs(client)
    calls = _calls(stack)
    calls.subtract(before)
    processes = list(_processes(stack, hosts))
    results = [await handle.result() for handle in handles]
    sizes = [await _size(handle) for handle in handles]
    return Ran(
        fleet=fleet,
        opened=opened,
        held=[_held(t, r.timeline) for t, r in zip(tenants, results, strict=True)],
        events=[events for events, _ in sizes],
        bytes=[size for _, size in sizes],
        calls={name: count for name, count in calls.items() if count and name not in OWN_CALLS},
        processes=processes,
        open_cpu_seconds=_cpu_seconds(processes) - used,
    )


async def _start(client: Client, tenant: str, weight: float) -> Handle:
    config = TemplateConfig(
        template_id="web",
        build_id=str(uuid.uuid4()),
        source=FromImage(reference="registry/web:1"),
        memory_mb=512,
        vcpu_count=1,
        disk_size_mb=512,
        kernel_version="vmlinux-6.1",
        firecracker_version="v1.13.1",
        start_command="serve",
        ready_command="check",
        tenant=tenant,
    )
    return await client.start_workflow(
        BuildTemplate.run,
        BuildInput(config=config, fairness_weight=weight),
        id=build_workflow_id(config.build_id),
        task_queue=WORKFLOW_TASK_QUEUE,
    )


async def _until_all_wait(handles: Sequence[Handle]) -> None:
    for handle in handles:  # by their own state: lists are late
        while not (await handle.describe()).raw_description.pending_activities:  # noqa: ASYNC110 # the server has no event for it
            await asyncio.sleep(POLL_SECONDS)


def _open(hosts: Sequence[subprocess.Popen[str]]) -> None:
    for process in hosts:
        assert process.stdin is not None
        process.stdin.write("open\n")
        process.stdin.flush()


async def _until_none_runs(client: Client) -> None:
    while (await client.count_workflows(RUNNING_BUILDS)).count:  # noqa: ASYNC110 # nor for this
        await asyncio.sleep(POLL_SECONDS)


def _held(tenant: str, timeline: Sequence[StepRecord]) -> Held:
    ends = {record.step: record.ended for record in timeline}
    begin, end = ends[Step.LEASE], ends[Step.RELEASE]
    assert begin is not None
    assert end is not None
    return Held(tenant, begin.timestamp(), end.timestamp())


async def _size(handle: Handle) -> tuple[int, int]:
    """Return how many events the history of a build has, and how many bytes."""
    info = (await handle.describe()).raw_description.workflow_execution_info
    return info.history_length, info.history_size_bytes


def _calls(stack: Stack) -> Counter[str]:
    """Return how often Temporal's frontend was called, by operation."""
    url = f"http://127.0.0.1:{stack.environment.ports.temporal_metrics}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    calls: Counter[str] = Counter()
    for found in REQUEST.finditer(text):
        operation = OPERATION.search(found["labels"])
        if operation and 'service_name="frontend"' in found["labels"]:
            calls[operation["name"]] += int(float(found["count"]))
    return calls


def _processes(stack: Stack, hosts: Sequence[subprocess.Popen[str]]) -> Iterator[Process]:
    for name in ("temporal", "worker", "gcs", "gcs-emulator"):
        pid = stack.pid(name)
        assert pid is not None
        yield _process(name, pid)
    for number, process in enumerate(hosts):
        first = number * HOSTS_IN_A_PROCESS
        yield _process(f"hosts from {first}", process.pid)


def _cpu_seconds(processes: Iterable[Process]) -> float:
    return sum(process.cpu_seconds for process in processes)


def _process(name: str, pid: int) -> Process:
    status = Path(f"/proc/{pid}/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    times = psutil.Process(pid).cpu_times()
    return Process(name, int(peak[1]) / 1024, times.user + times.system)


# Telling


def tell(ran: Ran, console: Console) -> None:
    """Print what came out of it, beside what it should be."""
    fleet, count = ran.fleet, len(ran.held)
    console.print(_shares_table(ran))
    table = Table(title=f"{count} builds of {fleet.seconds:.0f} s on {fleet.slot_count} slots")
    for heading in ("", "measured", "limit"):
        table.add_column(heading, justify="right" if heading else "left")
    calls = sum(ran.calls.values())
    lost = sum(held.end - held.begin for held in ran.held) / count - fleet.seconds
    idle = (fleet.slot_count - ran.busy) * ran.makespan / count
    for row in (
        ("makespan ÷ ideal", f"{ran.makespan:.1f} s ÷ {fleet.ideal_seconds:.1f} s", ""),
        ("of the ideal", f"{ran.of_ideal:.3f}", f"{LEAST_OF_IDEAL}"),
        ("mean slots busy", f"{ran.busy:.1f} of {fleet.slot_count}", ""),
        ("lost between the steps of a build", f"{lost:.2f} s", ""),
        ("a slot waits for its next build", f"{idle:.2f} s", ""),
        (
            "events of a build",
            f"{mean(ran.events):.1f} (most: {max(ran.events)})",
            f"{MOST_EVENTS}",
        ),
        ("bytes of its history", f"{mean(ran.bytes):.0f} (most: {max(ran.bytes)})", ""),
        ("Temporal calls of a build", f"{calls / count:.1f}", ""),
        ("CPU of a build", f"{ran.cpu_seconds:.2f} s", ""),
        ("processors in use", f"{ran.processors:.1f} of {os.cpu_count()}", ""),
        ("slots that this machine carries", f"{ran.carried_slots:.0f}", f"{fleet.slot_count}"),
    ):
        table.add_row(*row)
    console.print(table)
    console.print(_most_called(ran))
    console.print(_process_table(ran))


def _shares_table(ran: Ran) -> Table:
    begin, end = all_wait(ran.held, ran.opened)
    table = Table(title=f"Shares of the slots while all tenants wait ({end - begin:.0f} s)")
    table.add_column("time")
    wanted = wanted_shares(ran.fleet.weights)
    for tenant, share in wanted.items():
        table.add_column(f"{tenant} ({share:.2f})", justify="right")
    length = (end - begin) / PERIODS
    for number in range(PERIODS):
        since, until = begin + number * length, begin + (number + 1) * length
        _add_shares(table, f"{since - begin:.0f}–{until - begin:.0f} s", ran, since, until)
    _add_shares(table, "all", ran, begin, end)
    return table


def _add_shares(table: Table, when: str, ran: Ran, begin: float, end: float) -> None:
    found = shares(ran.held, begin, end)
    table.add_row(when, *(f"{found[tenant]:.3f}" for tenant in ran.fleet.weights))


def wanted_shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Return each tenant's part of the slots by its weight."""
    return {tenant: weight / sum(weights.values()) for tenant, weight in weights.items()}


def _most_called(ran: Ran) -> str:
    most = Counter(ran.calls).most_common(8)
    return "calls: " + ", ".join(f"{name} {count / len(ran.held):.1f}" for name, count in most)


def _process_table(ran: Ran) -> Table:
    table = Table(title="Processes")
    for heading in ("process", "peak MiB", "CPU s"):
        table.add_column(heading, justify="left" if heading == "process" else "right")
    for process in ran.processes:
        table.add_row(process.name, f"{process.peak_mb:.0f}", f"{process.cpu_seconds:.1f}")
    return table
