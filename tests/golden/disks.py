"""One folder with an image of each sort, small: what the scripts of ``beside.same`` work on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from golden.beside import SECRET, theirs
from helpers_check import Scalpel
from helpers_cli import cowfence


def make(folder: Path) -> Path:
    """Disks of 1 MiB, but for ``luks``, whose passphrase is in ``key``. ``upper`` stands over ``top``, that over ``base``."""

    def do(line: str) -> None:
        done = theirs(line.split(), folder)
        assert done.returncode == 0, (line, done.stderr)

    def new(name: str, options: str = "", *, size: str = "1M") -> None:
        do(f"create -q -f qcow2 {options} {name} {size}")

    def written(name: str, *commands: str, options: Sequence[str] = ()) -> None:
        words = ["-t", "unsafe", *options, *(word for command in commands for word in ("-c", command)), name]
        done = theirs(words, folder, program="qemu-io")
        assert done.returncode == 0, (words, done.stderr)

    (folder / "raw").write_bytes(b"x" * 65536 + bytes((1 << 20) - 65536))
    (folder / "key").write_bytes(b"secret")
    (folder / "bad").write_bytes(b"QFI\xfb" + bytes(1000))
    new("a")
    do("bitmap --add a b")
    written("a", "write -P 1 128k 64k")
    do("bitmap --add -g 4k a fine")
    written("a", "write -P 1 512k 4k")
    do("bitmap --add --disable a off")
    new("v2", "-o compat=0.10")
    written("v2", "write -P 2 0 64k")
    new("base", "-o cluster_size=4k")
    written("base", "write -P 3 0 256k")
    new("top", "-o cluster_size=4k -b base -F qcow2")
    written("top", "write -P 4 64k 64k", "write -z 32k 8k")
    new("upper", "-b top -F qcow2")
    written("upper", "write -P 5 256k 64k")
    new("overraw", "-b raw -F raw")
    written("overraw", "write -P 6 32k 64k")
    new("long", "-b base -F qcow2", size="2M")
    written("long", "write -P 7 1536k 64k")
    new("short", "-b base -F qcow2", size="512k")
    written("short", "write -P 8 128k 64k")
    new("lost", "-u -b nowhere -F qcow2")
    new("snap")
    written("snap", "write -P 9 0 64k")
    do("snapshot -c one snap")
    written("snap", "write -P 10 0 128k")
    do("snapshot -c two snap")
    written("snap", "write -P 11 64k 64k")
    new("snaptop", "-b base -F qcow2")
    do("snapshot -c one snaptop")
    new("ext", "-o extended_l2=on")
    written("ext", "write -P 12 2k 6k", "write -z 128k 2k")
    new("data", "-o data_file=data.bin")
    written("data", "write -P 13 64k 64k")
    do("convert -c -O qcow2 base comp")
    for name, feature in (("dirty", 1), ("corrupt", 2)):
        new(name, "-b base -F qcow2")
        written(name, "write -P 15 64k 64k")
        image = Scalpel((folder / name).read_bytes())
        image.set_features(feature)
        (folder / name).write_bytes(image.data)
    # By ours: qemu-img measures for seconds how fast it derives a key.
    cipher = "encrypt.format=luks,encrypt.key-secret=k,encrypt.cipher-alg=aes-128,encrypt.iter-time=10"
    cowfence("create", "-q", "-f", "qcow2", "--object", SECRET, "-o", cipher, "luks", "64k", cwd=folder)
    opened = "driver=qcow2,file.filename=luks,encrypt.key-secret=k"
    written(opened, "write -P 14 0 4k", options=("--object", SECRET, "--image-opts"))
    return folder
