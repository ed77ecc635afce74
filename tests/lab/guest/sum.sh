# SPDX-License-Identifier: Apache-2.0
# Says what the noise on the device $1 sums up to, as the device has it now.
set -e
target=$(mktemp -d /mnt/lab.XXXXXX)
blockdev --flushbufs "$1"
e2fsck -fn "$1" >/dev/null
mount -o ro "$1" "$target"
sha256sum <"$target/data"
umount "$target"
rmdir "$target"
