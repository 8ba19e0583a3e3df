# shellcheck shell=sh
# A shared btrfs root with a disk missing: wait for the disk, not for ever, and mount without it. Sourced in the initrd, where
# /bin/sh may be busybox, dash or bash, and little else is there. DUALROOT_ROOT goes before every path: tests set it.

# One line in the kernel's log. $1: its level, $2: the text.
dualroot_say() {
    echo "<$1>dualroot: $2" >>"${DUALROOT_ROOT-}/dev/kmsg"
}

# dualroot.degraded-timeout= of the kernel's command line, or 15.
dualroot_patience() {
    dualroot_found=15
    read -r dualroot_line <"${DUALROOT_ROOT-}/proc/cmdline"
    for dualroot_word in $dualroot_line; do
        case $dualroot_word in
            dualroot.degraded-timeout=*) dualroot_found=${dualroot_word#*=} ;;
        esac
    done
    case $dualroot_found in
        '' | *[!0-9]* | ??????*)
            dualroot_say 4 "dualroot.degraded-timeout= is not a number of seconds, taking 15"
            dualroot_found=15
            ;;
    esac
    echo "$dualroot_found"
}

# Seconds since the kernel was started.
dualroot_now() {
    read -r dualroot_line <"${DUALROOT_ROOT-}/proc/uptime"
    echo "${dualroot_line%%.*}"
}

# What is done between two looks; callers may have more to do.
dualroot_pause() {
    sleep 1
}

# Waits for the devices of the btrfs file system that the device $1 belongs to. Fails when one is still missing at the end, and only
# then: what can't be told counts as nothing missing.
dualroot_whole() {
    dualroot_limit=$(dualroot_patience)
    [ "$dualroot_limit" -gt 0 ] || return 0
    modprobe -q btrfs 2>/dev/null
    # Without the module, nothing would ever be ready.
    [ -d "${DUALROOT_ROOT-}/sys/fs/btrfs" ] || return 0
    dualroot_limit=$(($(dualroot_now) + dualroot_limit))
    # By default, udev makes devices known to the kernel; here it doesn't matter if it does.
    btrfs device scan >/dev/null 2>&1
    until btrfs device ready "$1" >/dev/null 2>&1; do
        if [ "$(dualroot_now)" -ge "$dualroot_limit" ]; then
            return 1
        fi
        dualroot_pause
        btrfs device scan >/dev/null 2>&1
    done
}

# Prepares for a mount without the missing devices. $1: the UUID of the file system.
dualroot_degrade() {
    case $1 in
        '' | *[!0-9a-f-]*)
            dualroot_say 3 "the btrfs root lacks a disk, but its UUID can't be read; not mounting it degraded"
            return 1
            ;;
    esac
    mkdir -p "${DUALROOT_ROOT-}/run/udev/rules.d" "${DUALROOT_ROOT-}/run/dualroot"
    # udev's own rule has kept the devices that are there from being used. Mounts of other subvolumes would still wait for them.
    echo 'SUBSYSTEM=="block", ENV{ID_FS_UUID}=="'"$1"'", ENV{ID_BTRFS_READY}=="0", ENV{SYSTEMD_READY}="1"' \
        >"${DUALROOT_ROOT-}/run/udev/rules.d/65-dualroot.rules"
    # For dualroot-sync, which keeps it until the disk is back.
    read -r dualroot_line <"${DUALROOT_ROOT-}/proc/sys/kernel/random/boot_id"
    printf 'uuid=%s\nboot=%s\n' "$1" "$dualroot_line" >"${DUALROOT_ROOT-}/run/dualroot/degraded"
    dualroot_say 4 "a disk of the btrfs root $1 is missing, mounting it degraded: what is written now is on one disk only"
}
