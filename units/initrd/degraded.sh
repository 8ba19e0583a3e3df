# shellcheck shell=sh
# Mounts a shared btrfs root that lacks a disk, after waiting for the disk for a while. Sourced in the initrd, where /bin/sh may be busybox,
# dash or bash, and there are few other programs. DUALROOT_ROOT goes before every path: tests set it.

# If each half is written without the other, one after the other, btrfs silently loses the writes to one of them when they meet again. A half
# alone can't tell that the other was written, but both boot with the same firmware. It keeps this variable from the first mount without a
# disk until that disk is healed: the UUID of the file system and, each after a blank, the UUIDs of the devices that are up to date.
dualroot_variable=DualrootAlone-5e3df885-f0ed-4d14-bd72-a97d06c0619f
dualroot_file=${DUALROOT_ROOT-}/sys/firmware/efi/efivars/$dualroot_variable

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
            dualroot_say 4 "dualroot.degraded-timeout= is not a number of seconds; using 15"
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

# Waits between two tries; callers may replace it to do more.
dualroot_pause() {
    sleep 1
}

# Waits for all devices of the btrfs file system that the device $1 belongs to. Fails only if one is still missing at the end; where that
# can't be told, none counts as missing.
dualroot_whole() {
    dualroot_limit=$(dualroot_patience)
    [ "$dualroot_limit" -gt 0 ] || return 0
    modprobe -q btrfs 2>/dev/null
    # Without the module, no device would ever be ready.
    [ -d "${DUALROOT_ROOT-}/sys/fs/btrfs" ] || return 0
    dualroot_limit=$(($(dualroot_now) + dualroot_limit))
    # udev usually makes the devices known to the kernel; this does it in any case.
    btrfs device scan >/dev/null 2>&1
    until btrfs device ready "$1" >/dev/null 2>&1; do
        if [ "$(dualroot_now)" -ge "$dualroot_limit" ]; then
            return 1
        fi
        dualroot_pause
        btrfs device scan >/dev/null 2>&1
    done
}

# Prints the variable; nothing if it doesn't exist or makes no sense.
dualroot_recorded() {
    # By cat, because the shell reads byte by byte and efivarfs asks the firmware at each read. Shells drop NULs, so one of the four bytes of
    # attributes is left.
    # shellcheck disable=SC2002
    cat "$dualroot_file" 2>/dev/null | {
        IFS= read -r dualroot_line
        dualroot_line=${dualroot_line#?}
        case $dualroot_line in
            *[!0-9a-f\ -]*) ;;
            *) printf '%s' "$dualroot_line" ;;
        esac
    }
}

# Writes $1 to the variable.
dualroot_record() {
    # efivarfs makes variables that the kernel doesn't know immutable.
    [ ! -e "$dualroot_file" ] || chattr -i "$dualroot_file" 2>/dev/null
    # The attributes (non-volatile, accessible by boot services and at run time), then the value. It has to be a single write.
    { printf '\007\000\000\000%s' "$1" >"$dualroot_file"; } 2>/dev/null
    [ "$(dualroot_recorded)" = "$1" ]
}

# Fails if the devices that are here, of the btrfs with the UUID $1, are older than its missing ones. If not, records in the variable that the
# missing ones are older from now on. If the variable can't be read or written, the boot continues, because that matters more. Firmware
# replaces a variable as a whole, so one that makes no sense is no interrupted record, and tells nothing.
dualroot_ahead() {
    modprobe -q efivarfs 2>/dev/null
    # It may be mounted already.
    mount -t efivarfs -o nosuid,nodev,noexec efivarfs "${dualroot_file%/*}" 2>/dev/null
    dualroot_here=
    # Without blkid's cache, which may list devices that were here before.
    for dualroot_word in $(blkid -c /dev/null -t "UUID=$1" -s UUID_SUB -o value); do
        dualroot_here="$dualroot_here $dualroot_word"
    done
    if [ -z "$dualroot_here" ]; then
        dualroot_say 4 "the UUIDs of the btrfs root's devices can't be read, so it is unknown whether the missing disk is newer; continuing"
        return 0
    fi
    # A device that appeared only now is in the list, and has to be in the mount.
    btrfs device scan >/dev/null 2>&1

    dualroot_was=$(dualroot_recorded)
    case $dualroot_was in
        "$1 "[0-9a-f]*)
            # The up-to-date devices that are here: with more than two disks, that may be some of them.
            dualroot_full=
            for dualroot_word in ${dualroot_was#* }; do
                case "$dualroot_here " in
                    *" $dualroot_word "*) dualroot_full="$dualroot_full $dualroot_word" ;;
                esac
            done
            ;;
        *)
            dualroot_full=$dualroot_here
            if [ -s "$dualroot_file" ] && [ -z "$dualroot_was" ]; then
                dualroot_say 4 "the EFI variable $dualroot_variable can't be read, or makes no sense; ignoring it"
            fi
            ;;
    esac
    if [ -z "$dualroot_full" ]; then
        # The option names the devices that are given up, so that it has no effect later if it stays on the command line.
        dualroot_word=${dualroot_was#* }
        dualroot_word=dualroot.give-up=${dualroot_word%%-*}
        read -r dualroot_line <"${DUALROOT_ROOT-}/proc/cmdline"
        case " $dualroot_line " in
            *" $dualroot_word "*) ;;
            *)
                dualroot_say 3 "not mounting the btrfs root $1: the missing disk was written while this one was away. Put it back;\
 or, if it is lost for good, give its data up: add $dualroot_word to the kernel's command line (key e in the boot menu) once"
                return 1
                ;;
        esac
        dualroot_say 4 "$dualroot_word: giving up the missing disk's data; wipe that disk (wipefs -a) before you put it back"
        dualroot_full=$dualroot_here
    fi
    if [ "$dualroot_was" != "$1$dualroot_full" ] && ! dualroot_record "$1$dualroot_full"; then
        dualroot_say 4 "the EFI variable $dualroot_variable can't be written: if the missing disk is booted alone later, data that is\
 written now is lost"
    fi
}

# Prepares for a mount without the missing devices. $1: the UUID of the file system.
dualroot_degrade() {
    case $1 in
        '' | *[!0-9a-f-]*)
            dualroot_say 3 "the btrfs root lacks a disk, but its UUID can't be read; not mounting it degraded"
            return 1
            ;;
    esac
    dualroot_ahead "$1" || return 1
    mkdir -p "${DUALROOT_ROOT-}/run/udev/rules.d" "${DUALROOT_ROOT-}/run/dualroot"
    # udev's own rule marks the devices that are there as not ready, and mounts of other subvolumes would still wait for them.
    echo 'SUBSYSTEM=="block", ENV{ID_FS_UUID}=="'"$1"'", ENV{ID_BTRFS_READY}=="0", ENV{SYSTEMD_READY}="1"' \
        >"${DUALROOT_ROOT-}/run/udev/rules.d/65-dualroot.rules"
    # For dualroot-sync, which keeps it until the disk is back.
    read -r dualroot_line <"${DUALROOT_ROOT-}/proc/sys/kernel/random/boot_id"
    printf 'uuid=%s\nboot=%s\n' "$1" "$dualroot_line" >"${DUALROOT_ROOT-}/run/dualroot/degraded"
    dualroot_say 4 "a disk of the btrfs root $1 is missing; mounting it degraded: data that is written now is on one disk only"
}
