"""Checking and repair beside QEMU: its images, each damage planted, and the numbers of ``qemu-img check`` compared."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import judges
from cowfence.cli import main
from cowfence.errors import CowfenceError
from cowfence.ops.check import CheckResult, Mode, NoCheck, check
from cowfence.qcow2.entries import COMPRESSED, COPIED
from cowfence.qcow2.findings import Problem
from helpers_check import Scalpel

MIB = 1 << 20


def qemu_img(*arguments: object) -> None:
    judges.run(["qemu-img", *(str(argument) for argument in arguments)])


def qemu_io(path: Path, *commands: str, options: str = "") -> None:
    image = ["--image-opts", f"driver=qcow2,file.filename={path},{options}"] if options else [str(path)]
    judges.run(["qemu-io", *(word for command in commands for word in ("-c", command)), *image])


def plain(path: Path, *options: str, size: str = "64M") -> None:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, size)


def written(path: Path, *options: str) -> None:
    plain(path, *options)
    qemu_io(path, "write -P 1 0 1M", "write -P 2 5M 300k", "write -z 8M 128k", "write -P 3 40M 4k", "discard 512k 64k")


def zero_allocated(path: Path) -> None:
    written(path)
    qemu_io(path, "write -z 0 256k")


def with_snapshots(path: Path) -> None:
    written(path)
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 4 128k 256k", "write -P 5 50M 64k")
    qemu_img("snapshot", "-c", "two", path)
    qemu_io(path, "write -P 6 0 64k")


def compressed(path: Path) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(b"".join(random.Random(1).randbytes(20_000) + bytes(45_536) for _ in range(40)))
    qemu_img("convert", "-c", "-O", "qcow2", raw, path)
    qemu_io(path, "write -P 1 64k 64k")


def small_clusters(path: Path) -> None:
    plain(path, "-o", "cluster_size=512,refcount_bits=64", size="256k")
    qemu_io(path, "write -P 1 0 100k", "write -P 2 130k 10k")


def one_bit_refcounts(path: Path) -> None:
    plain(path, "-o", "refcount_bits=1,cluster_size=4k")
    qemu_io(path, "write -P 1 0 1M", "write -P 2 3M 100k")


def preallocated(path: Path) -> None:
    plain(path, "-o", "preallocation=metadata,cluster_size=4k", size="32M")


def extended_l2(path: Path) -> None:
    plain(path, "-o", "extended_l2=on")
    qemu_io(path, "write -P 1 0 100k", "write -P 2 1M 4k", "write -z 64k 2k")


def with_bitmaps(path: Path) -> None:
    written(path)
    qemu_img("bitmap", "--add", path, "first")
    qemu_img("bitmap", "--add", "-g", "64k", path, "second")
    qemu_io(path, "write -P 7 20M 1M")


def with_data_file(path: Path) -> None:
    plain(path, "-o", f"data_file={path.with_suffix('.data')}")
    qemu_io(path, "write -P 1 0 1M", "write -P 2 5M 300k")


def version_2(path: Path) -> None:
    written(path, "-o", "compat=0.10")


def encrypted(path: Path) -> None:
    secret = ("--object", "secret,id=key,data=secret")
    qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", "encrypt.format=luks,encrypt.key-secret=key", path, "4M")


def backed(path: Path) -> None:
    base = path.with_suffix(".base")
    written(base)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, path)
    qemu_io(path, "write -P 9 100k 64k")


RECIPES = [
    plain,
    written,
    zero_allocated,
    with_snapshots,
    compressed,
    small_clusters,
    one_bit_refcounts,
    preallocated,
    extended_l2,
    with_bitmaps,
    with_data_file,
    version_2,
    encrypted,
    backed,
]
Recipe = Callable[[Path], None]


def qemu_check(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and numbers of ``qemu-img check``; no numbers where it could not check."""
    image = [str(path)]
    if options == () and path.stem == "encrypted":
        image = [
            "--object",
            "secret,id=key,data=secret",
            "--image-opts",
            f"driver=qcow2,encrypt.key-secret=key,file.filename={path}",
        ]
    done = judges.run(["qemu-img", "check", "--output=json", *options, *image], check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else {}


NUMBERS = ("corruptions", "leaks", "image-end-offset", "total-clusters", "allocated-clusters", "fragmented-clusters")


def numbers(found: dict[str, Any]) -> dict[str, int]:
    return {key: found.get(key, 0) for key in (*NUMBERS, "compressed-clusters")}


def ours(result: CheckResult) -> dict[str, int]:
    return numbers(result.to_dict())


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    recipe: Recipe = request.param
    path = tmp_path / f"{recipe.__name__}.qcow2"
    recipe(path)
    return path


@pytest.mark.parametrize("made", RECIPES, indirect=True)
def test_images_of_qemu_are_clean_with_the_same_numbers(made: Path) -> None:
    before = made.read_bytes()
    code, theirs = qemu_check(made)
    result = check(made)
    assert (code, result.exit_code) == (0, 0), [str(finding) for finding in result.findings]
    assert ours(result) == numbers(theirs)
    assert made.read_bytes() == before


def bump(image: Scalpel, rng: random.Random) -> str:
    cluster = rng.randrange(len(image.data) // image.header.cluster_bytes)
    count = rng.choice((0, 1, 2, 3)) & image.header.geometry.refcount_max
    image.set_count(cluster, count)
    return f"refcount of cluster {cluster} = {count}"


def flip_copied(image: Scalpel, rng: random.Random) -> str:
    at = _some_l2_entry(image, rng)
    image.put(at, image.word(at) ^ COPIED)
    return f"COPIED at {at:#x}"


def reserved_bit(image: Scalpel, rng: random.Random) -> str:
    at, bit = _some_l2_entry(image, rng), rng.choice((1, 4, 8, 57, 60))
    image.put(at, image.word(at) | 1 << bit)
    return f"bit {bit} at {at:#x}"


def point_past_end(image: Scalpel, rng: random.Random) -> str:
    at = _some_l2_entry(image, rng)
    bits = image.header.cluster_bits
    image.put(at, (len(image.data) >> bits) + rng.choice((0, 1, 2, 1000)) << bits | rng.choice((0, COPIED)))
    return f"past the end at {at:#x}"


def point_elsewhere(image: Scalpel, rng: random.Random) -> str:
    at = _some_l2_entry(image, rng)
    cluster = rng.randrange(1, len(image.data) // image.header.cluster_bytes)
    image.put(at, cluster << image.header.cluster_bits | rng.choice((0, COPIED)))
    return f"entry at {at:#x} to cluster {cluster}"


def misalign(image: Scalpel, rng: random.Random) -> str:
    at = _some_l2_entry(image, rng)
    image.put(at, image.word(at) ^ 1 << 9)
    return f"misaligned at {at:#x}"


def clear_entry(image: Scalpel, rng: random.Random) -> str:
    at = _some_l2_entry(image, rng)
    image.put(at, 0)
    return f"cleared at {at:#x}"


def cut(image: Scalpel, rng: random.Random) -> str:
    length = rng.randrange(len(image.data) * 3 // 4, len(image.data))
    del image.data[length:]
    return f"cut to {length}"


def l1_flag(image: Scalpel, rng: random.Random) -> str:
    at = _some_l1_entry(image, rng)
    image.put(at, image.word(at) ^ COPIED)
    return f"COPIED in L1 at {at:#x}"


def l1_reserved(image: Scalpel, rng: random.Random) -> str:
    at = _some_l1_entry(image, rng)
    image.put(at, image.word(at) | 1 << rng.choice((0, 3, 56, 62)))
    return f"reserved bit in L1 at {at:#x}"


DAMAGES = [
    bump,
    bump,
    flip_copied,
    reserved_bit,
    point_past_end,
    point_elsewhere,
    misalign,
    clear_entry,
    cut,
    l1_flag,
    l1_reserved,
]


def _some_l1_entry(image: Scalpel, rng: random.Random) -> int:
    return image.l1_at(rng.choice([index for index in range(image.header.l1_entries) if image.word(image.l1_at(index))]))


def _some_l2_entry(image: Scalpel, rng: random.Random) -> int:
    """An entry that is allocated, mostly."""
    header = image.header
    tables = [index for index in range(header.l1_entries) if image.word(image.l1_at(index))]
    table = rng.choice(tables)
    first, geometry = image.l2_at(table, 0), header.geometry
    entries = range(first, first + geometry.cluster_bytes, geometry.l2_entry_bytes)
    allocated = [at for at in entries if image.word(at)]
    return rng.choice(allocated or entries)


COMPARED = [written, zero_allocated, with_snapshots, compressed, small_clusters, one_bit_refcounts, version_2, with_bitmaps]


def damages_of(path: Path, seed: int) -> tuple[bytes, str]:
    rng = random.Random(f"{path.stem} {seed}")
    image = Scalpel(path.read_bytes())
    said = []
    for number in range(rng.choice((1, 1, 2, 3))):
        damage = rng.choice(DAMAGES)
        if damage is cut and number:
            continue
        said.append(damage(image, rng))
        if damage is cut:
            break
    return bytes(image.data), ", ".join(said)


def judged_alike(path: Path) -> CheckResult:
    """Check with both; the numbers must agree but for what ``ops.check`` names."""
    code, theirs = qemu_check(path)
    result = check(path)
    if code == 1:
        assert result.report.fatal
        return result
    found, expected = ours(result), numbers(theirs)
    for key in ("image-end-offset", "total-clusters", "allocated-clusters", "compressed-clusters"):
        if not _past_end_compressed(result):
            assert found[key] == expected[key]
    problems = {finding.problem for finding in result.findings}
    if problems & OURS_ONLY or _past_end_compressed(result):
        assert result.exit_code == 2
        return result
    assert found["leaks"] == expected["leaks"], [str(finding) for finding in result.findings]
    assert result.exit_code == code
    # QEMU counts a bad entry once for each snapshot that leads there.
    if theirs.get("corruptions", 0) and path.stem.startswith("with_snapshots"):
        assert 0 < found["corruptions"] <= expected["corruptions"]
    else:
        assert found["corruptions"] == expected["corruptions"], [str(finding) for finding in result.findings]
    return result


OURS_ONLY = {Problem.COPIED_WITHOUT_CLUSTER, Problem.OVERLAP, Problem.SNAPSHOT_TABLE, Problem.BITMAP_DIRECTORY}


def _past_end_compressed(result: CheckResult) -> bool:
    """Compressed data that begins behind the end of the file is readable to QEMU's check where it is short."""
    return any(
        finding.problem is Problem.PAST_END and finding.entry is not None and finding.entry & COMPRESSED
        for finding in result.findings
    )


@pytest.mark.parametrize("made", COMPARED, indirect=True)
def test_damage_is_counted_as_qemu_counts_it(made: Path) -> None:
    damaged = made.with_name(f"{made.stem}-damaged.qcow2")
    for seed in range(12):
        data, said = damages_of(made, seed)
        damaged.write_bytes(data)
        try:
            judged_alike(damaged)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {said}: {error}") from None


@pytest.mark.parametrize("made", COMPARED, indirect=True)
def test_what_we_repair_is_clean_to_qemu(made: Path) -> None:
    damaged = made.with_name(f"{made.stem}-damaged.qcow2")
    for seed in range(12):
        data, said = damages_of(made, seed)
        damaged.write_bytes(data)
        result = check(damaged, repair=Mode.ALL)
        again = judged_alike(damaged)
        assert again.report == result.report, said
        if result.exit_code == 0:
            assert qemu_check(damaged)[0] == 0, said


@pytest.mark.parametrize("made", COMPARED, indirect=True)
def test_what_qemu_repairs_is_judged_alike(made: Path) -> None:
    damaged = made.with_name(f"{made.stem}-damaged.qcow2")
    for seed in range(6):
        data, _ = damages_of(made, seed)
        damaged.write_bytes(data)
        qemu_check(damaged, "-r", "all")
        judged_alike(damaged)


@pytest.mark.parametrize("made", [written, zero_allocated, with_snapshots, compressed, version_2], indirect=True)
@pytest.mark.parametrize("mode", list(Mode))
def test_repair_of_refcounts_and_flags_changes_no_byte_of_the_guest(made: Path, mode: Mode) -> None:
    snapshots = ["one", "two"] if made.stem == "with_snapshots" else []
    repaired = made.with_name("repaired.qcow2")
    for seed in range(4):
        rng = random.Random(seed)
        image = Scalpel(made.read_bytes())
        for damage in (bump, bump, flip_copied, l1_flag):
            damage(image, rng)
        repaired.write_bytes(image.data)
        result = check(repaired, repair=mode)
        assert result.report.clean or mode is Mode.LEAKS
        qemu_img("compare", "-q", made, repaired)
        for snapshot in snapshots:
            one, other = made.with_suffix(".one"), made.with_suffix(".other")
            for source, target in ((made, one), (repaired, other)):
                qemu_img("convert", "-l", f"snapshot.name={snapshot}", "-O", "raw", source, target)
            assert one.read_bytes() == other.read_bytes()


def test_a_dirty_image_of_qemu_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "dirty.qcow2"
    plain(path, "-o", "lazy_refcounts=on")
    judges.run(["qemu-io", "-c", "write -P 1 0 1M", "-c", "flush", "-c", "abort", str(path)], check=False)
    assert check(path).exit_code == 2
    assert judged_alike(path).report.fatal
    assert check(path, repair=Mode.ALL).exit_code == 0
    assert qemu_check(path)[0] == 0
    qemu_io(path, "read -P 1 0 1M")


# The command line


def cowfence(*words: object) -> int:
    return main.entry(["check", *(str(word) for word in words)])


@pytest.fixture
def leaked(tmp_path: Path) -> Path:
    path = tmp_path / "leaked.qcow2"
    written(path)
    image = Scalpel(path.read_bytes())
    image.append(2)
    path.write_bytes(image.data)
    return path


def test_words_and_exit_codes_are_those_of_qemu_img(leaked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = judges.run(["qemu-img", "check", leaked], check=False)
    assert cowfence(leaked) == theirs.returncode == 3
    captured = capsys.readouterr()
    assert captured.out == theirs.stdout
    assert captured.err.startswith("leak: cluster ")
    assert cowfence("-q", leaked) == 3
    assert capsys.readouterr().out == ""
    assert cowfence("-r", "leaks", leaked) == 0
    assert "    2 leaked clusters\n    0 corruptions\n" in capsys.readouterr().out
    theirs = judges.run(["qemu-img", "check", leaked])
    assert cowfence(leaked) == 0
    assert capsys.readouterr().out == theirs.stdout


def test_json(leaked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cowfence("--output=json", leaked) == 3
    found = json.loads(capsys.readouterr().out)
    findings = found.pop("findings")
    assert found == json.loads(judges.run(["qemu-img", "check", "--output=json", leaked], check=False).stdout)
    assert [finding["grade"] for finding in findings] == ["leak", "leak"]
    assert cowfence("-r", "all", "--output=json", leaked) == 0
    assert json.loads(capsys.readouterr().out)["leaks-fixed"] == 2


def test_other_formats_have_no_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    assert cowfence(raw) == judges.run(["qemu-img", "check", raw], check=False).returncode == 63
    assert cowfence("-f", "raw", raw) == 63
    assert cowfence("-f", "qcow2", raw) == judges.run(["qemu-img", "check", "-f", "qcow2", raw], check=False).returncode == 1
    assert "magic" in capsys.readouterr().err
    with pytest.raises(NoCheck):
        check(raw)
    assert cowfence(tmp_path / "missing") == 1


def test_progress_and_shared_images(leaked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cowfence("-p", "-U", leaked) == 3
    assert "(100.00/100%)" in capsys.readouterr().out
    assert cowfence("-U", "-r", "all", leaked) == 1


def test_a_header_that_cannot_be_read_is_an_internal_error(leaked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(leaked.read_bytes())
    data[20:24] = (40).to_bytes(4)
    leaked.write_bytes(data)
    assert cowfence(leaked) == judges.run(["qemu-img", "check", leaked], check=False).returncode == 1
    assert "cluster_bits" in capsys.readouterr().err
    with pytest.raises(CowfenceError):
        check(leaked)
