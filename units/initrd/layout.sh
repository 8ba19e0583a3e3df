# shellcheck shell=sh
# What /etc/dualroot.conf and its drop-ins say, as far as it matters when an initrd is made. Sourced by the hooks of initramfs-tools
# and of dracut. It finds the files as dualroot itself does: of one name, the most important directory's counts.

# The files, most important main file first. $1 goes before every path.
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
