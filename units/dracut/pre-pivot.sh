#!/bin/sh
# Sourced by dracut, with systemd or without, once the root and /usr are mounted. By its name it comes after dracut's mount-usr.sh, and
# before selinux-loadpolicy.sh, which reads the root.

. "${DUALROOT_ROOT-}/usr/lib/dualroot/complete.sh"

# shellcheck disable=SC2154 # NEWROOT is dracut's
dualroot_complete "$NEWROOT"
