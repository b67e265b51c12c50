"""Snapshots between QEMU and us: each takes, applies, lists and deletes what the other has made."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import cowfence
from helpers_cli import cowfence as run_cowfence
from judges import run

_SIZE = 4 << 20


def clean(image: Path) -> None:
    """No corruption and no leak, to qemu-img."""
    run(["qemu-img", "check", "-q", image])


def by_qemu(verb: str, which: str, image: Path) -> None:
    run(["qemu-img", "snapshot", f"-{verb}", which, image])


def by_us(verb: str, which: str, image: Path) -> None:
    run_cowfence("snapshot", f"-{verb}", which, image)


def read_by_qemu(image: Path, which: str | None, out: Path) -> bytes:
    of = [] if which is None else ["-l", f"snapshot.id={which}"]
    run(["qemu-img", "convert", "-O", "raw", *of, image, out])
    return out.read_bytes()


def read_by_us(image: Path, which: str | None) -> bytes:
    with cowfence.open(image, snapshot=which) as disk:
        return disk.read(0, disk.size)


OPTIONS = {
    "v3": "cluster_size=64k",
    "v2": "compat=0.10,cluster_size=4k",
    "small": "cluster_size=512",
    "narrow": "cluster_size=64k,refcount_bits=8",
    "wide": "cluster_size=1k,refcount_bits=64",
    "zstd": "compression_type=zstd",
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_work_in_turn_on_one_image(options: str, tmp_path: Path) -> None:
    """A random walk in which QEMU and we take turns; each step is judged by qemu-img check, both read every snapshot."""
    rng = random.Random(options)
    image, packed = tmp_path / "plain", tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(_SIZE)])
    run(["qemu-io", "-c", "write -P 1 0 1M", "-c", "write -P 2 3M 64k", image])
    # Compressed clusters to begin with.
    run(["qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, image, packed])
    image = packed
    now, taken = read_by_us(image, None), dict[str, bytes]()
    for number in range(14):
        snapshot: Callable[[str, str, Path], None] = rng.choice([by_us, by_qemu])
        verb = rng.choice("wwccad") if len(taken) < 4 else rng.choice("wad")
        if verb == "c":
            snapshot("c", f"name{number}", image)
            with cowfence.open(image) as disk:
                taken[disk.snapshots()[-1].id] = now
        elif verb == "a" and taken:
            which = rng.choice(sorted(taken))
            snapshot("a", which, image)
            now = taken[which]
        elif verb == "d" and taken:
            which = rng.choice(sorted(taken))
            with cowfence.open(image) as disk:
                name = next(found.name for found in disk.snapshots() if found.id == which)
            snapshot("d", name, image)
            del taken[which]
        elif verb == "w":
            at, length_bytes = rng.randrange(_SIZE // 512 - 200) * 512, rng.randrange(1, 200) * 512
            if rng.random() < 0.5:
                run(["qemu-io", "-c", f"write -P {number + 9} {at} {length_bytes}", image])
            else:
                with cowfence.open(image, writable=True) as disk:
                    disk.write(at, bytes([number + 9]) * length_bytes)
            now = now[:at] + bytes([number + 9]) * length_bytes + now[at + length_bytes :]
        clean(image)
        assert read_by_us(image, None) == now
    for which, held in taken.items():
        assert read_by_us(image, which) == held
        assert read_by_qemu(image, which, tmp_path / "raw") == held
    assert read_by_qemu(image, None, tmp_path / "raw") == now


def test_over_a_backing_file(tmp_path: Path) -> None:
    """What a snapshot does not hold comes from the backing file, after an apply by either."""
    base, image = tmp_path / "base", tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", base, str(_SIZE)])
    run(["qemu-io", "-c", f"write -P 7 0 {_SIZE}", base])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", image])
    run(["qemu-io", "-c", "write -P 8 0 64k", "-c", "write -z 64k 64k", image])
    before = read_by_us(image, None)
    for take, back in ((by_us, by_qemu), (by_qemu, by_us)):
        take("c", "s", image)
        run(["qemu-io", "-c", "write -P 9 0 1M", image])
        assert read_by_us(image, "s") == before
        assert read_by_qemu(image, "1", tmp_path / "raw") == before
        back("a", "s", image)
        clean(image)
        assert read_by_us(image, None) == before
        take("d", "s", image)
        clean(image)


@pytest.mark.parametrize("grown_by", [by_us, by_qemu])
def test_apply_after_the_image_has_grown(grown_by: Callable[[str, str, Path], None], tmp_path: Path) -> None:
    image = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, str(_SIZE)])
    run(["qemu-io", "-c", "write -P 7 1M 64k", image])
    by_us("c", "small", image)
    run(["qemu-img", "resize", "-q", image, str(2 * _SIZE)])
    run(["qemu-io", "-c", f"write -P 8 {2 * _SIZE - 512} 512", image])
    by_qemu("c", "large", image)
    large = read_by_us(image, None)
    grown_by("a", "small", image)
    clean(image)
    with cowfence.open(image) as disk:
        assert disk.size == _SIZE
    grown_by("a", "large", image)
    clean(image)
    assert read_by_us(image, None) == large == read_by_qemu(image, None, tmp_path / "raw")


@pytest.mark.parametrize("take", [by_us, by_qemu])
def test_a_disk_without_any_bytes(take: Callable[[str, str, Path], None], tmp_path: Path) -> None:
    image = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, "0"])
    take("c", "nothing", image)
    clean(image)
    run(["qemu-img", "resize", "-q", image, str(_SIZE)])
    run(["qemu-io", "-c", "write -P 7 1M 64k", image])
    take("c", "something", image)
    for verb, which in (("a", "nothing"), ("a", "something"), ("d", "nothing"), ("d", "something")):
        take(verb, which, image)
        clean(image)
    assert read_by_us(image, None) == read_by_qemu(image, None, tmp_path / "raw")
    assert read_by_us(image, None)[1 << 20 :][: 64 << 10] == b"\7" * (64 << 10)


def test_flags_that_qemu_leaves_in_a_snapshots_tables(tmp_path: Path) -> None:
    """QEMU's apply sets COPIED in tables that only a snapshot has left; ours must clear them before it shares them again."""
    image = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, str(_SIZE)])
    run(["qemu-io", "-c", "write -P 1 0 1M", image])
    by_qemu("c", "one", image)
    run(["qemu-io", "-c", "write -P 2 0 1M", image])
    by_qemu("c", "two", image)
    two = read_by_us(image, None)
    by_qemu("a", "one", image)
    by_us("a", "two", image)
    clean(image)
    with cowfence.open(image, writable=True) as disk:
        disk.write(0, b"x" * (1 << 20))
    clean(image)
    assert read_by_us(image, "two") == two


