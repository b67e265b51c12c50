#!/usr/bin/env bash
# The judges are other people's programs that our tests hold us against. Installs the missing ones where that is possible
# (as root, with apt-get; COWFENCE_NO_INSTALL=1 forbids it), else says which are missing: their tests are then skipped, by name.
set -euo pipefail

PATH="$PATH:/usr/sbin:/sbin"

# program:Debian package
judges=(
  qemu-img:qemu-utils qemu-io:qemu-utils qemu-nbd:qemu-utils
  nbdinfo:libnbd-bin nbdcopy:libnbd-bin
  nbdkit:nbdkit
  nbdsh:python3-libnbd
  fio:fio
  mkfs.ext4:e2fsprogs
  cryptsetup:cryptsetup-bin
  chromium:chromium chromedriver:chromium-driver
)

missing_programs=()
missing_packages=()
look() {
  missing_programs=()
  missing_packages=()
  local judge
  for judge in "${judges[@]}"; do
    if ! command -v "${judge%%:*}" >/dev/null; then
      missing_programs+=("${judge%%:*}")
      [[ " ${missing_packages[*]-} " == *" ${judge#*:} "* ]] || missing_packages+=("${judge#*:}")
    fi
  done
}

look
if [[ ${#missing_packages[@]} -gt 0 && $(id -u) -eq 0 && -z ${COWFENCE_NO_INSTALL:-} ]] && command -v apt-get >/dev/null; then
  echo "judges: installing ${missing_packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing_packages[@]}" >/dev/null; }; then
    echo "judges: apt-get failed" >&2
  fi
  look
fi
if [[ ${#missing_programs[@]} -gt 0 ]]; then
  echo "judges: missing ${missing_programs[*]} (Debian packages: ${missing_packages[*]}); tests that need them are skipped" >&2
fi
