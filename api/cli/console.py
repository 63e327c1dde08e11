"""What all commands of `template-manager` share: consoles, exit codes, how errors are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text
from typer.models import ArgumentInfo

from activities.contract.text import printable_lines
from api.cli import completion

if TYPE_CHECKING:
    from activities.contract.errors import TemplateManagerError
    from activities.process.settings import Settings
    from api.client.client import CallError

T = TypeVar("T")

UNWRAPPED = 10_000
"""The width where nobody looks at columns: in a pipe or a file every line stays whole."""
WIDE = 100
"""Below it numbers have no bar beside them, and stand on lines of their own."""
MAX_PORT = 65_535


class TextConsole(Console):
    """A console on which texts are only texts: no markup, and nothing that steers a terminal.

    All that is printed comes through `render`: also tables, and what lives.
    """

    def __init__(
        self,
        *,
        file: IO[str] | None = None,
        stderr: bool = False,
        width: int | None = None,
        force_terminal: bool | None = None,
    ) -> None:
        super().__init__(
            file=file,
            stderr=stderr,
            width=width,
            force_terminal=force_terminal,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Render as Rich does. What is no character to be shown, nor a line end, is U+FFFD."""
        for segment in super().render(renderable, options):
            yield (
                segment
                if segment.control
                else Segment(printable_lines(segment.text), segment.style)
            )

    def status(self, status: RenderableType, **options: Any) -> Status:  # as the base takes them
        """Show a line beside a spinner while a block runs: a text has no markup here, either."""
        return super().status(Text(status) if isinstance(status, str) else status, **options)


def _console(*, stderr: bool) -> TextConsole:
    console = TextConsole(stderr=stderr)
    return console if console.is_terminal else TextConsole(stderr=stderr, width=UNWRAPPED)


out = _console(stderr=False)
err = _console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def build_id_argument(*states: str) -> ArgumentInfo:
    """Return the argument that names a build; the shell offers those in these states."""
    argument: ArgumentInfo = typer.Argument(
        metavar="BUILD_ID",
        help="The build's UUID, or NAME:TAG.",
        autocompletion=completion.builds(*states),
    )
    return argument


BuildIdArgument = Annotated[str, build_id_argument()]
BUILDS = "Builds and templates"
"""The panel of two modules' commands; every other module of commands is a panel of its own."""
EXAMPLE_BUILD = "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d"


def require_address(address: str) -> str:
    """Return an address of a gRPC server. Raises BadParameter for what cannot be one."""
    if address.startswith(("unix:", "dns:")):
        return address
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isascii() and port.isdigit() and 0 < int(port) <= MAX_PORT:
        return address
    raise typer.BadParameter(f"{address!r}: must be HOST:PORT, such as 127.0.0.1:5008")


def given_path(text: str) -> Path:
    """Return a path as it was given. Raises BadParameter for an empty one.

    That is a script's unset variable, and would mean the current directory.
    """
    if not text:
        raise typer.BadParameter("must not be empty")
    return Path(text)


class Exit(IntEnum):
    """The exit codes, the same for every command."""

    OK = 0
    BUILD_FAILED = 1
    USAGE = 2
    UNAVAILABLE = 3
    INTERRUPTED = 130
    UNREAD = 141
    """As of a program that SIGPIPE ends: nobody reads its output any more."""


def run_to_end(work: Coroutine[None, None, T]) -> T:
    """Run `work`; Ctrl-C cancels it, and becomes KeyboardInterrupt when it has let go.

    So does what ends a job or closes a terminal (SIGTERM, SIGHUP), which becomes SystemExit. The
    loop's own handler is what makes that sure: the one of `asyncio.run` does not wake the loop,
    so that a signal just before it falls asleep is obeyed at the next event, or never.
    """
    heard: list[signal.Signals] = []

    async def interruptible() -> T:
        task = asyncio.current_task()
        assert task is not None

        def stop(number: signal.Signals) -> None:
            heard.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is signal.SIGINT or signal.getsignal(number) is signal.SIG_DFL:  # nohup
                asyncio.get_running_loop().add_signal_handler(number, stop, number)
        return await work

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        if heard and heard[0] is not signal.SIGINT:
            raise SystemExit(128 + heard[0]) from None
        raise KeyboardInterrupt from None


