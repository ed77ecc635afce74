# SPDX-License-Identifier: Apache-2.0
# Says in lines what tests have left in the guest; nothing, if all is gone.
# Volume groups with their thin pools, and portals, are the class's own.
export LC_ALL=C LVM_SUPPRESS_FD_WARNINGS=1
config=/sys/kernel/config

each() {    # KIND: what comes on standard input, a line each
    sed "s/^/$1: /"
}

lvs --noheadings -o vg_name,lv_name,lv_attr 2>/dev/null |
    awk '$3 !~ /^[tTdDe]/ {print $1 "/" $2}' | each volume
iscsiadm -m session 2>/dev/null | each session
iscsiadm -m node 2>/dev/null | each record
ls $config/target/iscsi 2>/dev/null | grep -v '^discovery_auth$\|^lio_version$\|^cpus_allowed_list$' | each target
for hba in $config/target/core/*_*; do
    [ -d "$hba" ] && ls -d "$hba"/*/ 2>/dev/null
done | each backstore
ls $config/nvmet/subsystems 2>/dev/null | each subsystem
for port in $config/nvmet/ports/*/subsystems; do
    [ -d "$port" ] && ls "$port"
done | each exported
ls $config/nvmet/hosts 2>/dev/null | each nvmet-host
for each_controller in /sys/class/nvme-fabrics/ctl/nvme*; do
    [ -d "$each_controller" ] && cat "$each_controller/subsysnqn"
done 2>/dev/null | each controller
dmsetup ls --target multipath 2>/dev/null | grep -v '^No devices' | each multipath
lsblk -nro NAME,TYPE | awk '$1 ~ /^(sd|nvme)/' | each device
findmnt -nro TARGET,SOURCE | awk '$2 ~ /^\/dev\/(sd|nvme|mapper|dm-|vg)/' | each mount
losetup -a | each loop
# A tgtd goes on without targets, as it should.
pgrep -ax vblade | each daemon
pgrep -af 'volume[.]machine|volume[.]agent' | each agent
nft list tables 2>/dev/null | each rules
exportfs 2>/dev/null | each share
exit 0
