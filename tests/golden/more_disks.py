"""Images of rarer sorts, beside those of ``disks``."""

from __future__ import annotations

import shutil
from pathlib import Path

from cowfence.codec.luks import NewLuks, create
from golden.beside import SECRET, theirs

OPENED = f"--object {SECRET} --image-opts"
LUKS = "driver=luks,key-secret=k,file.filename=a.luks"
QCOW2_LUKS = "driver=qcow2,encrypt.key-secret=k,file.filename=luks"


def make(disks: Path, folder: Path) -> Path:
    """A copy of ``disks`` with raw files that are sparse, of half sectors and of nothing, with a LUKS file, and so on."""
    shutil.copytree(disks, folder)

    def do(line: str) -> None:
        done = theirs(line.split(), folder)
        assert done.returncode == 0, (line, done.stderr)

    (folder / "zero").touch()
    (folder / "dir").mkdir()
    (folder / "other").write_bytes(b"another secret")
    (folder / "odd.raw").write_bytes(b"r" * 65536 + bytes(100_000))
    with (folder / "sparse.raw").open("wb") as file:
        file.write(b"s" * 65536)
        file.seek(1 << 20)
        file.write(b"S" * 65536)
        file.truncate(3 << 20)
    do("create -q -f vmdk a.vmdk 64k")
    do("create -q -f qcow2 -o compression_type=zstd zstd 1M")
    do("create -q -f qcow2 -o cluster_size=512,refcount_bits=64,lazy_refcounts=on tiny 100k")
    do("create -q -f qcow2 -o data_file=raw.bin,data_file_raw=on rawdata 1M")
    do("create -q -f qcow2 -o preallocation=metadata full 1M")
    do("create -q -f qcow2 -o extended_l2=on,cluster_size=16k -b base -F qcow2 extover 2M")
    # QEMU takes seconds to find out how fast it is.
    area, _ = create(NewLuks(iter_time_ms=1), (folder / "key").read_bytes())
    (folder / "a.luks").write_bytes(area + bytes(65536))
    words = ["--object", SECRET, "--image-opts", LUKS, "-c", "write -P 15 0 4k"]
    assert theirs(words, folder, program="qemu-io").returncode == 0
    return folder
