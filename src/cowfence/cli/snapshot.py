"""``cowfence snapshot``: list, create, apply or delete internal snapshots, with the options of ``qemu-img snapshot``.

A failure names the snapshot in qemu-img's words. One difference: ``-d`` takes an id, too, where no snapshot has that name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from cowfence.cli.formats import looked_at
from cowfence.cli.main import add_output_option, print_json
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.snapshot_list import snapshot_lines
from cowfence.cli.sources import Source, add_image_opts_option, local_file, secrets_for
from cowfence.disk.opener import printable
from cowfence.errors import CowfenceError, Invalid, Unsupported
from cowfence.ops.snapshot import apply_snapshot, create_snapshot, delete_snapshot, list_snapshots
from cowfence.qcow2.describe import snapshot_dict

if TYPE_CHECKING:
    from cowfence.ops.snapshot import Snapshot
    from cowfence.qcow2.image import Qcow2Disk

_VERBS: Final[dict[str, Callable[[Qcow2Disk, str], Snapshot]]] = {
    "create": create_snapshot,
    "apply": apply_snapshot,
    "delete": delete_snapshot,
}


class _Action(argparse.Action):
    """One of the four, and only once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option: str | None = None,  # noqa: ARG002
    ) -> None:
        if namespace.action is not None:
            parser.error("Cannot mix '-l', '-a', '-c', '-d'")
        namespace.action, namespace.snapshot = self.const, values


def configure(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=None, snapshot=None)
    parser.add_argument("-l", nargs=0, action=_Action, const="list", help="list the snapshots (the default)")
    parser.add_argument("-c", metavar="NAME", action=_Action, const="create", help="create a snapshot of this name")
    parser.add_argument(
        "-a", metavar="SNAPSHOT", action=_Action, const="apply", help="make the disk what it was then (by id, or else by name)"
    )
    parser.add_argument(
        "-d", metavar="SNAPSHOT", action=_Action, const="delete", help="delete a snapshot (by name, or else by id)"
    )
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw"), help="format of the image (default: look at it)")
    add_image_opts_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors, and the list that was asked for")
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="list the snapshots of an image that another process writes to"
    )
    add_dry_run_option(parser)
    add_output_option(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    image = local_file(arguments.image, arguments)
    secrets = secrets_for(image, arguments)
    if arguments.action in (None, "list"):
        return _list(arguments, image)
    if arguments.force_share:
        raise Invalid(f"{printable(image.name)}: -U is for -l: an image that another process writes to cannot be changed")
    rehearsal = rehearsal_of(arguments)
    try:
        if (image.format or looked_at(image.name, arguments)) != "qcow2":
            raise Unsupported(printable(image.name), "internal snapshots of a raw image")
        from cowfence.chain import open_chain

        # No snapshot holds anything of a backing file, so none is opened.
        with open_chain(image.name, writable=True, backing=False, secrets=secrets, rehearsal=rehearsal) as disk:
            snapshot = _VERBS[arguments.action](disk, arguments.snapshot)
    except CowfenceError as error:
        error.args = (f"Could not {arguments.action} snapshot {arguments.snapshot!r}: {error}",)
        raise
    found = {"filename": image.name, "action": arguments.action, "snapshot": snapshot_dict(snapshot)}
    if rehearsal is not None:
        return tell(arguments, rehearsal, found)
    if arguments.output == "json":
        print_json(found)
    return 0


def _list(arguments: argparse.Namespace, image: Source) -> int:
    if arguments.dry_run:
        raise Invalid("-l changes nothing: --dry-run means nothing with it")
    is_qcow2 = (image.format or looked_at(image.name, arguments)) == "qcow2"
    snapshots = list_snapshots(image.name, force_share=arguments.force_share) if is_qcow2 else ()
    if arguments.output == "json":
        print_json([snapshot_dict(snapshot) for snapshot in snapshots])
    elif snapshots:
        print("\n".join(snapshot_lines(snapshots)))
    return 0
