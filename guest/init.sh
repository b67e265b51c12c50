#!/bin/busybox sh
# The guest's first process. The kernel hands it `writers` (count), `first` (first serial of each, with commas) and `slots` as
# environment variables. The kernel's own messages go to the first serial port, reports to the second.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs devtmpfs /dev
report=/dev/ttyS1
echo booted >$report

leave() {
    echo "$1" >$report
    # Without a sync: nothing is to reach the disk that the writers did not wait for.
    poweroff -n -f
}

for module in /modules/*.ko; do
    insmod "$module" || leave "broken insmod $module"
done
tries=0
while [ ! -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -le 100 ] || leave "broken no disk"
    sleep 0.1
done
mount -t ext4 -o discard,errors=remount-ro /dev/vda /disk || leave "broken mount"
echo mounted >$report

writer=0
while [ $writer -lt "$writers" ]; do
    serial=${first%%,*}
    first=${first#*,}
    mkdir -p /disk/w$writer && sync /disk || leave "broken mkdir"
    sh /writer.sh /disk/w$writer $writer "$serial" 99999999 /content.awk "$slots" >$report 2>/dev/ttyS0 &
    writer=$((writer + 1))
done
wait
leave ended
