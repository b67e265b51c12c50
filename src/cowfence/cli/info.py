"""``cowfence info``: describe an image, in the words of ``qemu-img info``.

Opens exactly the image that is named; ``--backing-chain`` alone goes on. Without ``-f`` a file is looked at
(``cli.formats``), and what is no qcow2 image is "unknown": only the user can know that a file is raw.
"""

from __future__ import annotations

import argparse

from cowfence.cli.formats import STRICT_PROGRAM, looked_at
from cowfence.cli.main import add_output_option, add_reference_options, print_json, references
from cowfence.cli.secrets import add_secret_options, secrets_by_id
from cowfence.cli.snapshot_list import snapshot_lines
from cowfence.cli.sources import add_image_opts_option, is_local, local_file, open_source, parse_source
from cowfence.ops.info import ImageInfo, info, info_chain, info_disk
from cowfence.qcow2.describe import JsonValue
from cowfence.units import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", choices=("qcow2", "raw", "luks"), help="format of the image (default: look at it)")
    add_image_opts_option(parser)
    parser.add_argument("--backing-chain", action="store_true", help="describe the backing files too")
    parser.add_argument("-U", "--force-share", action="store_true", help="look at an image that another process writes to")
    add_output_option(parser)
    add_reference_options(parser)
    add_secret_options(parser)
    parser.add_argument("image")


def run(arguments: argparse.Namespace) -> int:
    # Of what is described no secret is needed; those that are given have to make sense.
    secrets_by_id(arguments)
    found = _found(arguments)
    if arguments.output == "json":
        images = [image.to_dict() for image in found]
        print_json(images if arguments.backing_chain else images[0])
    else:
        print("\n\n".join("\n".join(_human(image)) for image in found))
    return 0


def _found(arguments: argparse.Namespace) -> tuple[ImageInfo, ...]:
    """The image that is named and, if that is wanted, those below it; an image that is no local file has none."""
    if not is_local(parse_source(arguments.image, image_opts=arguments.image_opts)):
        disk = open_source(arguments.image, arguments, format_name=arguments.format)
        try:
            return (info_disk(disk, arguments.image),)
        finally:
            disk.close()
    source, share = local_file(arguments.image, arguments), arguments.force_share
    path = source.name
    # What is not known is shown as such under our own name.
    format_name = source.format or (None if arguments.program == STRICT_PROGRAM else looked_at(path, arguments))
    if not arguments.backing_chain:
        return (info(path, format=format_name, force_share=share),)
    return info_chain(
        path,
        format=format_name,
        refs=references(arguments, path),
        force_share=share,
        assume_backing_format=arguments.assume_backing_format,
    )


def _shown(name: str) -> str:
    """A name on one line that steers no terminal: names come out of images."""
    return name if name.isprintable() else ascii(name)


def _human(image: ImageInfo) -> list[str]:
    actual = "unavailable" if image.actual_bytes is None else format_size(image.actual_bytes)
    lines = [
        f"image: {_shown(image.filename)}",
        f"file format: {image.format}",
        f"virtual size: {format_size(image.virtual_bytes)} ({image.virtual_bytes} bytes)",
        f"disk size: {actual}",
    ]
    if image.encrypted:
        lines.append("encrypted: yes")
    if image.cluster_bytes is not None:
        lines.append(f"cluster_size: {image.cluster_bytes}")
    if image.dirty:
        lines.append("cleanly shut down: no")
    if image.backing_filename is not None:
        line = f"backing file: {_shown(image.backing_filename)}"
        if image.full_backing_filename is not None and image.full_backing_filename != image.backing_filename:
            line += f" (actual path: {_shown(image.full_backing_filename)})"
        lines.append(line)
        if image.backing_format is not None:
            lines.append(f"backing file format: {_shown(image.backing_format)}")
    if image.snapshots:
        lines.extend(snapshot_lines(image.snapshots))
    return lines + specific_lines(image)


def specific_lines(image: ImageInfo) -> list[str]:
    """What only this format has."""
    if image.specific is None:
        return []
    return ["Format specific information:", *_tree(image.specific.to_dict()["data"], 1)]


def _tree(value: JsonValue, level: int) -> list[str]:
    """The format's own facts, indented: what ``qemu-img info`` makes of its JSON."""
    indent = "    " * level
    pairs: list[tuple[str, JsonValue]] = []
    if isinstance(value, dict):
        pairs = [(key.replace("-", " "), item) for key, item in value.items()]
    elif isinstance(value, list):
        pairs = [(f"[{index}]", item) for index, item in enumerate(value)]
    lines: list[str] = []
    for key, item in pairs:
        if isinstance(item, dict | list):
            lines.append(f"{indent}{key}:")
            lines.extend(_tree(item, level + 1))
        else:
            lines.append(f"{indent}{key}: {str(item).lower() if isinstance(item, bool) else _shown(str(item))}")
    return lines
