"""``cowfence bitmap``: persistent dirty bitmaps, with the options of ``qemu-img bitmap``; ``--extents`` lists one."""

from __future__ import annotations

import argparse
from typing import Any

from cowfence.cli.main import add_output_option, add_reference_options, print_json, references, size_bytes
from cowfence.cli.rehearsing import add_dry_run_option, rehearsal_of, tell
from cowfence.cli.secrets import add_secret_options
from cowfence.cli.sources import add_image_opts_option, local_file, parse_source, secrets_for
from cowfence.errors import Invalid

_VERBS = ("add", "remove", "clear", "enable", "disable")


class _Append(argparse.Action):
    """The changes in the order in which they were given."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        assert option_string is not None
        namespace.actions = [*namespace.actions, (option_string[2:], values or "")]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(actions=[], quiet=False)
    helps = {
        "add": "make it; it records from now on",
        "remove": "remove it",
        "clear": "nothing is dirty",
        "enable": "let it record",
        "disable": "let it stay as it is",
    }
    for verb in _VERBS:
        parser.add_argument(f"--{verb}", action=_Append, nargs=0, help=helps[verb])
    parser.add_argument("--merge", action=_Append, metavar="SOURCE", help="dirty wherever the bitmap SOURCE is, too")
    parser.add_argument("--extents", action="store_true", help="print what it has recorded")
    parser.add_argument("-b", dest="source_file", metavar="FILE", help="the image that has SOURCE (default: the same one)")
    parser.add_argument("-F", dest="source_format", metavar="FORMAT", help="format of that image")
    parser.add_argument(
        "-g",
        "--granularity",
        type=size_bytes,
        metavar="SIZE",
        help="bytes for each bit of a bitmap that is added (0: the default, 64k or the cluster size)",
    )
    parser.add_argument("-f", dest="format", metavar="FORMAT", help="format of the image (qcow2)")
    add_image_opts_option(parser)
    parser.add_argument("-U", "--force-share", action="store_true", help="with --extents: also while another process writes")
    add_dry_run_option(parser)
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image")
    parser.add_argument("name", help="of the bitmap")


def run(arguments: argparse.Namespace) -> int:
    from cowfence.ops.bitmap import Action, Verb, change_bitmap, dirty_extents

    actions = [Action(Verb(verb), source) for verb, source in arguments.actions]
    source = local_file(arguments.image, arguments)
    refs = references(arguments, source.name)
    secrets = secrets_for(source, arguments)
    if arguments.extents:
        if actions or arguments.granularity or arguments.source_file is not None or arguments.source_format is not None:
            raise Invalid("--extents changes nothing: it cannot be combined with changes")
        if arguments.dry_run:
            raise Invalid("--extents changes nothing: --dry-run means nothing with it")
        extents = dirty_extents(
            source.name, arguments.name, format=source.format or "qcow2", refs=refs, force_share=arguments.force_share
        )
        if arguments.output == "json":
            print_json([{"start": start, "length": length, "dirty": True} for start, length in extents])
        else:
            print(f"{'Offset':<16}Length")
            for start, length in extents:
                print(f"{start:<#16x}{length:#x}")
        return 0
    _check(arguments, {action.verb.value for action in actions})
    other = None if arguments.source_file is None else parse_source(arguments.source_file, image_opts=False)
    rehearsal = rehearsal_of(arguments)
    changed = change_bitmap(
        source.name,
        arguments.name,
        actions,
        format=source.format or "qcow2",
        granularity_bytes=arguments.granularity or None,
        source=None if other is None else other.name,
        source_format=arguments.source_format or (other and other.format) or "qcow2",
        refs=refs,
        secrets=secrets,
        rehearsal=rehearsal,
    )
    if rehearsal is not None:
        return tell(arguments, rehearsal, changed.to_dict())
    if arguments.output == "json":
        print_json(changed.to_dict())
    return 0


def _check(arguments: argparse.Namespace, verbs: set[str]) -> None:
    if not verbs:
        raise Invalid("Need at least one of --add, --remove, --clear, --enable, --disable, --merge, or --extents")
    if arguments.granularity and "add" not in verbs:
        raise Invalid("granularity only supported with --add")
    if arguments.source_file is not None and "merge" not in verbs:
        raise Invalid("Merge bitmap source file only supported with --merge")
    if arguments.source_format is not None and arguments.source_file is None:
        raise Invalid("-F only supported with -b")
    if arguments.force_share:
        raise Invalid("-U only supported with --extents")
