# SPDX-License-Identifier: Apache-2.0
# Makes the guest as it was when it was booted, whatever tests have left.
export LC_ALL=C LVM_SUPPRESS_FD_WARNINGS=1
exec >/dev/null 2>&1
config=/sys/kernel/config

nft flush ruleset
pkill -KILL -f 'volume[.]machine|volume[.]agent'
findmnt -nro TARGET,SOURCE | awk '$2 ~ /^\/dev\/(sd|nvme|mapper|dm-|vg)/ {print $1}' | tac |
    while read -r target; do umount -l "$target"; done
multipath -F
systemctl stop multipathd.socket multipathd
iscsiadm -m node --logoutall=all
iscsiadm -m node -o delete
for iface in $(iscsiadm -m iface | awk '{print $1}' | grep -v '^default$\|^iser$'); do
    iscsiadm -m iface -I "$iface" -o delete
done
nvme disconnect-all
ls $config/target/iscsi $config/target/core | grep -q '^iqn\|^iblock_\|^fileio_' && targetcli clearconfig confirm=True
for subsystem in $config/nvmet/ports/*/subsystems/*; do rm "$subsystem"; done
for namespace in $config/nvmet/subsystems/*/namespaces/*; do echo 0 >"$namespace/enable"; rmdir "$namespace"; done
for host in $config/nvmet/subsystems/*/allowed_hosts/*; do rm "$host"; done
rmdir $config/nvmet/subsystems/* $config/nvmet/ports/* $config/nvmet/hosts/*
pkill -KILL -x 'tgtd|vblade'
exportfs -ua
systemctl stop nfs-server
rm -rf /var/lib/volume-node
losetup -D
dmsetup ls --target delay | awk '{print $1}' | while read -r name; do dmsetup remove "$name"; done
for group in $(vgs --noheadings -o vg_name); do vgremove -ff -y "$group"; done
dmsetup remove_all --force
wipefs -qaf /dev/disk/by-id/virtio-lab?
# No byte of the last class is there for the next one.
for disk in /dev/disk/by-id/virtio-lab?; do blkdiscard -f "$disk"; done
udevadm settle
true
