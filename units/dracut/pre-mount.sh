#!/bin/sh
# In an initrd without systemd: sourced by dracut before it mounts the root with the options in $rflags.

. "${DUALROOT_ROOT-}/usr/lib/dualroot/degraded.sh"

# shellcheck disable=SC2154 # root is dracut's
case $root in
    block:*)
        dualroot_device=${root#block:}
        if [ "$(blkid -p -s TYPE -o value "$dualroot_device")" = btrfs ] && ! dualroot_whole "$dualroot_device" &&
            dualroot_degrade "$(blkid -p -s UUID -o value "$dualroot_device")"; then
            rflags="${rflags:+$rflags,}degraded"
        fi
        ;;
esac
