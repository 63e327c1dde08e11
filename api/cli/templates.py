"""The commands about finished templates: pull and run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from api.cli import completion
from api.cli.console import (
    BUILDS,
    EXAMPLE_BUILD,
    AsJson,
    Exit,
    build_id_argument,
    err,
    fail,
    given_path,
    out,
    print_json,
    read_settings,
    template_errors,
    transfer_bars,
)

app = typer.Typer()


@app.command(
    rich_help_panel=BUILDS,
    epilog=f"Example: template-manager pull {EXAMPLE_BUILD} ./template",
)
def pull(
    build_id: Annotated[str, build_id_argument("completed")],
    directory: Annotated[
        Path, typer.Argument(parser=given_path, metavar="DIR", help="Where to write it.")
    ],
    bucket: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            envvar="TEMPLATE_MANAGER_BUCKET",
            help="By default the settings' one.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Download rootfs.ext4, memfile and snapfile, byte for byte, straight from the bucket.

    Interrupted, it goes on where it was when it is called again.
    """
    with template_errors(as_json), _kept_in(directory) as came, transfer_bars() as show:
        from activities.store.bucket import Bucket
        from activities.store.download import pull_template
        from activities.store.names import find_build

        def tell(name: str, done: int, total: int) -> None:
            came(done)
            show(name, done, total)

        store = Bucket(bucket or read_settings().bucket)
        build_id = find_build(store, build_id)
        metadata = pull_template(store, build_id, directory, tell)
    sizes = {name: artifact.size_bytes for name, artifact in metadata.artifacts.items()}
    if as_json:
        print_json({"build_id": build_id, "directory": str(directory), "size_bytes": sizes})
    else:
        out.print(f"template {metadata.template_id} is in {directory}", soft_wrap=True)
        err.print(f"→ template-manager run {shlex.quote(str(directory))}", soft_wrap=True)


@contextmanager
def _kept_in(directory: Path) -> Iterator[Callable[[int], None]]:
    """Say what an interrupted pull leaves. Yields what is to be told how many bytes have come."""
    from activities.contract.errors import StorageUnavailableError

    has_come = False

    def came(done: int) -> None:
        nonlocal has_come
        has_come = has_come or done > 0

    try:
        yield came
    except (KeyboardInterrupt, StorageUnavailableError):
        if has_come:
            told = f"what has come is kept in {directory}: the same command goes on with it"
            err.print(f"→ {told}", soft_wrap=True)
        raise


@app.command(
    rich_help_panel=BUILDS,
    epilog="Example: template-manager run ./template; or template-manager run web:stable",
)
def run(
    template: Annotated[
        Path | None,
        typer.Argument(
            parser=given_path,
            metavar="DIR|BUILD_ID",
            help="Where `pull` has put it; where there is no such directory, the build's UUID or "
            "NAME:TAG, which is pulled for as long as it runs.",
            autocompletion=completion.builds("completed"),
        ),
    ] = None,
    *,
    disk: Annotated[
        str,
        typer.Option(
            metavar="BUILD_ID|PATH",
            help="Instead of a template, a shell on the disk of a build's failed step "
            "(build --keep-failed) on this host, or on that of a file: on a copy, in a VM.",
        ),
    ] = "",
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Whether all of its files is read first: they must be what was built.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Resume a template on this machine and say where it answers. Ctrl-C ends it."""
    if (template is None) == (not disk):
        fail(
            "give either DIR, BUILD_ID or --disk",
            "See template-manager run --help.",
            Exit.USAGE,
            as_json=as_json,
        )
    if template is None:
        with template_errors(as_json):
            _look_at_disk(disk)
        return
    with template_errors(as_json), _directory_of(template) as directory:
        from activities.host.local_run import LocalRun, local_template

        def show(running: LocalRun) -> None:
            if as_json:
                print_json(vars(running))
                sys.stdout.flush()
                return
            took = f"resumed in {running.resume_ms:.0f} ms"
            out.print(f"{took}; the guest is {running.address} in a network namespace:")
            out.print(f"  ip netns exec {running.network} ping {running.address}")
            out.print("Ctrl-C ends it")

        found = local_template(directory, read_settings())
        if check and directory == template:  # what was pulled just now is what was built
            with transfer_bars() as tell:
                found.check(tell)
        found.run(show)


@contextmanager
def _directory_of(template: Path) -> Iterator[Path]:
    """Have a template's directory: the one that was named, or one for as long as it runs."""
    from activities.contract.errors import TemplateNotFoundError
    from activities.contract.references import stands_for_a_build

    if template.exists() or not stands_for_a_build(str(template)):
        yield template
        return
    from activities.host.local_run import fetched_template

    with ExitStack() as kept:
        try:
            with transfer_bars() as tell:
                place = kept.enter_context(fetched_template(str(template), read_settings(), tell))
        except TemplateNotFoundError as error:
            told = f"there is no directory {template}, and {error.message}"
            raise TemplateNotFoundError(told, hint=error.hint) from None
        yield place


def _look_at_disk(disk: str) -> None:
    from activities.host.disk_look import disk_to_look_at

    def tell(what: str) -> None:
        err.print(f"{what}; exit ends it", soft_wrap=True)

    disk_to_look_at(disk, read_settings()).look(tell)
