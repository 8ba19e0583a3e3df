#!/bin/sh
# In an initrd with systemd: its mount of a btrfs root of which a disk is missing waits for ever, because udev doesn't call the devices
# that are there ready. Adds "degraded" to the mount's options, and has udev look at the devices again.

. "${DUALROOT_ROOT-}/usr/lib/dualroot/degraded.sh"

# Whatever made the mount unit: root= on the kernel's command line, or the discovery of partitions.
device=$(systemctl show --property=What --value sysroot.mount)
case $device in
    /dev/*) ;;
    *) exit 0 ;;
esac
# Until the root, or a part of it, is there: that has a time-out of its own.
until [ -e "${DUALROOT_ROOT-}$device" ] && type=$(blkid -p -s TYPE -o value "${DUALROOT_ROOT-}$device"); do
    dualroot_pause
done
[ "$type" = btrfs ] || exit 0

dualroot_whole "$device" && exit 0
uuid=$(blkid -p -s UUID -o value "${DUALROOT_ROOT-}$device")
dualroot_degrade "$uuid" || exit 1
options=$(systemctl show --property=Options --value sysroot.mount | sed 's/%/%%/g')
mkdir -p "${DUALROOT_ROOT-}/run/systemd/system/sysroot.mount.d"
printf '[Mount]\nOptions=%s\n' "${options:+$options,}degraded" \
    >"${DUALROOT_ROOT-}/run/systemd/system/sysroot.mount.d/50-dualroot.conf"
systemctl daemon-reload
udevadm control --reload
udevadm trigger --action=change --subsystem-match=block --property-match="ID_FS_UUID=$uuid"
