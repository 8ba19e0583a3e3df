#!/bin/sh
# In an initrd with systemd, the mount of a btrfs root that lacks a disk waits for ever, because udev doesn't call the other devices ready.
# Adds "degraded" to the mount's options, and makes udev probe the devices again.

. "${DUALROOT_ROOT-}/usr/lib/dualroot/degraded.sh"

# The mount unit comes from root= on the kernel's command line, or from the discovery of partitions.
device=$(systemctl show --property=What --value sysroot.mount)
case $device in
    /dev/*) ;;
    *) exit 0 ;;
esac
# Waits until the root, or one of its devices, is there; systemd has a time-out for that.
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
