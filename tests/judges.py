"""The programs that judge us: found here, run here, and skipped by name where they are not installed.

In CI (``CI=true``) a missing judge is a failure, so that a suite never passes because its judges stayed at home.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

DEBIAN_PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdkit": "nbdkit",
    "nbdsh": "python3-libnbd",
    "nbdfuse": "libnbd-bin",
    "fio": "fio",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "cryptsetup": "cryptsetup-bin",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
}
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def require(name: str) -> str:
    """The path of a judge; without it the test is skipped (in CI: fails) with the Debian package to install."""
    package = DEBIAN_PACKAGES[name]
    path = shutil.which(name, path=_PATH)
    if path is None:
        reason = f"{name} is not installed (Debian: apt-get install {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


# QEMU times its key derivation by the CPU clock of its thread, and gives up when that did not move between two readings.
NOT_ITS_FAULT = "Unable to get accurate CPU usage"
TRIES = 60


def run(
    argv: Sequence[str | os.PathLike[str]], *, check: bool = True, stdin: str = "", timeout_seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a judge, named as in ``DEBIAN_PACKAGES``, in the C locale. With ``check`` an exit code but 0 fails the test."""
    command = [require(str(argv[0])), *(str(argument) for argument in argv[1:])]
    for _ in range(TRIES):
        result = subprocess.run(
            command,
            check=False,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env={**os.environ, "LC_ALL": "C"},
        )
        if result.returncode == 0 or NOT_ITS_FAULT not in result.stderr:
            break
    if check and result.returncode != 0:
        pytest.fail(f"{' '.join(map(str, argv))}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
    return result
