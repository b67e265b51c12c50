"""``measure`` beside qemu-img's, option by option."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.beside import same
from helpers_programs import Programs

SCRIPTS = """
measure --size 1M
measure --size 1M -O raw
measure --size=1G -O qcow2
measure -O qcow2 --output=json --size 1G
measure -O qcow2 --output json --size 1G
measure -O qcow2 --output=human --size 1G
measure --output=json a
measure a
measure -O raw a
measure -O qcow2 a
measure a -O qcow2 --output=json
measure -f qcow2 -O qcow2 a
measure -f raw -O qcow2 a
measure -f raw -O qcow2 raw
measure -O qcow2 raw
measure -O qcow2 base
measure -O qcow2 top
measure -O qcow2 upper
measure -O qcow2 overraw
measure -O qcow2 long
measure -O qcow2 short
measure -O qcow2 snap
measure -O qcow2 ext
measure -O qcow2 data
measure -O qcow2 comp
measure -O qcow2 v2
measure -O qcow2 --output=json v2
measure -O qcow2 -l one snap
measure -O qcow2 -l 1 snap
measure -O qcow2 -l two snap
measure -O qcow2 -l snapshot.id=1 snap
measure -O qcow2 -l snapshot.name=two snap
measure -O qcow2 -l snapshot.id=1,snapshot.name=one snap
measure -O qcow2 -U -l one snap
measure -O qcow2 dirty
measure -O qcow2 corrupt
measure -O qcow2 -U a
measure -O qcow2 --force-share a
measure -O qcow2 -U --size 1M
measure -O qcow2 --image-opts driver=qcow2,file.filename=a
measure -O qcow2 --image-opts driver=raw,file.filename=raw
measure -O qcow2 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}'
measure -O qcow2 --object secret,id=k,file=key --image-opts driver=qcow2,file.filename=luks,encrypt.key-secret=k
measure -O qcow2 --size 0
measure -O qcow2 --size 1b
measure -O qcow2 --size 513
measure -O qcow2 --size 1.5G
measure -O qcow2 --size 63P
measure -O qcow2 --size 1E
measure -O qcow2 --size 65P -o cluster_size=2M
measure -O qcow2 -o cluster_size=4k --size 1G
measure -O qcow2 -o cluster_size=4k base
measure -O qcow2 -o cluster_size=4k,refcount_bits=64 --size 1T
measure -O qcow2 -o cluster_size=512,refcount_bits=1 --size 7G
measure -O qcow2 -o cluster_size=2M --size 3T
measure -O qcow2 -o cluster_size=512 a
measure -O qcow2 -o cluster_size=2M a
measure -O qcow2 -o cluster_size=4k -o refcount_bits=8 --size 1G
measure -O qcow2 -o refcount_bits=1 --size 1T
measure -O qcow2 -o refcount_bits=64 --size 1T
measure -O qcow2 -o compat=0.10 --size 1T
measure -O qcow2 -o compat=0.10 a
measure -O qcow2 -o compat=1.1 v2
measure -O qcow2 -o lazy_refcounts=on --size 1G
measure -O qcow2 -o lazy_refcounts=on,compat=0.10 --size 1G
measure -O qcow2 -o preallocation=off --size 1G
measure -O qcow2 -o preallocation=metadata --size 1G
measure -O qcow2 -o preallocation=falloc --size 1G
measure -O qcow2 -o preallocation=full --size 1G
measure -O qcow2 -o preallocation=metadata a
measure -O qcow2 -o preallocation=full a
measure -O raw -o preallocation=full --size 1M
measure -O qcow2 -o extended_l2=on --size 1G
measure -O qcow2 -o extended_l2=on ext
measure -O qcow2 -o extended_l2=on --size 100G
measure -O qcow2 -o extended_l2=on,preallocation=full -f raw raw
measure -O qcow2 -o compression_type=zstd --size 1G
measure -O qcow2 -o data_file=x --size 1G
measure -O qcow2 -o data_file=x,data_file_raw=on --size 1G
measure -O qcow2 -o data_file_raw=on --size 1G
measure -O qcow2 -o backing_file=base,backing_fmt=qcow2 --size 1G
measure -O qcow2 -o backing_file=base,backing_fmt=qcow2 top
measure -O qcow2 -o backing_file=nowhere,backing_fmt=qcow2,compat=0.10 top
measure -O qcow2 -o backing_file=base top
measure -O qcow2 -o encryption=off --size 1G
measure
measure -O qcow2
measure -O qcow2 -f qcow2 --size 1M
measure -O qcow2 -l one --size 1M
measure -O qcow2 --image-opts --size 1M
measure -O qcow2 --size 1M a
measure a b
measure --size 1M a b
measure -O qcow2 --image-opts a
measure -O qcow2 --image-opts -f qcow2 driver=qcow2,file.filename=a
~measure --output=foo --size 1G
~measure -O qcow2 -l none snap
~measure -O qcow2 -l snapshot.id=1,snapshot.name=two snap
~measure -O qcow2 -l snapshot.foo=1 snap
~measure -O qcow2 -l one a
~measure -O qcow2 -l one -f raw raw
~measure -f foo -O qcow2 a
~measure -f qcow2 -O qcow2 raw
~measure -O qcow2 lost
~measure -O qcow2 nowhere
~measure -O foo --size 1M
~measure -O vmdk --size 1M
~measure -O luks --size 1M
~measure -O qcow2 --size x
~measure -O qcow2 --size -1
~measure -O qcow2 --size 9E
~measure -O qcow2 --size 1e6
~measure -O qcow2 -o help --size 1M
~measure -O qcow2 -o foo=1 --size 1M
~measure -O raw -o cluster_size=4k --size 1M
~measure -O qcow2 -o cluster_size=3k --size 1G
~measure -O qcow2 -o cluster_size=4M --size 1G
~measure -O qcow2 -o cluster_size=x --size 1G
~measure -O qcow2 -o refcount_bits=7 --size 1T
~measure -O qcow2 -o refcount_bits=8,compat=0.10 --size 1T
~measure -O qcow2 -o compat=2 --size 1T
~measure -O qcow2 -o preallocation=foo --size 1G
~measure -O qcow2 -o extended_l2=on,cluster_size=8k --size 1G
~measure -O qcow2 --object secret,id=k,file=key -o encrypt.format=luks,encrypt.key-secret=z --size 1G
~measure -O qcow2 --object secret,id=k,file=nowhere a
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, images: Path, tmp_path: Path, script: str) -> None:
    same(programs, images, tmp_path, script.replace("; ", "\n"))


