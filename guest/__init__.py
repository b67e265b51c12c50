"""The real-guest crash test: a Linux kernel writes files over ``cowfence serve``, the server is killed, nothing is lost.

What is promised is what a program inside the guest was promised: ``fsync`` of a file and of its directory returned (and of the
file once more; ``writer.sh`` says why). Writers inside the guest rewrite numbered files on ext4 and report ``synced WRITER
SERIAL`` over a serial port after that only. The path of a write is the real one: page cache, ext4 and its journal, virtio-blk,
QEMU's NBD client, our server, the qcow2 file.

A round: boot, write, SIGKILL (the server, or the server and QEMU) at a random moment, then reopen and judge. Rounds go on with
the same image, so that it ages.

| file | job |
|---|---|
| ``content.py``, ``content.awk`` | what a file holds, by its writer and serial: for the judge, and for the guest |
| ``console.py`` | from lines of the serial port to promises |
| ``judge.py`` | promises against the image |
| ``modules.py``, ``initramfs.py``, ``fetch.py`` | the guest's kernel and its first file system, from Debian's packages |
| ``init.sh``, ``writer.sh`` | what runs inside the guest |
| ``disks.py`` | the images under test, and the commands that look at them |
| ``machine.py`` | the server and the virtual machine as processes that can be killed |
| ``rounds.py``, ``screen.py``, ``__main__.py`` | the run, and how it is shown |
"""
