"""`template-manager`: the command line, put together of its panels.

Commands load what they start only when they start it, so that `--help` is quick.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import os
import sys
from typing import Annotated

import typer
from rich.text import Text

from api.cli import builds, development, naming, operators, processes, templates, tenants
from api.cli.console import Exit, err
from api.cli.streams import OutputError, give_up_output, prepare_streams
from api.cli.usage_errors import AllCommands

EXIT_CODES = (
    "Exit codes: 0 success; 1 the build failed or was cancelled, or the template is damaged; "
    "2 wrong usage or a request that cannot be granted; 3 the API, what it needs, or room for "
    "what is told, is unavailable: try again; 141 nobody reads the output any more."
)

app = typer.Typer(
    name="template-manager",
    cls=AllCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for panel in (builds, templates, naming, processes, operators, tenants, development):
    app.add_typer(panel.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"template-manager {importlib.metadata.version('template-manager')}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def template_manager(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
        ),
    ] = False,
) -> None:
    """Build Firecracker VM templates from container images."""


def main() -> None:
    """Run the command line. gRPC's own chatter about connections is left out."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    prepare_streams()
    try:
        _run()
    except OutputError as error:
        give_up_output()
        if error.is_unread:
            raise SystemExit(Exit.UNREAD) from None
        err.print(Text(f"error: {error}"))
        raise SystemExit(Exit.UNAVAILABLE) from None
    except UnicodeEncodeError as error:
        err.print(Text(f"error: an argument is no text in this locale: {error.object!a}"))
        err.print(Text("→ Set LC_ALL=C.UTF-8."))
        raise SystemExit(Exit.USAGE) from None
    finally:
        _leave_at_once()


def _run() -> None:
    try:
        app(prog_name="template-manager")
    finally:
        sys.stdout.flush()  # what cannot be written is told while somebody can tell it


def _leave_at_once() -> None:
    """End the process with the code it is about to end with, if Temporal's SDK is in it.

    The SDK's own threads call into Python. One that does so while the interpreter is being taken
    down makes the process end by SIGABRT or SIGSEGV, whatever the command's result was.
    """
    ending = sys.exc_info()[1]
    if "temporalio" not in sys.modules or not isinstance(ending, SystemExit):
        return
    # Sends the last traces. There is no public way: Python itself first waits for all threads.
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # what they have written; the command's own is out already
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending.code if isinstance(ending.code, int) else 0)


if __name__ == "__main__":
    main()