def test_the_list_is_that_of_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(_SIZE)])
    assert run_cowfence("snapshot", "-l", image).stdout == run(["qemu-img", "snapshot", "-l", image]).stdout == ""
    for take, name in ((by_us, "first"), (by_qemu, "a name that is longer than its column"), (by_us, ""), (by_qemu, "first")):
        take("c", name, image)
    monkeypatch.setenv("TZ", "UTC")
    assert run_cowfence("snapshot", image).stdout == run(["qemu-img", "snapshot", "-l", image]).stdout
    ours = json.loads(run_cowfence("snapshot", "-l", "--output=json", image).stdout)
    assert ours == json.loads(run(["qemu-img", "info", "--output=json", image]).stdout)["snapshots"]
    assert [entry["id"] for entry in ours] == ["1", "2", "3", "4"]


def test_a_name_that_is_also_an_id_is_taken_as_qemu_img_takes_it(tmp_path: Path) -> None:
    for number, snapshot in enumerate((by_us, by_qemu)):
        image = tmp_path / str(number)
        run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(_SIZE)])
        for fill, name in enumerate(("2", "1", "x")):
            run(["qemu-io", "-c", f"write -P {fill + 1} 0 64k", image])
            by_qemu("c", name, image)
        snapshot("a", "1", image)
        assert read_by_us(image, None)[:1] == b"\1"
        snapshot("d", "1", image)
        with cowfence.open(image) as disk:
            assert [found.id for found in disk.snapshots()] == ["1", "3"]


@pytest.mark.parametrize("words", [("-a", "nope"), ("-d", "nope"), ("-c", "a", "-d", "b"), ("-U", "-c", "x"), ()])
def test_mistakes_end_alike(words: tuple[str, ...], tmp_path: Path) -> None:
    image = tmp_path / "image"
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(_SIZE)])
    operands: list[str | Path] = [*words, image] if words else []
    ours, theirs = run_cowfence("snapshot", *operands, check=False), run(["qemu-img", "snapshot", *operands], check=False)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout) == (1, "")
    assert len(ours.stderr.splitlines()) == 1
    if "nope" in words:
        # Our line goes on with the file's name and the reason.
        assert ours.stderr.split(": ")[1] == theirs.stderr.split(": ")[1]
