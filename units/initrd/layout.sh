# shellcheck shell=sh
# Questions about /etc/dualroot.conf and its drop-ins that matter when an initrd is made. Sourced by the hooks of initramfs-tools and of
# dracut. The files are found as dualroot itself finds them: of files with one name, that in the most important directory counts.

# Prints the files, the main file first. $1 goes before every path.
dualroot_files() {
    for dualroot_dir in /etc /run /usr/local/lib /usr/lib; do
        [ -e "$1$dualroot_dir/dualroot.conf" ] || continue
        echo "$1$dualroot_dir/dualroot.conf"
        break
    done
    dualroot_seen=/
    for dualroot_dir in /etc /run /usr/local/lib /usr/lib; do
        for dualroot_file in "$1$dualroot_dir"/dualroot.conf.d/*.conf; do
            [ -e "$dualroot_file" ] || continue
            case $dualroot_seen in */"${dualroot_file##*/}"/*) continue ;; esac
            dualroot_seen=$dualroot_seen${dualroot_file##*/}/
            echo "$dualroot_file"
        done
    done
}

# Whether any of them has a line that matches the pattern $2.
dualroot_says() {
    dualroot_files "$1" | {
        while IFS= read -r dualroot_file; do
            grep -q "$2" "$dualroot_file" && exit 0
        done
        exit 1
    }
}

# Whether dualroot is configured.
dualroot_configured() {
    dualroot_says "${1-}" '^[[:space:]]*\[disk[0-9]'
}

# Whether it is configured for disks that share their root.
dualroot_shared_root() {
    dualroot_configured "${1-}" && ! dualroot_says "${1-}" '^[[:space:]]*root[[:space:]]*=[[:space:]]*[^[:space:]]'
}

# Whether disks share their root, or nothing is configured yet and they may do so later: a clone gets the initrds that exist. A root on
# several devices is not dualroot's until it is configured, unless dualroot-clone is making it one right now.
dualroot_may_share_root() {
    dualroot_shared_root "${1-}" && return 0
    ! dualroot_configured "${1-}" && dualroot_btrfs_root "${1-}" && [ -x "${1-}/usr/bin/btrfs" ] &&
        { [ -e "${1-}/var/lib/dualroot/joining" ] || ! dualroot_several_devices; }
}

# Whether the kernel $2 is always booted with the option $1, so that the initrd can rely on that: by every entry that exists, by those that
# kernel-install(8) will make, and by the running system.
dualroot_boots_with() {
    [ -r "${DUALROOT_ROOT-}/etc/kernel/cmdline" ] || return 1
    for dualroot_file in "${DUALROOT_ROOT-}/etc/kernel/cmdline" "${DUALROOT_ROOT-}/proc/cmdline" \
        "${DUALROOT_ROOT-}/boot/loader/entries"/*.conf "${DUALROOT_ROOT-}/efi/loader/entries"/*.conf; do
        [ -r "$dualroot_file" ] || continue
        case $dualroot_file in
            */entries/*) grep -qF "$2" "$dualroot_file" || continue ;;
        esac
        grep -qE "^([^#]*[[:space:]])?$1[^[:space:]]" "$dualroot_file" || return 1
    done
}

# Whether the running system's root is a btrfs of several devices.
dualroot_several_devices() {
    set -- /sys/fs/btrfs/"$(findmnt -no UUID / 2>/dev/null)"/devinfo/*
    [ $# -gt 1 ]
}

# Whether fstab has a btrfs as the root.
dualroot_btrfs_root() {
    [ -r "${1-}/etc/fstab" ] || return 1
    while read -r dualroot_spec dualroot_place dualroot_type _ || [ -n "$dualroot_spec" ]; do
        case $dualroot_spec in '#'*) continue ;; esac
        [ "$dualroot_place $dualroot_type" = "/ btrfs" ] && return 0
    done <"${1-}/etc/fstab"
    return 1
}
