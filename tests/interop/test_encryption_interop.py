"""Encrypted images before QEMU and cryptsetup, both ways: contents, key slots, what is said of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowfence
from cowfence.qcow2.header import read_header
from cowfence.storage.file import FileStorage
from helpers_cli import ENVIRONMENT
from helpers_cli import cowfence as command
from judges import run

MIB = 1 << 20
ONE, TWO = "first passphrase", "second passphrase"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    (tmp_path / "one").write_text(ONE)
    (tmp_path / "two").write_text(TWO)
    return tmp_path


def secret(folder: Path, which: str = "one") -> list[str]:
    return ["--object", f"secret,id={which},file={folder / which}"]


def options(path: Path, which: str = "one", driver: str = "qcow2") -> list[str]:
    key = "encrypt.key-secret" if driver == "qcow2" else "key-secret"
    return ["--image-opts", f"driver={driver},{key}={which},file.filename={path}"]


def luks_header(path: Path) -> Path:
    """The LUKS header of a qcow2 image as a file of its own, with some bytes of data behind it."""
    storage = FileStorage.open(path)
    pointer = read_header(storage).encryption
    assert pointer is not None
    buffer = bytearray(pointer.length_bytes)
    storage.readv(pointer.offset, (buffer,))
    storage.close()
    out = path.with_suffix(".header")
    out.write_bytes(bytes(buffer) + bytes(MIB))
    return out


def opens(header: Path, key_file: Path) -> bool:
    words = ["cryptsetup", "open", "--test-passphrase", "--type", "luks1", "--key-file", str(key_file), str(header)]
    return run(words, check=False).returncode == 0


CIPHERS = [
    "",
    "encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    "encrypt.cipher-alg=aes-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64,encrypt.hash-alg=sha512",
    "encrypt.cipher-alg=aes-128,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1",
]


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("maker", ["qemu", "us"])
def test_luks(secrets: Path, maker: str, cipher: str) -> None:
    path, raw = secrets / "disk", secrets / "raw"
    content = bytearray(4 * MIB)
    words = ["-o", ",".join(["encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=10", *filter(None, [cipher])])]
    if maker == "qemu":
        run(["qemu-img", "create", "-q", "-f", "qcow2", *secret(secrets), *words, path, "4M"])
    else:
        command("create", "-q", *secret(secrets), *words, str(path), "4M")
    for form in ("human", "json"):
        assert command("info", "--output", form, str(path)).stdout == run(["qemu-img", "info", f"--output={form}", path]).stdout
    for number in range(3):
        at, value = random.Random(number).randrange(3 * MIB) & ~511, number + 1
        content[at : at + 100_352] = bytes([value]) * 100_352
        run(["qemu-io", *secret(secrets), *options(path), "-c", f"write -P {value} {at} 100352"])
        with cowfence.open(path, writable=True, secret=ONE.encode()) as disk:
            assert disk.read(0, 4 * MIB) == content
            disk.write(at + 77, b"odd bytes")
            content[at + 77 : at + 86] = b"odd bytes"
            disk.zero(at + 50_000, 3000)
            content[at + 50_000 : at + 53_000] = bytes(3000)
    raw.write_bytes(content)
    run(["qemu-img", "compare", *secret(secrets), *options(path), f"driver=raw,file.filename={raw}"])
    run(["qemu-img", "check", *secret(secrets), *options(path)])
    header = luks_header(path)
    dump = run(["cryptsetup", "luksDump", header]).stdout
    assert "Cipher name:   \taes" in dump
    assert "Key Slot 0: ENABLED" in dump
    assert opens(header, secrets / "one")
    assert not opens(header, secrets / "two")


def test_key_slots_go_round(secrets: Path) -> None:
    """Added by us, then by QEMU; erased by QEMU, then by us; cryptsetup agrees each time."""
    path = secrets / "disk"
    command(
        "create",
        "-q",
        *secret(secrets),
        "-o",
        "encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=1",
        str(path),
        "4M",
    )

    def amend(*words: str) -> None:
        command("amend", *secret(secrets), *secret(secrets, "two"), "-o", ",".join(words), str(path))

    def qemu_amend(which: str, *words: str) -> None:
        known = [*secret(secrets), *secret(secrets, "two"), *options(path, which)]
        run(["qemu-img", "amend", *known, "-o", ",".join(words)])

    amend("encrypt.state=active", "encrypt.new-secret=two", "encrypt.iter-time=1")
    assert opens(luks_header(path), secrets / "two")
    run(["qemu-img", "check", *secret(secrets, "two"), *options(path, "two")])
    qemu_amend("two", "encrypt.state=inactive", "encrypt.old-secret=one")
    assert not opens(luks_header(path), secrets / "one")
    done = command("convert", *secret(secrets), "-O", "raw", str(path), str(secrets / "out"), check=False)
    assert (done.returncode, done.stderr) == (1, f"cowfence: {path}: Invalid password, cannot unlock any keyslot\n")
    assert not (secrets / "out").exists()
    qemu_amend("two", "encrypt.state=active", "encrypt.new-secret=one", "encrypt.iter-time=10")
    command("convert", *secret(secrets), "-O", "raw", str(path), str(secrets / "out"))
    amend("encrypt.state=inactive", "encrypt.old-secret=two")
    assert not opens(luks_header(path), secrets / "two")
    run(["qemu-img", "check", *secret(secrets), *options(path)])
    refused = command("amend", *secret(secrets), "-o", "encrypt.state=inactive,encrypt.old-secret=one", str(path), check=False)
    assert refused.returncode == 1
    assert "only active keyslot" in refused.stderr


def test_legacy(secrets: Path) -> None:
    path = secrets / "disk"
    run(
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            *secret(secrets),
            "-o",
            "encrypt.format=aes,encrypt.key-secret=one",
            path,
            "4M",
        ]
    )
    run(["qemu-io", *secret(secrets), *options(path), "-c", "write -P 7 0 100k"])
    with cowfence.open(path, writable=True, secret=ONE.encode()) as disk:
        assert disk.read(0, 102_400) == b"\7" * 102_400
        disk.write(1000, b"\x08" * 1000)
    run(["qemu-io", *secret(secrets), *options(path), "-c", "read -P 8 1000 1000", "-c", "read -P 7 2000 90k"])
    done = command("convert", *secret(secrets), "-O", "raw", str(path), str(secrets / "out"))
    assert "is weak" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    both = [*secret(secrets, "two"), *secret(secrets)]
    guess = command("convert", *both, "-O", "raw", str(path), str(secrets / "guess"), check=False)
    assert guess.returncode == 1
    assert "cannot tell which" in guess.stderr
    assert not (secrets / "guess").exists()
    command("convert", *both, *options(path), "-O", "raw", str(secrets / "named"))
    assert (secrets / "named").read_bytes() == (secrets / "out").read_bytes()
    refused = command(
        "create", *secret(secrets), "-o", "encrypt.format=aes,encrypt.key-secret=one", str(path), "4M", check=False
    )
    assert refused.returncode == 1
    assert "weak" in refused.stderr


def test_converted(secrets: Path) -> None:
    """Plain to encrypted and back, over snapshots of what is allocated ahead."""
    raw, path, back = secrets / "raw", secrets / "disk", secrets / "back"
    raw.write_bytes(random.Random(5).randbytes(MIB) + bytes(MIB) + b"end" * 100 + bytes(212))
    words = ["-o", "encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=1"]
    command("convert", "-f", "raw", "-O", "qcow2", *secret(secrets), *words, str(raw), str(path))
    run(["qemu-img", "compare", *secret(secrets), *options(path), f"driver=raw,file.filename={raw}"])
    run(["qemu-img", "check", *secret(secrets), *options(path)])
    command("convert", *secret(secrets), "-O", "raw", str(path), str(back))
    assert back.read_bytes() == raw.read_bytes()
    refused = command("convert", "-c", "-f", "raw", "-O", "qcow2", *secret(secrets), *words, str(raw), str(path), check=False)
    assert refused.stderr == "cowfence: Compression and encryption not supported at the same time\n"
    command("create", "-q", *secret(secrets), *words, "-o", "preallocation=metadata", str(path), "2M")
    (secrets / "zeros").write_bytes(bytes(2 * MIB))
    run(["qemu-img", "compare", *secret(secrets), *options(path), f"driver=raw,file.filename={secrets / 'zeros'}"])


def test_luks_without_qcow2(secrets: Path) -> None:
    path = secrets / "disk"
    run(["qemu-img", "create", "-q", "-f", "luks", *secret(secrets), "-o", "key-secret=one,iter-time=10", path, "4M"])
    known = [*secret(secrets), *options(path, driver="luks")]
    run(["qemu-io", *known, "-c", "write -P 7 0 100k"])
    with cowfence.open(path, format="luks", writable=True, secret=ONE.encode()) as disk:
        assert disk.size == 4 * MIB
        assert disk.read(0, 102_400) == b"\7" * 102_400
        disk.write(1001, b"\x08" * 1000)
        disk.zero(50_000, 3000)
    run(["qemu-io", *known, "-c", "read -P 8 1001 1000", "-c", "read -P 0 50000 3000", "-c", "read -P 7 53000 1k"])
    command(
        "amend",
        "-f",
        "luks",
        *secret(secrets),
        *secret(secrets, "two"),
        "-o",
        "encrypt.state=active,encrypt.new-secret=two,encrypt.iter-time=1",
        str(path),
    )
    assert opens(path, secrets / "two")
    command("amend", "-f", "luks", *secret(secrets), "-o", "encrypt.state=inactive,encrypt.old-secret=one", str(path))
    assert not opens(path, secrets / "one")
    command("create", "-q", "-u", "-b", "disk", "-F", "luks", str(secrets / "over"), "4M")
    command("convert", *secret(secrets, "two"), "-O", "raw", str(secrets / "over"), str(secrets / "out"))
    assert (secrets / "out").read_bytes()[1001:2001] == b"\x08" * 1000
    lost = command("convert", "-O", "raw", str(secrets / "over"), str(secrets / "no"), check=False)
    assert lost.returncode == 1
    assert "its secret was not given" in lost.stderr


def test_secrets_are_not_taken_from_the_argument_list(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, words = secrets / "disk", ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"]
    for text, what in (
        ("secret,id=s,data=xyz", "shows the secret to everybody"),
        ("secret,id=s,file=/nonexistent", "No such file"),
        ("secret,id=s,env=NOT_THERE", "no environment variable"),
        ("secret,file=one", "'id' is missing"),
        ("secret,id=s,file=one,format=hex", "raw or base64"),
        ("iothread,id=s", "only secrets"),
        ("secret,id=other,env=HOME", "No secret with id 's'"),
    ):
        done = command("create", "--object", text, *words, str(path), "1M", check=False)
        assert done.returncode == 1, text
        assert what in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not path.exists()
    monkeypatch.setitem(ENVIRONMENT, "DISK_SECRET", "Zmlyc3QgcGFzc3BocmFzZQ==")
    command("create", "-q", "--object", "secret,id=s,env=DISK_SECRET,format=base64", *words, str(path), "1M")
    assert opens(luks_header(path), secrets / "one")
