"""The command line of the dev stack: `python temporal-dev/devstack --help`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys

from devstack.environment import StackEnvironment, environment, state_dir
from devstack.ports import StackPorts, port_variable
from devstack.processes import ServiceError
from devstack.services import ALL_PARTS
from devstack.stack import borrowed, restart, stack_status, start_apps, start_services, stop_all


def _print_status(stack: StackEnvironment) -> None:
    for status in stack_status(stack):
        ports = " ".join(f"{name}={port}" for name, port in status.ports.items())
        pid = str(status.pid or "-")
        print(f"{status.name:<14}{status.state:<10}{pid:<9}{ports:<55} {status.log}")


def _print_environment(stack: StackEnvironment) -> None:
    for name, value in sorted(stack.variables().items()):
        print(f"export {name}={shlex.quote(value)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Start and stop the services that stand in for production on this machine.",
        epilog=f"State: {state_dir()} (TEMPLATE_MANAGER_DEV_DIR). "
        f"Ports: {', '.join(port_variable(f.name) for f in dataclasses.fields(StackPorts))}.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start what does not run yet and wait until it is ready")
    up.add_argument("--no-apps", action="store_true", help="without api, worker, host and rest")
    _add_only(up)
    commands.add_parser("down", help="stop what `up` started; data stays")
    again = commands.add_parser("restart", help="stop and start single processes")
    again.add_argument("names", nargs="+", metavar="NAME")
    run = commands.add_parser("run", help="have services while a command runs, then stop them")
    _add_only(run)
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    commands.add_parser("status", help="show every process: state, pid, ports, log")
    commands.add_parser("env", help="print `export NAME=value` lines for a shell")
    return parser


def _add_only(parser: argparse.ArgumentParser) -> None:
    text = f"only these, separated by commas: {','.join(ALL_PARTS)}"
    parser.add_argument("--only", type=_part_names, default=ALL_PARTS, metavar="PARTS", help=text)


def _part_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(ALL_PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return names


def _run(arguments: argparse.Namespace) -> int:
    stack = environment()
    if arguments.command == "up":
        start_services(stack=stack, only=arguments.only)
        if not arguments.no_apps:
            start_apps(stack)
    elif arguments.command == "down":
        stop_all(stack)
    elif arguments.command == "restart":
        for name in arguments.names:
            restart(stack, name)
    elif arguments.command == "run":
        with borrowed(stack, arguments.only):
            command = [word for word in arguments.argv if word != "--"]
            return subprocess.run(command, check=False).returncode
    elif arguments.command == "status":
        _print_status(stack)
    else:
        _print_environment(stack)
    return 0


def main() -> int:
    """Run one command; an error is a message, not a traceback."""
    try:
        return _run(_parser().parse_args())
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
