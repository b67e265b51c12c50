"""``amend`` beside qemu-img's, option by option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden.beside import SECRET, plain, same, theirs
from golden.more_disks import LUKS, OPENED, QCOW2_LUKS
from helpers_programs import Programs

ADD = f"amend --object {SECRET} --object secret,id=o,file=other --image-opts"
ERASE = f"amend {OPENED}"
SCRIPTS = f"""
amend -o compat=0.10 base
amend -o compat=v2 base
amend -f qcow2 -o compat=0.10 base
amend base -o compat=0.10
amend -o compat=0.10 base; amend -o compat=1.1 base
amend -o compat=v3 v2
amend -o compat=1.1 base
amend -o compat=0.10 snap
amend -o compat=0.10 top
amend -o compat=0.10 comp
amend -o compat=0.10 full
> -c 'write -z 0 512k' base; amend -o compat=0.10 base
> -c 'write -z 0 512k' top; amend -o compat=0.10 top
amend -o lazy_refcounts=on base
amend -o lazy_refcounts base
amend -o lazy_refcounts=yes base
amend -o lazy_refcounts=true base
amend -o lazy_refcounts=y base
amend -o lazy_refcounts=off tiny
amend -o lazy_refcounts=no tiny
amend -o lazy_refcounts=n base
amend -o lazy_refcounts=on base; amend -o lazy_refcounts=off base
amend -o lazy_refcounts=on base; amend -o compat=0.10 base
amend -o lazy_refcounts=on,compat=1.1 v2
amend -o compat=1.1 -o lazy_refcounts=on v2
amend -o refcount_bits=1 base
amend -o refcount_bits=64 base
amend -o refcount_bits=2 snap
amend -o refcount_bits=16 tiny
amend -o refcount_bits=16 v2
amend -o refcount_bits=8,compat=1.1 v2
amend -o size=2M base
amend -o size=512k base
amend -o size=1M base
amend -o size=2M v2
amend -o size=2M snap
amend -o size=512k top
amend -o size=2M,compat=1.1,lazy_refcounts=on,refcount_bits=0x20 v2
amend -o size=512k -o compat=0.10 base
amend -o size=0x200000 base
amend -o compat=0.10 -o compat=1.1 base
amend -o data_file=./data.bin data
amend -o data_file=raw.bin,lazy_refcounts=on data
amend -o data_file_raw=off rawdata
amend -o data_file_raw=on rawdata
amend -o data_file_raw=off data
amend -q -o compat=0.10 base
amend -p -o compat=0.10 base
amend -p -q -o compat=0.10 base
amend -t none -o lazy_refcounts=on base
amend -t directsync -o lazy_refcounts=on base
amend -t writeback -o lazy_refcounts=on base
amend -t writethrough -o lazy_refcounts=on base
amend -t unsafe -o lazy_refcounts=on base
amend --force -o compat=0.10 base
amend --image-opts -o compat=0.10 driver=qcow2,file.filename=base
amend --image-opts -o compat=0.10 file.filename=base
amend -o compat=0.10 'json:{{"driver": "qcow2", "file.filename": "base"}}'
amend --object {SECRET} -o compat=0.10 base
{ADD} -o encrypt.state=active,encrypt.new-secret=o,encrypt.iter-time=10,encrypt.keyslot=3 {QCOW2_LUKS}
{ADD} -o state=active,new-secret=o,iter-time=10 {LUKS}
{ADD} -o encrypt.state=active,encrypt.new-secret=o,encrypt.keyslot=8 {QCOW2_LUKS}
{ADD} -o encrypt.state=active,encrypt.new-secret=o,encrypt.keyslot=0 {QCOW2_LUKS}
{ADD} -o encrypt.state=inactive,encrypt.old-secret=o {QCOW2_LUKS}
{ADD} -o state=inactive,old-secret=o {LUKS}
{ERASE} -o encrypt.state=inactive,encrypt.keyslot=0 {QCOW2_LUKS}
~{ERASE} -o encrypt.state=inactive,encrypt.keyslot=1 {QCOW2_LUKS}
~{ERASE} -o encrypt.state=inactive,encrypt.old-secret=k {QCOW2_LUKS}
~{ERASE} -o encrypt.state=inactive {QCOW2_LUKS}
{ERASE} -o encrypt.state=active {QCOW2_LUKS}
{ERASE} -o encrypt.state=active,encrypt.new-secret=u {QCOW2_LUKS}
{ERASE} -o encrypt.state=inactive,encrypt.new-secret=k {QCOW2_LUKS}
{ERASE} -o encrypt.state=inactive,encrypt.iter-time=10 {QCOW2_LUKS}
{ERASE} -o encrypt.state=foo {QCOW2_LUKS}
{ERASE} -o encrypt.new-secret=k {QCOW2_LUKS}
~amend --object {SECRET} -o encrypt.state=active,encrypt.new-secret=k base
amend
amend base
amend -o compat=1.1
amend -o compat=2 base
amend -o compat= base
amend -o lazy_refcounts=foo base
amend -o lazy_refcounts=1 base
amend -o refcount_bits=x base
amend -o size=x base
amend -o size=-1 base
amend -o size= base
amend -o foo=1 base
amend -o foo base
amend -o , base
amend -o compat=1.1, base
amend -o ,compat=1.1 base
amend -o '' base
amend -o data_file=x base
amend -o data_file_raw=on data
amend -o data_file_raw=on base
amend -o data_file_raw=foo data
amend -f raw -o size=1M raw
amend -f raw -o help
amend -t foo -o compat=0.10 base
amend --image-opts -f qcow2 -o compat=0.10 driver=qcow2,file.filename=base
~amend -o lazy_refcounts=on v2
~amend -o lazy_refcounts=on,compat=0.10 base
~amend -o refcount_bits=8 v2
~amend -o refcount_bits=8,compat=0.10 base
~amend -o refcount_bits=8 base; ~amend -o compat=0.10 base
~amend -o refcount_bits=3 base
~amend -o refcount_bits=0 base
~amend -o refcount_bits=128 base
~amend -o refcount_bits=-1 base
~amend -o refcount_bits=1 snap
~amend -o size=1000 base
~amend -o compat=0.10 ext
~amend -o compat=0.10 data
~amend -o backing_file=base v2
~amend -o backing_fmt=raw top
~amend -o backing_file=top,backing_fmt=qcow2 top
~amend -o cluster_size=4k base
~amend -o compression_type=zstd base
~amend -o extended_l2=on base
~amend -o preallocation=full base
~amend -o encryption=on base
~amend -o encrypt.format=luks base
~amend -o encrypt.cipher-alg=aes-128 base
~amend -o compat=1.1 base v2
~amend -o size=1M raw
~amend -f qcow2 -o size=1M raw
~amend -f foo -o compat=1.1 base
~amend -o compat=1.1 missing
~amend -o compat=1.1 dir
~amend -o compat=1.1 lost
~amend --image-opts -o compat=1.1 driver=foo,file.filename=base
~amend --object foo,id=s -o compat=1.1 base
~amend -U -o compat=1.1 base
~amend --foo -o compat=1.1 base
~amend -f
~amend -o
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, more_images: Path, tmp_path: Path, script: str) -> None:
    same(programs, more_images, tmp_path, script.replace("; ", "\n"))


