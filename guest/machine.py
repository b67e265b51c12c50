"""The server and the virtual machine: two processes, each of which can be killed at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from guest.console import Console, Promises
from guest.content import SLOTS
from guest.fetch import Guest, Missing, program

_MEMORY_MIB = 192
_PROBE_SECONDS = 10.0


def accelerator(guest: Guest, kernel_log: Path) -> str:
    """``kvm`` where a guest really boots with it, else ``tcg``: a nested KVM may be there and not be able to run a kernel."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    machine = Machine(guest, "kvm", None, Console(Promises(0)), kernel_log)
    booted = machine.wait_for(lambda console: console.booted, _PROBE_SECONDS)
    machine.kill()
    machine.wait()
    return "kvm" if booted else "tcg"


class Server:
    """``cowfence serve`` on a Unix socket; ``cache`` is its option."""

    def __init__(self, image: Path, socket: Path, cache: str) -> None:
        socket.unlink(missing_ok=True)
        words = ["serve", str(image), "--socket", str(socket), "--cache", cache]
        self._process = subprocess.Popen([sys.executable, "-m", "cowfence.cli.main", *words], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise Missing("the server did not start; its message is above")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def wait(self) -> None:
        """Until the process is gone."""
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Machine:
    """QEMU with the guest, its disk at the server's socket (None: without a disk), its reports fed to a console."""

    def __init__(self, guest: Guest, accel: str, socket: Path | None, console: Console, kernel_log: Path) -> None:
        self.console = console
        self._changed = threading.Condition()
        self._ended = False
        first = ",".join(str(last + 1) for last in console.promises.last)
        said = f"console=ttyS0 loglevel=4 panic=-1 writers={console.promises.writers} first={first} slots={SLOTS}"
        words = ["-accel", accel, "-m", str(_MEMORY_MIB), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
        words += ["-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", said]
        words += ["-serial", f"file:{kernel_log}", "-serial", "stdio"]
        if socket is not None:
            uri = f"nbd+unix:///?socket={quote(str(socket))}"
            words += ["-drive", f"file={uri},format=raw,if=virtio,cache=writeback,discard=unmap"]
        self._process = subprocess.Popen(
            [program("qemu-system-x86_64"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.messages = b""
        self._readers = [threading.Thread(target=self._read_reports), threading.Thread(target=self._read_messages)]
        for reader in self._readers:
            reader.start()

    def wait_for(self, reached: Callable[[Console], bool], seconds: float) -> bool:
        """Until the console shows it. False: the machine ended before, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or reached(self.console), seconds)
            return reached(self.console)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def wait(self) -> None:
        """Until the process is gone and all that it had reported is taken in."""
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def _read_reports(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                # A line cut off by the death of the machine promises nothing.
                if line.endswith(b"\n"):
                    with self._changed:
                        self.console.feed(line.decode("ascii", "replace"))
                        self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read_messages(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            self.messages = stream.read()
