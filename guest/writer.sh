#!/bin/sh
# One writer inside the guest: writes serial after serial and reports each on standard output once it is durable. It ends at the
# first error. Which file, in which manner and how long follows from writer and serial alone; content.py says the same.
# usage: writer.sh DIRECTORY WRITER FIRST_SERIAL LAST_SERIAL CONTENT_AWK SLOTS
directory=$1 writer=$2 serial=$3 last=$4 program=$5 slots=$6

# Writes the content to a file and returns after its fsync, which must be on the descriptor that wrote: an error shows only there.
write() {
    awk -v "writer=$writer" -v "serial=$serial" -v "lines=$lines" -f "$program" |
        dd "of=$1" bs=64k iflag=fullblock "conv=$2" status=none
}

# Makes the file's name durable too. After the directory the file again: on ext4, fsync of a directory answers "done" when there
# is nothing to commit, even where a commit that another process had begun failed and took this change with it (seen with Linux
# 6.1 when the server died, with any server). That of a file sends a flush to the disk, which fails then.
settle() {
    sync "$directory" && sync "$file"
}

while [ "$serial" -le "$last" ]; do
    slot=$((serial % slots))
    stage=$((serial / slots + slot))
    lines=$((1 + (writer * 104729 + slot * 7919 + (stage + 1) / 3 * 15485863) % 251))
    file=$directory/f$slot
    case $((stage % 3)) in
        0) rm -f "$file" && write "$file" fsync ;;
        1) write "$file" notrunc,fsync ;;
        2) write "$directory/new" fsync && mv -f "$directory/new" "$file" ;;
    esac && settle || {
        echo "failed $writer $serial"
        exit 1
    }
    echo "synced $writer $serial"
    serial=$((serial + 1))
done
