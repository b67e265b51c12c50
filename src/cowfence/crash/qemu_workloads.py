"""Ready workloads for QEMU's engine: each operation that moves a pointer, from a fresh and from an aged image, and
random walks.

Small clusters make small states, so that a power cut is exhausted; 64 KiB clusters are what people use.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from cowfence.crash.foreign import Workload
from cowfence.errors import Invalid

_SMALL: Final = "qemu-img create -f qcow2 -o cluster_size=512 IMG 64k"
_MEDIUM: Final = "qemu-img create -f qcow2 -o cluster_size=4k IMG 256k"
_LARGE: Final = "qemu-img create -f qcow2 IMG 1M"
_LAZY: Final = "qemu-img create -f qcow2 -o cluster_size=512,lazy_refcounts=on IMG 64k"
_OVER: Final = (
    "qemu-img create -f qcow2 -o cluster_size=512 BASE 64k",
    "qemu-io -f qcow2 -c 'write -P 0xb5 0 16k' -c 'write -P 0xb6 32k 4k' BASE",
    "qemu-img create -f qcow2 -o cluster_size=512 -b BASE -F qcow2 IMG 64k",
)

_ALL: Final = (
    Workload(
        "allocate", "plain writes into a fresh image, then a flush", (_SMALL,), ("write 0 2k", "flush", "write 8k 512", "flush")
    ),
    Workload("allocate-4k", "the same, 4 KiB clusters", (_MEDIUM,), ("write 0 8k", "flush", "write 64k 4k", "flush")),
    Workload("allocate-64k", "the same, 64 KiB clusters", (_LARGE,), ("write 0 64k", "flush", "write 512k 64k", "flush")),
    Workload("overwrite", "in place", (_SMALL, "write 0 4k"), ("write 0 1k", "flush", "write 512 2k", "flush")),
    Workload(
        "part", "parts of clusters", (_MEDIUM, "write 0 8k"), ("write 1k 512", "write 20k 1k", "flush", "write 22k 3k", "flush")
    ),
    Workload(
        "compressed",
        "writes over a compressed cluster, then elsewhere",
        (_LARGE, "write -c 0 64k"),
        ("write 0 64k", "write 512k 64k", "flush"),
    ),
    Workload(
        "compressed-4k",
        "the same, 4 KiB clusters",
        (_MEDIUM, "write -c 0 4k"),
        ("write 0 4k", "write 64k 4k", "flush"),
    ),
    Workload(
        "compressed-part",
        "a part of a compressed cluster is written, then another cluster",
        (_MEDIUM, "write -c 0 4k"),
        ("write 512 512", "write 64k 4k", "flush"),
    ),
    Workload(
        "compressed-zero",
        "zeroes with unmap over a compressed cluster",
        (_LARGE, "write -c 0 64k"),
        ("write -z -u 0 64k", "flush"),
    ),
    Workload(
        "compressed-discard",
        "discard of a compressed cluster",
        (_LARGE, "write -c 0 64k"),
        ("discard 0 64k", "flush"),
    ),
    Workload(
        "compressed-shared-cluster",
        "two compressed clusters in one host cluster, of which one is given up",
        (_MEDIUM, "write -c 0 4k", "write -c 4k 4k"),
        ("write -z -u 0 4k", "write 64k 4k", "flush", "discard 4k 4k", "write 80k 4k", "flush"),
    ),
    Workload("discard", "discard, then write elsewhere", (_SMALL, "write 0 2k"), ("discard 0 512", "write 16k 512", "flush")),
    Workload("discard-64k", "the same, 64 KiB clusters", (_LARGE, "write 0 64k"), ("discard 0 64k", "write 512k 64k", "flush")),
    Workload(
        "zero-unmap",
        "zeroes with unmap, then write elsewhere",
        (_SMALL, "write 0 2k"),
        ("write -z -u 0 512", "write 16k 512", "flush"),
    ),
    Workload(
        "zero-unmap-64k",
        "the same, 64 KiB clusters",
        (_LARGE, "write 0 64k"),
        ("write -z -u 0 64k", "write 512k 64k", "flush"),
    ),
    Workload(
        "zero-keep",
        "zeroes without unmap, then a write",
        (_SMALL, "write 0 2k"),
        ("write -z 0 1k", "flush", "write 0 512", "flush"),
    ),
    Workload(
        "shared",
        "writes over clusters of a snapshot",
        (_SMALL, "write 0 2k", "qemu-img snapshot -c s IMG"),
        ("write 0 512", "write 16k 512", "flush", "write 0 1k", "flush"),
    ),
    Workload(
        "shared-discard",
        "discards clusters of a snapshot, then writes",
        (_SMALL, "write 0 2k", "qemu-img snapshot -c s IMG"),
        ("discard 0 1k", "write 16k 512", "flush", "write 0 512", "flush"),
    ),
    Workload(
        "small-cache",
        "L2 tables leave a cache of one table",
        (_SMALL, "write 0 512"),
        ("write 0 512", "write 32k 512", "write 512 512", "write 40k 512", "flush"),
        options=("l2-cache-size=512", "l2-cache-entry-size=512"),
    ),
    Workload(
        "small-cache-compressed",
        "compressed clusters and a cache of one table",
        (_SMALL, "write -c 0 512", "write -c 32k 512"),
        ("write 0 512", "write 32k 512", "write 512 512", "write 40k 512", "flush"),
        options=("l2-cache-size=512", "l2-cache-entry-size=512"),
    ),
    Workload("lazy", "lazy refcounts", (_LAZY,), ("write 0 1k", "flush", "write 8k 512", "flush")),
    Workload(
        "lazy-discard", "lazy refcounts, discard and write", (_LAZY, "write 0 2k"), ("discard 0 512", "write 16k 512", "flush")
    ),
    Workload(
        "lazy-compressed",
        "lazy refcounts, writes over a compressed cluster",
        (_LAZY, "write -c 0 512"),
        ("write 0 512", "write 16k 512", "flush"),
    ),
    Workload(
        "refcount-growth",
        "a write that needs a new refcount block",
        ("qemu-img create -f qcow2 -o cluster_size=512,refcount_bits=64 IMG 64k", "write 0 24k"),
        ("write 24k 4k", "flush", "write 40k 8k", "flush"),
    ),
    Workload(
        "preallocated",
        "preallocated metadata",
        ("qemu-img create -f qcow2 -o cluster_size=512,preallocation=metadata IMG 32k",),
        ("write 0 1k", "flush", "write -z -u 0 512", "write 8k 512", "flush"),
    ),
    Workload(
        "version-2",
        "an image of version 2",
        ("qemu-img create -f qcow2 -o cluster_size=512,compat=0.10 IMG 64k", "write 0 2k", "write -c 4k 512"),
        ("write 8k 512", "discard 0 512", "write 12k 512", "write 4k 512", "write 16k 512", "flush"),
    ),
    Workload(
        "grow-l1",
        "qemu-img resize that moves the L1 table",
        (_SMALL, "write 0 2k"),
        ("qemu-img resize -f qcow2 IMG 8M",),
        "fuse",
    ),
    Workload(
        "backed",
        "an overlay: writes, parts, zeroes",
        _OVER,
        ("write 0 512", "flush", "write -z 1k 512", "discard 2k 512", "write 16k 1k", "flush"),
    ),
    Workload(
        "lazy-backed",
        "lazy refcounts over a backing file",
        (*_OVER[:2], "qemu-img create -f qcow2 -o cluster_size=512,lazy_refcounts=on -b BASE -F qcow2 IMG 64k"),
        ("write 0 512", "flush", "write 1k 512", "flush"),
    ),
    Workload(
        "lazy-kill",
        "lazy refcounts: killed, opened again, written, flushed",
        (_LAZY,),
        ("write 0 1k", "flush", "kill", "write 8k 512", "flush"),
        "fuse",
    ),
    Workload(
        "kill-reopen",
        "killed, opened again, written, flushed",
        (_SMALL, "write 0 1k"),
        ("write 512 1k", "kill", "write 8k 512", "flush", "write 512 512"),
        "fuse",
    ),
    Workload(
        "aio",
        "writes in flight together",
        (_SMALL, "write 0 2k"),
        ("aio_write 0 512", "aio_write 8k 512", "aio_write 16k 512", "aio_flush", "flush"),
    ),
    Workload("snapshot-create", "qemu-img snapshot -c", (_SMALL, "write 0 2k"), ("qemu-img snapshot -c s IMG",), "fuse"),
    Workload(
        "snapshot-second",
        "a second snapshot",
        (_SMALL, "write 0 2k", "qemu-img snapshot -c s IMG", "write 0 512"),
        ("qemu-img snapshot -c t IMG",),
        "fuse",
    ),
    Workload(
        "snapshot-apply",
        "qemu-img snapshot -a",
        (_SMALL, "write 0 2k", "qemu-img snapshot -c s IMG", "write 512 1k"),
        ("qemu-img snapshot -a s IMG",),
        "fuse",
    ),
    Workload(
        "snapshot-delete",
        "qemu-img snapshot -d of the first of two",
        (_SMALL, "write 0 2k", "qemu-img snapshot -c s IMG", "write 0 512", "qemu-img snapshot -c t IMG", "write 512 512"),
        ("qemu-img snapshot -d s IMG",),
        "fuse",
    ),
    Workload(
        "snapshot-apply-wide",
        "qemu-img snapshot -a with an L1 table of two sectors",
        (
            "qemu-img create -f qcow2 -o cluster_size=512 IMG 4M",
            "write 0 512",
            "write 3M 512",
            "qemu-img snapshot -c s IMG",
            "write 0 512",
            "write 3M 512",
        ),
        ("qemu-img snapshot -a s IMG",),
        "fuse",
    ),
    Workload(
        "check-dirty",
        "qemu-img check -r all of an image that lazy refcounts left dirty",
        (_LAZY, "write 0 1k", "write 8k 512", "flush", "kill"),
        ("qemu-img check -f qcow2 -r all IMG",),
        "fuse",
    ),
    Workload(
        "check-leaks",
        "qemu-img check -r leaks of an image that a killed program left",
        (_SMALL, "write 0 1k", "qemu-img snapshot -c s IMG", "write 0 512", "write 20k 512", "kill"),
        ("qemu-img check -f qcow2 -r leaks IMG",),
        "fuse",
    ),
    Workload("grow", "qemu-img resize, larger", (_SMALL, "write 0 2k"), ("qemu-img resize -f qcow2 IMG 256k",), "fuse"),
    Workload(
        "shrink",
        "qemu-img resize, smaller",
        (_SMALL, "write 0 2k", "write 48k 4k"),
        ("qemu-img resize -f qcow2 --shrink IMG 32k",),
        "fuse",
    ),
    Workload(
        "rebase", "qemu-img rebase to no backing file", (*_OVER, "write 0 512"), ("qemu-img rebase -f qcow2 -b '' IMG",), "fuse"
    ),
    Workload("commit", "qemu-img commit", (*_OVER, "write 0 1k", "write 20k 512"), ("qemu-img commit -f qcow2 IMG",), "fuse"),
    Workload(
        "commit-drop",
        "qemu-img commit without emptying the overlay",
        (*_OVER, "write 0 1k"),
        ("qemu-img commit -d -f qcow2 IMG",),
        "fuse",
    ),
    Workload(
        "bitmap-add", "qemu-img bitmap --add", (_SMALL, "write 0 2k"), ("qemu-img bitmap -f qcow2 --add IMG one",), "fuse"
    ),
    Workload(
        "bitmap-remove",
        "qemu-img bitmap --remove of one of two",
        (_SMALL, "write 0 2k", "qemu-img bitmap -f qcow2 --add IMG one", "qemu-img bitmap -f qcow2 --add IMG two"),
        ("qemu-img bitmap -f qcow2 --remove IMG one",),
        "fuse",
    ),
    Workload(
        "bitmap-merge",
        "qemu-img bitmap --merge",
        (_SMALL, "qemu-img bitmap -f qcow2 --add IMG one", "write 0 2k", "qemu-img bitmap -f qcow2 --add IMG two"),
        ("qemu-img bitmap -f qcow2 --merge one IMG two",),
        "fuse",
    ),
    Workload(
        "bitmap-write",
        "writes while a bitmap records",
        (_SMALL, "qemu-img bitmap -f qcow2 --add IMG one"),
        ("write 0 1k", "flush", "write 8k 512", "flush"),
        "fuse",
    ),
    Workload(
        "amend",
        "qemu-img amend to lazy refcounts",
        (_SMALL, "write 0 2k"),
        ("qemu-img amend -f qcow2 -o lazy_refcounts=on IMG",),
        "fuse",
    ),
    Workload(
        "amend-refcounts",
        "qemu-img amend to wider refcounts",
        (_SMALL, "write 0 2k"),
        ("qemu-img amend -f qcow2 -o refcount_bits=64 IMG",),
        "fuse",
    ),
    Workload(
        "amend-version",
        "qemu-img amend to version 2",
        (_SMALL, "write 0 2k", "write -z 512 512"),
        ("qemu-img amend -f qcow2 -o compat=0.10 IMG",),
        "fuse",
    ),
)


def random_workload(seed: int) -> Workload:
    """A walk of some ten commands on an image that has a bit of everything; the same for the same seed."""
    chance = random.Random(seed)
    cluster_bytes = chance.choice((512, 512, 4096))
    size_bytes = 128 * cluster_bytes
    lazy = chance.choice(("on", "off", "off"))
    options = f"cluster_size={cluster_bytes},lazy_refcounts={lazy}"
    backing = chance.random() < 0.3
    prepare = []
    if backing:
        prepare += [
            f"qemu-img create -f qcow2 -o cluster_size={cluster_bytes} BASE {size_bytes // 2}",
            f"qemu-io -f qcow2 -c 'write -P 0xb5 0 {size_bytes // 4}' BASE",
        ]
    prepare.append(f"qemu-img create -f qcow2 -o {options} {'-b BASE -F qcow2 ' if backing else ''}IMG {size_bytes}")
    clusters = chance.sample(range(126), 12)
    prepare += [f"write -c {cluster * cluster_bytes} {cluster_bytes}" for cluster in clusters[:4]]
    prepare += [f"write {cluster * cluster_bytes} {cluster_bytes}" for cluster in clusters[4:]]
    if chance.random() < 0.3:
        prepare += ["qemu-img snapshot -c s IMG", f"write {clusters[-1] * cluster_bytes} {cluster_bytes}"]
    commands = []
    for _ in range(chance.randrange(4, 12)):
        # Half of the time where something stands already.
        cluster = chance.choice(clusters) if chance.random() < 0.5 else chance.randrange(126)
        whole = f"{cluster * cluster_bytes} {cluster_bytes * chance.choice((1, 1, 2))}"
        part = f"{cluster * cluster_bytes + chance.randrange(0, cluster_bytes, 512)} 512"
        commands.append(
            chance.choice(
                (
                    f"write {whole}",
                    f"write {whole}",
                    f"write {part}",
                    f"write -z -u {whole}",
                    f"write -z {whole}",
                    f"discard {whole}",
                    "flush",
                )
            )
        )
    tight = ("l2-cache-size=512", "l2-cache-entry-size=512") if chance.random() < 0.5 and cluster_bytes == 512 else ()
    return Workload(f"random:{seed}", "a random walk", tuple(prepare), (*commands, "flush"), options=tight)


def workloads() -> Mapping[str, Workload]:
    """All of them by name, in the order in which they are listed."""
    return {workload.name: workload for workload in _ALL}


def workload(name: str) -> Workload:
    """One by its name; ``random:SEED`` is a walk. Raises Invalid, which says how to list them."""
    word, colon, seed = name.partition(":")
    if word == "random" and colon and seed.isdecimal():
        return random_workload(int(seed))
    found = workloads().get(name)
    if found is None:
        raise Invalid(f"there is no workload {name!a}; --workload list shows them")
    return found
