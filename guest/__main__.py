"""``python -m guest``: the real-guest crash test. Exit code 0: every promise was kept. 1: one was not. 2: it could not run."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

from cowfence.units import format_size
from guest.disks import DISK_BYTES, LAYOUTS, OVERLAY_CLUSTER_BYTES, make
from guest.fetch import Missing, fetch, install_programs
from guest.machine import accelerator
from guest.rounds import KILLS, WRITERS, Plan, Round, run_rounds
from guest.screen import Screen, as_json

WORK = Path("guest-work")

_WHAT = {
    "plain": f"ext4 on a qcow2 image of {format_size(DISK_BYTES)}",
    "overlay": f"ext4 on a qcow2 base of {format_size(DISK_BYTES)}, under an overlay of {OVERLAY_CLUSTER_BYTES}-byte clusters",
}


def main() -> int:
    arguments = _parse()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    screen = Screen(sys.stderr if arguments.json else sys.stdout)
    screen.title("cowfence under a real guest: kill the server in mid-write, lose nothing whose fsync returned")
    layouts = LAYOUTS if arguments.layout == "both" else (arguments.layout,)
    done: list[tuple[str, Round]] = []
    try:
        installed = install_programs()
        if installed:
            screen.fact("installed", " ".join(installed))
        guest = fetch(WORK / "cache")
        accel = arguments.accel if arguments.accel != "auto" else accelerator(guest, WORK / "probe.log")
        screen.fact("guest", f"Linux {guest.release} ({accel}), ext4 over virtio-blk, {WRITERS} writers")
        plan = Plan(guest, accel, arguments.cache, arguments.writes)
        runs = WORK / "run"
        shutil.rmtree(runs, ignore_errors=True)
        for layout in layouts:
            screen.begin(layout, _WHAT[layout])
            # A layout has its own random numbers: its rounds are the same with and without the other.
            rng = random.Random(f"{seed} {layout}")
            kills = [KILLS[number % 2] if arguments.kill == "mixed" else arguments.kill for number in range(arguments.rounds)]
            for ended in run_rounds(plan, make(layout, runs / layout), kills, rng):
                done.append((layout, ended))
                screen.round(ended)
    except Missing as missing:
        print(f"guest: {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("guest: interrupted", file=sys.stderr)
        return 2
    good = not any(ended.found.problems for _, ended in done)
    screen.verdict([ended for _, ended in done], seed, good=good)
    if good and not arguments.keep:
        shutil.rmtree(runs)
    else:
        screen.fact("images", str(runs))
    if arguments.json:
        print(json.dumps({"seed": seed, "good": good, "rounds": [as_json(*each) for each in done]}, indent=2))
    return 0 if good else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m guest", description="The real-guest crash test of cowfence serve.")
    parser.add_argument("--rounds", type=_positive, default=5, help="boots and kills in each layout (default: 5)")
    parser.add_argument("--seed", type=int, help="chooses the moments of the kills (default: at random, and shown)")
    parser.add_argument("--layout", choices=(*LAYOUTS, "both"), default="both", help="the image under test (default: both)")
    parser.add_argument(
        "--kill", choices=(*KILLS, "mixed"), default="mixed", help="the server, or server and QEMU (default: in turn)"
    )
    parser.add_argument("--writes", type=_positive, default=800, help="at most, before a kill (default: 800)")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="of QEMU (default: kvm if it boots)")
    parser.add_argument(
        "--cache",
        choices=("writeback", "writethrough", "unsafe"),
        default="writeback",
        help="of the server; with unsafe the test must fail (default: writeback)",
    )
    parser.add_argument("--json", action="store_true", help="the facts as JSON on stdout, the screen on stderr")
    parser.add_argument("--keep", action="store_true", help=f"leave the images in {WORK}/run")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1_000_000):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 to 999999")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