def test_help_names_what_can_be_amended(programs: Programs, more_images: Path) -> None:
    for words in ([], ["-f", "qcow2"], ["base"]):
        lines = programs.run(["amend", "-o", "help", *words], more_images).stdout.splitlines()
        expected = theirs(["amend", "-o", "help", "-f", "qcow2"], more_images).stdout.splitlines()
        # The backing file is rebase's.
        assert lines[0] == expected[0]
        assert _names(lines) == [name for name in _names(expected) if not name.startswith("backing_")]
    lines = programs.run(["amend", "-f", "luks", "-o", "help"], more_images).stdout.splitlines()
    assert _names(lines) == _names(theirs(["amend", "-o", "help", "-f", "luks"], more_images).stdout.splitlines())


def _names(lines: list[str]) -> list[str]:
    return [line.split("=")[0].strip() for line in lines[1:]]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-o", "compat=0.10", "a"], "compat=0.10 with persistent bitmaps"),
        (["-o", "compat=0.10", "zstd"], "compat=0.10 with incompatible features 0x8"),
        (["-o", "size=0", "base"], "must be positive"),
        (["-o", "backing_file=base,backing_fmt=qcow2", "top"], "use 'cowfence rebase' instead"),
        (["-o", "compat=0.10", "luks"], "compat=0.10 with LUKS encryption"),
        (["-f", "vmdk", "-o", "size=1M", "a.vmdk"], "invalid choice: 'vmdk'"),
        (["-o", "size=1M", "bad"], "qcow2 version 0"),
    ],
)
def test_what_is_refused(programs: Programs, more_images: Path, words: list[str], why: str) -> None:
    before = plain(theirs(["info", "--output=json", words[-1]], more_images).stdout)
    done = programs.run(["amend", *words], more_images)
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert plain(theirs(["info", "--output=json", words[-1]], more_images).stdout) == before


@pytest.mark.parametrize(("image", "prefix"), [("luks", "encrypt."), ("a.luks", "")])
def test_a_passphrase_is_added_and_the_old_one_erased(
    programs: Programs, more_images: Path, tmp_path: Path, image: str, prefix: str
) -> None:
    for name in (image, "key", "other"):
        (tmp_path / name).write_bytes((more_images / name).read_bytes())
    secrets = ["--object", SECRET, "--object", "secret,id=o,file=other"]
    for option in ("state=active,new-secret=o,iter-time=10", "state=inactive,old-secret=k"):
        options = ",".join(prefix + item for item in option.split(","))
        done = programs.run(["amend", *secrets, "-o", options, image], tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    driver = "luks" if image == "a.luks" else "qcow2"
    opened = f"driver={driver},file.filename={image},{prefix}key-secret="
    assert theirs(["compare", *secrets, "--image-opts", opened + "o", opened + "o"], tmp_path).returncode == 0
    assert theirs(["compare", *secrets, "--image-opts", opened + "k", opened + "k"], tmp_path).returncode == 2


def test_the_last_passphrase_goes_by_force_only(programs: Programs, more_images: Path, tmp_path: Path) -> None:
    for name in ("luks", "key"):
        (tmp_path / name).write_bytes((more_images / name).read_bytes())
    words = ["amend", *OPENED.split(), "-o", "encrypt.state=inactive,encrypt.keyslot=0", QCOW2_LUKS]
    assert programs.run(words, tmp_path).returncode == 1
    assert programs.run([*words, "--force"], tmp_path).returncode == 0
    slots = json.loads(programs.run(["info", "--output=json", "luks"], tmp_path).stdout)
    assert not any(slot["active"] for slot in slots["format-specific"]["data"]["encrypt"]["slots"])
