"""``create`` beside qemu-img's, option by option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from golden.beside import SECRET, same, theirs
from helpers_programs import Programs

ENCRYPTED = f"create -f qcow2 --object {SECRET} -o encrypt.format=luks,encrypt.key-secret=k"
ESSIV = "encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256"
SCRIPTS = f"""
create new 1M
create -f raw new 1000
create -f raw new 0
create -f raw new 1M -q
create -f raw -o size=1M new
create -f raw new 1M -o preallocation=off
create -f raw new 1M -o preallocation=falloc
create -f raw new 1M -o preallocation=full
create -f raw raw 100k
create -f raw dir/new 100k
create -f qcow2 new 1G
create -fqcow2 new 64k
create -q -f qcow2 new 1M
create new 1M -f qcow2
create -f qcow2 new 1M -o cluster_size=4k
create -qfqcow2 new 1M
create -f qcow2 -- new 1M
create -f raw -f qcow2 new 1M
create -f qcow2 'a new one, with a comma' 1M
create -f qcow2 new 0
create -f qcow2 new 1000
create -f qcow2 new 1000b
create -f qcow2 new 1.5G
create -f qcow2 new 0x100000
create -f qcow2 new +1M
create -f qcow2 new ' 1M'
create -f qcow2 new 1T
create -f qcow2 -o cluster_size=2M new 1P
create -f qcow2 -o cluster_size=512 new 1G
create -f qcow2 -o size=1M new
create -f qcow2 -o size=1k,size=2k new
create -f qcow2 base 2M
create -f qcow2 -o cluster_size=512 new 1M
create -f qcow2 -o cluster_size=2M new 1M
create -f qcow2 -o cluster_size=0x1000 new 1M
create -f qcow2 -o cluster_size=4k -o compat=v2 new 1M
create -f qcow2 -o cluster_size=4k -o cluster_size=8k new 1M
create -f qcow2 -o compat=0.10 new 1M
create -f qcow2 -o compat=v2 new 1M
create -f qcow2 -o compat=1.1 new 1M
create -f qcow2 -o compat=v3 new 1M
create -f qcow2 -o compat=0.10,refcount_bits=16,lazy_refcounts=off new 1M
create -f qcow2 -o compression_type=zlib new 1M
create -f qcow2 -o compression_type=zstd new 1M
create -f qcow2 -o data_file=d new 1M
create -f qcow2 -o data_file=d,data_file_raw=on new 1M
create -f qcow2 -o data_file=d,data_file_raw=off new 1M
create -f qcow2 -o data_file=d,preallocation=metadata new 1M
create -f qcow2 -o data_file=d,preallocation=falloc new 1M
create -f qcow2 -o data_file=d,preallocation=full new 1M
create -f qcow2 -o data_file=d,extended_l2=on,refcount_bits=8 new 1M
create -f qcow2 -o data_file=d -b base -F qcow2 new
create -f qcow2 -o extended_l2=on new 1M
create -f qcow2 -o extended_l2 new 1M
create -f qcow2 -o extended_l2=on,cluster_size=16k new 1M
create -f qcow2 -o extended_l2=off,cluster_size=8k new 1M
create -f qcow2 -o lazy_refcounts=on new 1M
create -f qcow2 -o lazy_refcounts=yes new 1M
create -f qcow2 -o lazy_refcounts=n,extended_l2=true new 1M
create -f qcow2 -o refcount_bits=1 new 1M
create -f qcow2 -o refcount_bits=64 new 1M
create -f qcow2 -o refcount_bits=0x10 new 1M
create -f qcow2 -o refcount_bits=+8 new 1M
create -f qcow2 -o preallocation=off new 1M
create -f qcow2 -o preallocation=metadata new 1M
create -f qcow2 -o preallocation=falloc new 1M
create -f qcow2 -o preallocation=full new 1M
create -f qcow2 -o preallocation=metadata,compat=0.10,cluster_size=1k new 3M
create -f qcow2 -o preallocation=full,extended_l2=on,refcount_bits=4 new 2M
create -f qcow2 -o encryption=off new 1M
create -f qcow2 -b base -F qcow2 new
create -f qcow2 -b base -F qcow2 new 2M
create -f qcow2 -b base -F qcow2 new 512k
create -f qcow2 -F qcow2 -b ./base -q new
create -f qcow2 -b raw -F raw new
create -f qcow2 -b odd.raw -F raw new
create -f qcow2 -b upper -F qcow2 new
create -f qcow2 -b data -F qcow2 new
create -f qcow2 -b snap -F qcow2 -o compat=0.10,cluster_size=4k new
create -f qcow2 -b base -b raw -F raw new
create -f qcow2 -o backing_file=base,backing_fmt=qcow2 new
create -f qcow2 -o backing_file=base -F qcow2 new 3M
create -f qcow2 -o backing_fmt=qcow2 -b base new
create -f qcow2 -b base -F qcow2 -o preallocation=metadata,extended_l2=on new
create -f qcow2 -b ../base -F qcow2 dir/new
create -f qcow2 -u -b base -F qcow2 base2 1M
~create -f qcow2 -u -b missing -F qcow2 new
create -f qcow2 -u new 1M
create -f qcow2 --object {SECRET} new 1M
{ENCRYPTED},encrypt.iter-time=10,encrypt.hash-alg=sha1,{ESSIV} new 1M
create
create -f qcow2
create -f qcow2 new
create -f raw new
create -f qcow2 new x
create -f qcow2 new 1X
create -f qcow2 new ''
create -f qcow2 new 1e6
create -f qcow2 new 8E
create -f raw new 8E
create -f qcow2 new 63P
create -f qcow2 new 64P
create -f qcow2 -o cluster_size=512 new 129G
create -f qcow2 -o size=1M new 2M
create -f qcow2 -o size=x new
create -f qcow2 -o size=-1 new
create -f qcow2 -o cluster_size=4M new 1M
create -f qcow2 -o cluster_size=256 new 1M
create -f qcow2 -o cluster_size=3000 new 1M
create -f qcow2 -o cluster_size=0 new 1M
create -f qcow2 -o cluster_size=x new 1M
create -f qcow2 -o cluster_size= new 1M
create -f qcow2 -o cluster_size new 1M
create -f qcow2 -o cluster_size=4k,,compat=v2 new 1M
create -f qcow2 -o refcount_bits=0 new 1M
create -f qcow2 -o refcount_bits=3 new 1M
create -f qcow2 -o refcount_bits=128 new 1M
create -f qcow2 -o refcount_bits=-1 new 1M
create -f qcow2 -o refcount_bits=x new 1M
create -f qcow2 -o extended_l2=on,cluster_size=8k new 1M
create -f qcow2 -o extended_l2=maybe new 1M
create -f qcow2 -o lazy_refcounts=1 new 1M
create -f qcow2 -o foo=1 new 1M
create -f qcow2 -o foo new 1M
create -f qcow2 -o =1 new 1M
create -f qcow2 -o , new 1M
create -f qcow2 -o '' new 1M
create -f qcow2 -o cluster_size=4k, new 1M
create -f qcow2 -o ,cluster_size=4k new 1M
create -f raw -o cluster_size=4k new 1M
create -f raw -o backing_file=base new 1M
create -f raw -b base -F qcow2 new 1M
create -f raw -F qcow2 new 1M
create -f qcow2 -b base new
create -f qcow2 -b base new 1M
create -f qcow2 -u -b base new 1M
create -f qcow2 -o backing_file=base new
create -f qcow2 -o backing_file= new 1M
create -f qcow2 -b '' -F qcow2 new 1M
create -f qcow2 -b base -F qcow2 base
create -f qcow2 -b new -F qcow2 new 1M
create -f qcow2 -F qcow2 new 1M
create -f qcow2 -o backing_fmt=qcow2 new 1M
create -f qcow2 --object {SECRET} -o encrypt.key-secret=k new 1M
create -f qcow2 -o encrypt.format=luks new 1M
{ENCRYPTED},encrypt.iter-time=x new 1M
~create -f qcow2 -b base -F qcow2 dir/new
~create -f qcow2 -b missing -F qcow2 new 1M
~create -f qcow2 -b missing -F qcow2 new
~create -f qcow2 -b raw -F qcow2 new
~create -f qcow2 -b bad -F qcow2 new
~create -f qcow2 -b base -F foo new
~create -f qcow2 -o backing_file=base,backing_fmt=foo new
~create -f qcow2 -b dir -F raw new
~create -f qcow2 -b base -F qcow2 -o preallocation=metadata new
~create -f qcow2 -b base -F qcow2 -o preallocation=full new
~create -f qcow2 new 9223372036854775807
~create -f qcow2 new -1
~create -f qcow2 -o compat=2 new 1M
~create -f qcow2 -o compat=0.10,lazy_refcounts=on new 1M
~create -f qcow2 -o compat=0.10,refcount_bits=1 new 1M
~create -f qcow2 -o compat=0.10,extended_l2=on new 1M
~create -f qcow2 -o compat=0.10,data_file=d new 1M
~create -f qcow2 -o compat=0.10,compression_type=zstd new 1M
~create -f qcow2 -o compression_type=lzo new 1M
~create -f qcow2 -o data_file_raw=on new 1M
~create -f qcow2 -o data_file=d,data_file_raw=on -b base -F qcow2 new
~create -f qcow2 -o data_file= new 1M
~create -f qcow2 -o preallocation=foo new 1M
~create -f qcow2 missing/new 1M
~create -f qcow2 dir 1M
~create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=u new 1M
~{ENCRYPTED},encrypt.cipher-alg=foo new 1M
~{ENCRYPTED},encrypt.cipher-mode=foo new 1M
~{ENCRYPTED},encrypt.hash-alg=foo new 1M
~{ENCRYPTED},encrypt.ivgen-alg=foo new 1M
~create -f qcow2 --object {SECRET} -o encrypt.format=foo,encrypt.key-secret=k new 1M
~create -f qcow2 --object secret,id=s,file=missing new 1M
~create -f qcow2 --object secret,file=key new 1M
~create -f qcow2 --object secret,id=s new 1M
~create -f qcow2 --object secret,id=s,file=key,format=foo new 1M
~create -f qcow2 --object foo,id=s new 1M
~create -f qcow2 --object {SECRET} --object {SECRET} new 1M
~create -f qcow2 new 1M more
~create -f foo new 1M
~create -e -f qcow2 new 1M
~create -6 -f qcow2 new 1M
~create -t none -f qcow2 new 1M
~create --foo new 1M
~create -f
~create -o
""".strip().splitlines()


@pytest.fixture(scope="module")
def few(more_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those that a new image may stand over: hundreds of copies are made of them."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("base", "top", "upper", "snap", "data", "data.bin", "raw", "odd.raw", "bad", "key"):
        shutil.copy2(more_images / name, folder)
    (folder / "dir").mkdir()
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, few: Path, tmp_path: Path, script: str) -> None:
    same(programs, few, tmp_path, script.replace("; ", "\n"))


@pytest.mark.parametrize("words", ["-f qcow2", "-f raw", ""])
def test_help_names_the_options(programs: Programs, more_images: Path, words: str) -> None:
    lines = programs.run(["create", *words.split(), "-o", "help"], more_images).stdout.splitlines()
    expected = theirs(["create", *words.split(), "-o", "help"], more_images).stdout.splitlines()
    assert lines[0] == expected[0]
    # The legacy encryption is not made any more; and a raw image has what QEMU leaves to the file.
    named = [name for name in _names(expected) if name not in ("encryption", "The protocol level may support further options.")]
    assert [name for name in _names(lines) if words == "-f qcow2" or name != "preallocation"] == named[: len(_names(lines))]


def _names(lines: list[str]) -> list[str]:
    return [line.split("=")[0].strip() for line in lines[1:] if "=<" in line]


def test_the_format_that_nobody_names(programs: Programs, tmp_path: Path) -> None:
    for program, expected in (("cowfence", "qcow2"), ("cowfence-img", "raw")):
        assert programs.run(["create", "new", "1M"], tmp_path, program=program).returncode == 0
        assert json.loads(programs.run(["info", "--output=json", "new"], tmp_path).stdout)["format"] == expected


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("-f luks new 1M", "invalid choice: 'luks'"),
        ("-f vmdk new 1M", "invalid choice: 'vmdk'"),
        ("-f raw -o preallocation=metadata new 1M", "Unsupported preallocation mode: metadata"),
        ("-f raw -o preallocation=foo new 1M", "preallocation=foo: must be one of"),
        ("-f raw -o nocow=on new 1M", "nocow: it is the file system's"),
        ("-f qcow2 -o extent_size_hint=1M new 1M", "extent_size_hint: it is the file system's"),
        ("-f qcow2 -o nolazy_refcounts new 1M", "Invalid parameter 'nolazy_refcounts'"),
        ("-f qcow2 -o encryption=on new 1M", "use encrypt.format=luks"),
        (f"-f qcow2 --object {SECRET} -o encrypt.format=aes,encrypt.key-secret=k new 1M", "weak"),
        (f"-f qcow2 --object {SECRET} -o encrypt.format=luks,encrypt.key-secret=k,compat=v2 new 1M", "level 1.1 or above"),
        (f"-f qcow2 --object {SECRET} -o encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=0 new 1M", "iter-time=0"),
        ("-f qcow2 --object secret,id=k,data=abc new 1M", "data= shows the secret to everybody"),
        ("-f qcow2 -o backing_file=base -b raw -F raw new", "Backing file must be specified only once"),
        ("-f qcow2 -o backing_fmt=qcow2 -b raw -F raw new", "Backing file format must be specified only once"),
        ("-f qcow2 -u -b nbd://localhost/x -F raw new 1M", "refused"),
        ("-f qcow2 -u -b base -F foo new 1M", "invalid choice: 'foo'"),
        ("-f qcow2 -u -o backing_file=base,backing_fmt=foo new 1M", "backing file format 'foo'"),
        ("-f qcow2 -b luks -F luks new", "give the size, and -u"),
        ("-f qcow2 -o size=9E new", "too large"),
        ("-f qcow2 -b base -F qcow2 -o data_file=./base new", "the backing file cannot be the external data file, too"),
        ("-f qcow2 -o data_file=./new new 1M", "cannot be its own external data file"),
        (f"-f qcow2 -o cluster_size=512 -u -b ./{'n' * 480} -F raw new 1M", "does not fit into the first cluster of 512"),
        (f"-f qcow2 -u -b ./{'n' * 1022} -F raw new 1M", "has 1 to 1023 bytes"),
    ],
)
def test_what_is_refused_leaves_nothing(programs: Programs, more_images: Path, words: str, why: str) -> None:
    done = programs.run(["create", *words.split()], more_images)
    assert done.returncode == 1
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (more_images / "new").exists()


def test_an_image_that_is_replaced_is_there_until_the_new_one_is(programs: Programs, more_images: Path) -> None:
    before = (more_images / "base").read_bytes()
    for option in ("compat=0.10,lazy_refcounts=on", "preallocation=foo", "cluster_size=5k"):
        assert programs.run(["create", "-f", "qcow2", "-o", option, "base", "1M"], more_images).returncode == 1
    assert (more_images / "base").read_bytes() == before