def run_call(command: Callable[[], Coroutine[None, None, None]], as_json: bool) -> None:
    """Run a command; tell its errors in words and in an exit code."""
    from api.client.client import CallError
    from api.client.credentials import CredentialsError

    try:
        run_to_end(command())
    except CredentialsError as error:
        hint = "Check TEMPLATE_MANAGER_TOKEN_FILE and the TEMPLATE_MANAGER_TLS_… variables."
        fail(str(error), hint, Exit.USAGE, as_json=as_json)
    except CallError as error:
        _show_call_error(error, as_json)
        raise typer.Exit(exit_code_of(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None


def exit_code_of(error: CallError) -> Exit:
    """Return the exit code for a call that failed: whose turn it is."""
    import grpc

    usage = (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    )
    return Exit.USAGE if error.code in usage else Exit.UNAVAILABLE


def _show_call_error(error: CallError, as_json: bool) -> None:
    from api.cli.json_output import error_json
    from api.cli.report import error_text

    if as_json:
        print_json(error_json(error))
    else:
        err.print(error_text(error))


@contextlib.contextmanager
def template_errors(as_json: bool) -> Iterator[None]:
    """Tell the errors of commands that work without the API."""
    from activities.contract.errors import TemplateManagerError

    try:
        yield
    except TemplateManagerError as error:
        fail(error.message, error.hint, _code_of(error), as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None
    except Exception as error:
        if not (told := _told_by_temporal(error)):
            raise
        hint = "Check TEMPORAL_ADDRESS and TEMPORAL_NAMESPACE."
        fail(f"Temporal says: {told}", hint, Exit.UNAVAILABLE, as_json=as_json)


def _told_by_temporal(error: Exception) -> str:
    """Return what Temporal says of a call that it refused; '' for any other error.

    Its client is not loaded for this: most commands do without.
    """
    service = sys.modules.get("temporalio.service")
    refused = service is not None and isinstance(error, service.RPCError)
    return str(error) if refused else ""


def _code_of(error: TemplateManagerError) -> Exit:
    from activities.contract import errors

    usage = (
        errors.AddressTakenError,
        errors.FirecrackerMissingError,
        errors.KernelMissingError,
        errors.MachineUnfitError,
        errors.TargetUnusableError,
        errors.TemplateNotFoundError,
        errors.UnsafeToolsError,
    )
    if isinstance(error, usage):
        return Exit.USAGE
    unavailable = error.retryable or isinstance(
        error, errors.HostDiskFullError | errors.StorageDeniedError
    )
    return Exit.UNAVAILABLE if unavailable else Exit.BUILD_FAILED


def fail(message: str, hint: str, code: Exit, *, as_json: bool) -> NoReturn:
    """Tell an error and what to do next, and end with that exit code."""
    if as_json:
        print_json({"error": {"message": message, "hint": hint}})
    else:
        parts: list[RenderableType] = [Text(f"error: {message}", style="bold red")]
        parts += [Text(f"→ {hint}")] if hint else []
        err.print(*parts, sep="\n")
    raise typer.Exit(code)


@contextlib.contextmanager
def transfer_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show transfers, each from when it is told of: bytes, of how many, how fast, time left.

    Where there is room each has a bar. Yields what is to be told a transfer's name, the bytes that
    are done and their total.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = [BarColumn()] if err.width >= WIDE else []
    numbers = (DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
    title = TextColumn("{task.description}", markup=False)
    progress = Progress(title, *bar, *numbers, console=err)
    bars: dict[str, TaskID] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in bars:
            progress.start()  # not before: without a bar it would leave an empty line
            bars[name] = progress.add_task(name, total=total)
        progress.update(bars[name], completed=done)

    try:
        yield show
    finally:
        if bars:
            progress.stop()


def print_table(console: Console, table: RenderableType) -> None:
    """Print a table without the blanks that fill its last column."""
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    console.file.write("".join(f"{line.rstrip()}\n" for line in lines))


def print_json(data: Mapping[str, object]) -> None:  # a TypedDict is nothing narrower
    """Print for programs. Raises TypeError for what JSON cannot say."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def read_settings() -> Settings:
    """Return the settings; a wrong one ends the command with its name."""
    from pydantic import ValidationError

    from activities.process.settings import get_settings

    try:
        return get_settings()
    except ValidationError as error:
        wrong = "; ".join(
            f"TEMPLATE_MANAGER_{'__'.join(map(str, each['loc'])).upper()}: {each['msg']}"
            for each in error.errors()
        )
        fail(wrong, "Correct these environment variables.", Exit.USAGE, as_json=False)
