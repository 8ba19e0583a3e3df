# shellcheck shell=sh
# A copy to this disk that was cut among its last renames: completed before anything of the root is started. Sourced in the initrd, as
# degraded.sh is, but only where each disk has a root of its own.

# $1: where the root is mounted, and with it /usr. Whatever happens, the boot goes on: dualroot-complete.service tries again.
dualroot_complete() {
    [ -e "$1/.dualroot" ] || [ -e "$1/usr/.dualroot" ] || return 0
    "${DUALROOT_ROOT-}/usr/lib/dualroot/dualroot-complete" --root="$1" 2>&1 | while IFS= read -r dualroot_line; do
        # Without a level: the program was not even started.
        case $dualroot_line in
            "<"[0-7]">"*) ;;
            *) dualroot_line="<3>$dualroot_line" ;;
        esac
        # The kernel refuses longer records.
        printf '%.900s\n' "${dualroot_line%%>*}>dualroot-complete: ${dualroot_line#*>}" >>"${DUALROOT_ROOT-}/dev/kmsg"
    done
    return 0
}
