# shellcheck shell=sh
# Completes a copy to this disk that was interrupted among its last renames, before any program of the root starts. Sourced in the initrd, as
# degraded.sh is, but only where each disk has a root of its own.

# $1: the mount point of the root, with /usr mounted below. If this fails, the boot continues, and dualroot-complete.service tries again.
dualroot_complete() {
    [ -e "$1/.dualroot" ] || [ -e "$1/usr/.dualroot" ] || return 0
    "${DUALROOT_ROOT-}/usr/lib/dualroot/dualroot-complete" --root="$1" 2>&1 | while IFS= read -r dualroot_line; do
        # A line without a level: the program was not even started.
        case $dualroot_line in
            "<"[0-7]">"*) ;;
            *) dualroot_line="<3>$dualroot_line" ;;
        esac
        # The kernel refuses longer records.
        printf '%.900s\n' "${dualroot_line%%>*}>dualroot-complete: ${dualroot_line#*>}" >>"${DUALROOT_ROOT-}/dev/kmsg"
    done
    return 0
}