REFUSED = """
measure -O raw -o size=2M --size 1M
measure -O raw -o preallocation=foo --size 1M
measure -O qcow2 -o size=2M --size 1M
measure -O qcow2 -o compression_type=foo --size 1G
measure -O qcow2 -o encrypt.format=foo --size 1G
measure -O qcow2 -o encryption=on --size 1G
measure -O qcow2 -o extended_l2=on,compat=0.10 --size 1G
measure -O qcow2 bad
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED)
def test_refused_here(programs: Programs, folder: Path, line: str) -> None:
    """qemu-img ignores the option."""
    done = programs.run(line.split(), folder)
    assert (done.stdout, done.returncode) == ("", 1)
    assert len(done.stderr.splitlines()) == 1


CIPHERS = [("aes-128", "xts"), ("aes-256", "xts"), ("aes-128", "cbc"), ("aes-192", "cbc"), ("aes-256", "cbc")]


@pytest.mark.parametrize(("algorithm", "mode"), CIPHERS)
def test_an_encrypted_image_is_as_long_as_measured(programs: Programs, tmp_path: Path, algorithm: str, mode: str) -> None:
    """Its secret is not asked for, nor is a key derived, which would take qemu-img a second."""
    options = f"encrypt.format=luks,encrypt.cipher-alg={algorithm},encrypt.cipher-mode={mode}"
    measured = programs.run(["measure", "-O", "qcow2", "-o", options, "--size", "1M"], tmp_path).stdout.split()
    (tmp_path / "key").write_bytes(b"secret")
    options += ",preallocation=falloc,encrypt.key-secret=k,encrypt.iter-time=10"
    words = ["create", "-q", "-f", "qcow2", "--object", "secret,id=k,file=key", "-o", options, "e", "1M"]
    assert programs.run(words, tmp_path).returncode == 0
    assert (tmp_path / "e").stat().st_size == int(measured[6])


def test_an_encrypted_source_needs_no_secret(programs: Programs, folder: Path) -> None:
    done = programs.run(["measure", "-O", "qcow2", "luks"], folder)
    assert (done.stdout.splitlines()[0], done.returncode) == ("required size: 393216", 0)


def test_what_create_takes_measure_takes(programs: Programs, tmp_path: Path) -> None:
    for version, level in (("v2", "0.10"), ("v3", "1.1")):
        told = [
            programs.run(["measure", "-O", "qcow2", "-o", f"compat={name}", "--size", "1G"], tmp_path)
            for name in (version, level)
        ]
        assert told[0].returncode == 0
        assert told[0].stdout == told[1].stdout
