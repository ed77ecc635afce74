# SPDX-License-Identifier: Apache-2.0
# Makes a file system on the device $1, writes $2 MiB of noise through it, and
# says what they sum up to.
set -e
target=$(mktemp -d /mnt/lab.XXXXXX)
mkfs.ext4 -q -F -E nodiscard "$1"
mount "$1" "$target"
dd if=/dev/urandom of="$target/data" bs=1M count="$2" status=none
sync -f "$target"
sha256sum <"$target/data"
umount "$target"
rmdir "$target"
