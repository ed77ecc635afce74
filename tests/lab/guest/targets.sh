# SPDX-License-Identifier: Apache-2.0
# Targets made by hand, without any code of the service, in front of loop
# devices: what connectors are tried against.
#
#   disk NAME BYTES                      a loop device; says its path
#   iscsi NAME DEVICE SERIAL TARGET INITIATOR PASSWORD PORTAL...
#   iscsi-end TARGET                     with its sessions
#   nvme DEVICE UUID NQN HOSTNQN PORTAL...
#   nvme-end NQN
#   end                                  all of it
set -e
lio=/sys/kernel/config/target
nvmet=/sys/kernel/config/nvmet
verb=$1
shift

case $verb in
disk)
    truncate -s "$2" "/run/$1.img"
    old=$(losetup -j "/run/$1.img" -O NAME -n)
    if [ -n "$old" ]; then losetup -c "$old"; echo "$old"
    else losetup -f --show "/run/$1.img"; fi
    ;;
iscsi)
    modprobe -a target_core_mod target_core_iblock iscsi_target_mod iscsi_tcp
    mkdir -p $lio/iscsi
    name=$1 device=$2 serial=$3 target=$4 initiator=$5 password=$6
    shift 6
    store=$lio/core/iblock_9/$name
    if [ ! -d "$store" ]; then    # a volume may have several targets
        mkdir -p "$store"
        echo "udev_path=$device" >"$store/control"
        echo "$serial" >"$store/wwn/vpd_unit_serial"
        echo 1 >"$store/enable"
    fi
    group=$lio/iscsi/$target/tpgt_1
    mkdir -p "$group/lun/lun_0" "$group/acls/$initiator/lun_0"
    ln -s "$store" "$group/lun/lun_0/store"
    ln -s "$group/lun/lun_0" "$group/acls/$initiator/lun_0/lun"
    echo 1 >"$group/attrib/authentication"
    echo -n user >"$group/acls/$initiator/auth/userid"
    echo -n "$password" >"$group/acls/$initiator/auth/password"
    for portal; do mkdir "$group/np/$portal:3260"; done
    echo 1 >"$group/enable"
    ;;
iscsi-end)
    group=$lio/iscsi/$1/tpgt_1
    [ -d "$group" ] || exit 0
    echo 0 >"$group/enable"
    for acl in "$group"/acls/*/; do
        rm "$acl"lun_0/lun
        rmdir "$acl"lun_0 "$acl"
    done
    store=$(readlink -f "$group/lun/lun_0/store")
    rm "$group/lun/lun_0/store"
    rmdir "$group/lun/lun_0"
    for portal in "$group"/np/*/; do rmdir "$portal"; done
    rmdir "$group" "$lio/iscsi/$1"
    rmdir "$store" 2>/dev/null || true
    ;;
nvme)
    modprobe -a nvmet nvmet-tcp nvme-tcp
    device=$1 uuid=$2 nqn=$3 host=$4
    shift 4
    space=$nvmet/subsystems/$nqn/namespaces/1
    mkdir -p "$nvmet/hosts/$host" "$nvmet/subsystems/$nqn"
    mkdir "$space"
    ln -s "$nvmet/hosts/$host" "$nvmet/subsystems/$nqn/allowed_hosts/"
    echo "$device" >"$space/device_path"
    echo "$uuid" >"$space/device_uuid"
    echo "$uuid" >"$space/device_nguid"
    echo 1 >"$space/enable"
    number=90
    for portal; do
        number=$((number + 1))
        port=$nvmet/ports/$number
        if [ ! -d $port ]; then
            mkdir $port
            echo tcp >$port/addr_trtype
            echo ipv4 >$port/addr_adrfam
            echo "$portal" >$port/addr_traddr
            echo 4420 >$port/addr_trsvcid
        fi
        ln -s "$nvmet/subsystems/$nqn" $port/subsystems/
    done
    ;;
nvme-end)
    subsystem=$nvmet/subsystems/$1
    [ -d "$subsystem" ] || exit 0
    for link in $nvmet/ports/9*/subsystems/"$1"; do
        [ -L "$link" ] && rm "$link"
    done
    echo 0 >"$subsystem/namespaces/1/enable"
    rmdir "$subsystem/namespaces/1"
    rm "$subsystem"/allowed_hosts/*
    rmdir "$subsystem"
    ;;
end)
    for target in $lio/iscsi/iqn*; do
        [ -d "$target" ] && bash "$0" iscsi-end "${target##*/}"
    done
    [ -d $lio/core/iblock_9 ] && rmdir $lio/core/iblock_9
    for subsystem in $nvmet/subsystems/nqn*; do
        [ -d "$subsystem" ] && bash "$0" nvme-end "${subsystem##*/}"
    done
    for port in $nvmet/ports/9*; do [ -d "$port" ] && rmdir "$port"; done
    for host in $nvmet/hosts/*; do [ -d "$host" ] && rmdir "$host"; done
    for image in /run/*.img; do
        [ -e "$image" ] || continue
        losetup -j "$image" -O NAME -n | xargs -r losetup -d
        rm "$image"
    done
    true
    ;;
esac
