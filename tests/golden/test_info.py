"""``info`` beside qemu-img's, option by option."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from golden.beside import SECRET, same, theirs
from golden.more_disks import LUKS, OPENED, QCOW2_LUKS
from helpers_programs import Programs
from judges import require

SCRIPTS = f"""
info a
info -f qcow2 a
info a -f qcow2
info --output=json a
info --output json a
info --output=human a
info --output=json --output=human a
info -f raw a
info raw
info -f raw raw
info --output=json -f raw raw
info odd.raw
info --output=json odd.raw
info sparse.raw
info zero
info v2
info --output=json v2
info tiny
info --output=json tiny
info zstd
info comp
info full
info top
info --output=json top
info overraw
info long
info --output=json short
info snap
info --output=json snap
info snaptop
info ext
info --output=json ext
info extover
info data
info --output=json data
info rawdata
info --output=json rawdata
info lost
info --output=json lost
info luks
info --output=json luks
info a.luks
info -f luks a.luks
info --output=json a.luks
info -f raw a.luks
info --backing-chain upper
info upper --backing-chain
info --backing-chain --output=json upper
info --backing-chain --output=json a
info --backing-chain overraw
info --backing-chain raw
info --backing-chain -f raw upper
info --backing-chain --output=json -f raw raw
info -U a
info --force-share a
info -U --backing-chain --output=json upper
info ./a
info ././dir/../top
info --image-opts driver=qcow2,file.filename=a
info --image-opts driver=raw,file.filename=a
info --image-opts file.filename=a
info --image-opts file.driver=file,file.filename=raw
info --image-opts --output=json driver=qcow2,file.driver=file,file.filename=top
info --image-opts --backing-chain driver=qcow2,file.filename=upper
info --image-opts driver=luks,file.filename=a.luks
info --object {SECRET} a
info --object {SECRET},format=raw a
info --object {SECRET} --object secret,id=o,file=other luks
info 'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "a"}}}}'
info 'json:{{"driver": "raw", "file.filename": "a"}}'
info 'json:{{"file.filename": "top"}}' --output=json
~info
~info a top
info --image-opts -f qcow2 driver=qcow2,file.filename=a
~info --output=xml a
~info --output
~info -f
~info -f foo a
~info -q a
~info -p a
~info -t none a
~info --foo a
~info missing
~info dir/a
~info dir
~info -f qcow2 raw
~info -f luks raw
~info -f qcow2 bad
~info --backing-chain lost
~info --image-opts driver=foo,file.filename=a
~info --image-opts driver=qcow2
~info --image-opts a
~info --image-opts driver=qcow2,file.filename=missing
~info --image-opts driver=qcow2,file.filename=a,foo=bar
~info 'json:{{'
~info 'json:[]'
~info nbd://localhost:1/x
~info --object {SECRET} --object {SECRET} a
~info --object foo,id=s a
~info --object secret,id=s,file=missing a
~info --object secret,id=s a
~info --object secret,file=key a
""".strip().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_as_qemu_img(programs: Programs, more_images: Path, tmp_path: Path, script: str) -> None:
    same(programs, more_images, tmp_path, script.replace("; ", "\n"))


@pytest.mark.parametrize(("image", "name"), [(LUKS, "a.luks"), (QCOW2_LUKS, "luks")])
def test_an_image_is_shown_by_its_name_and_not_by_what_opens_it(
    programs: Programs, more_images: Path, image: str, name: str
) -> None:
    opened, named = programs.run(["info", *OPENED.split(), image], more_images), programs.run(["info", name], more_images)
    assert opened.returncode == 0, opened.stderr
    assert opened.stdout == named.stdout
    assert programs.run(["info", "--image-opts", image], more_images).stdout == named.stdout


def test_what_begins_as_qcow2_is_not_raw(programs: Programs, more_images: Path) -> None:
    done = programs.run(["info", "bad"], more_images)
    assert (done.returncode, done.stdout) == (1, "")
    assert "qcow2 version 0" in done.stderr


@pytest.mark.parametrize("output", ["human", "json"])
def test_an_nbd_export(programs: Programs, more_images: Path, tmp_path: Path, output: str) -> None:
    name = f"nbd+unix://?socket={tmp_path}/s"
    server = subprocess.Popen(
        [require("qemu-nbd"), "-r", "-t", "-f", "qcow2", "-k", str(tmp_path / "s"), str(more_images / "base")]
    )
    try:
        while not (tmp_path / "s").exists():
            time.sleep(0.01)
        expected = theirs(["info", f"--output={output}", name], tmp_path)
        assert programs.run(["info", f"--output={output}", name], tmp_path).stdout == expected.stdout
        assert programs.run(["info", "-f", "qcow2", name], tmp_path).returncode == 1
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("words", [["a.vmdk"], ["-f", "vmdk", "a.vmdk"]])
def test_what_is_refused_by_name(programs: Programs, more_images: Path, words: list[str]) -> None:
    done = programs.run(["info", *words], more_images)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "vmdk" in done.stderr
