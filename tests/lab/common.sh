# SPDX-License-Identifier: Apache-2.0
# Shared by the lab's scripts (build, up, run, reset, down, check); sourced,
# not run.
#
# Every setting can be given in the environment:
#   LAB_DIR           where the image and the state of the running lab live;
#                     by default .lab in the checkout
#   LAB_STATE         where the state lives, if elsewhere: so several guests
#                     may run at a time, each with its own, from one image
#   LAB_SUITE         Debian release of the guest
#   LAB_ROOT_SIZE     virtual size of the guest's root disk (the file is sparse)
#   LAB_MEM           guest memory in MiB
#   LAB_CPUS          guest processors (each is one host thread under TCG)
#   LAB_ACCEL         QEMU accelerator; "kvm" where the host really has one
#   LAB_CPU           CPU model. The plain one boots twice as fast under TCG as
#                     "max" (vector code is slow to emulate); take Nehalem if a
#                     wheel asks for x86-64-v2
#   LAB_DISKS         number of empty scratch disks (/dev/disk/by-id/virtio-labN)
#   LAB_DISK_SIZE     virtual size of each scratch disk (the files are sparse)
#   LAB_SSH_PORT      port on 127.0.0.1 that leads to the guest's sshd;
#                     "auto" takes a free one
#   LAB_CHECKOUT      host folder that the guest sees under the same path
#   LAB_BOOT_TIMEOUT  seconds that `up` and `reset` wait for the guest's sshd
#   LAB_CONNECT_TIMEOUT  seconds that one connection to it may take
#   LAB_APPEND        more words for the kernel's command line, for example
#                     nvme_core.multipath=Y (the last one of a name counts)

LAB_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB_DIR=${LAB_DIR:-$(cd "$LAB_HOME/../.." && pwd)/.lab}
LAB_SUITE=${LAB_SUITE:-bookworm}
LAB_ROOT_SIZE=${LAB_ROOT_SIZE:-6G}
LAB_MEM=${LAB_MEM:-3072}
LAB_CPUS=${LAB_CPUS:-2}
LAB_ACCEL=${LAB_ACCEL:-tcg,thread=multi,tb-size=512}
LAB_CPU=${LAB_CPU:-qemu64}
LAB_DISKS=${LAB_DISKS:-4}
LAB_DISK_SIZE=${LAB_DISK_SIZE:-4G}
LAB_SSH_PORT=${LAB_SSH_PORT:-auto}
LAB_BOOT_TIMEOUT=${LAB_BOOT_TIMEOUT:-180}
LAB_CONNECT_TIMEOUT=${LAB_CONNECT_TIMEOUT:-20}

IMAGE_DIR=$LAB_DIR/image    # what `build` makes; read-only afterwards
# What `up` makes and `down` removes; with `up --keep`, the disks stay.
STATE_DIR=${LAB_STATE:-$LAB_DIR/state}

NO_PACKAGES=3                # how `build` ends if there are none to be had

say() { printf 'lab: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# True when the process $1 has not ended. Not every machine has somebody who
# takes leave of the dead, so one that has may still have its number.
running() { grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status"; }

# True when the process recorded in the pid file $1 has not ended.
alive() { [ -s "$1" ] && running "$(cat "$1")"; }

# ssh into the running guest. The master connection that `up` opens saves the
# key exchange on each later call. The guest's key was read out of its image,
# so it is known before the first connection.
lab_ssh() {
    ssh -q -F none -i "$STATE_DIR/id_ed25519" -p "$(cat "$STATE_DIR/ssh-port")" \
        -o BatchMode=yes -o IdentitiesOnly=yes -o StrictHostKeyChecking=yes \
        -o UserKnownHostsFile="$STATE_DIR/known_hosts" \
        -o GlobalKnownHostsFile=/dev/null -o ConnectTimeout="$LAB_CONNECT_TIMEOUT" \
        -o ServerAliveInterval=15 -o ServerAliveCountMax=8 \
        -o ControlPath="$STATE_DIR/ssh.sock" root@127.0.0.1 "$@"
}

# Waits until the guest takes commands, then makes ready what a boot does not:
# one lasting connection that later calls reuse, the shared folder, the time.
await_guest() {
    local deadline=$((SECONDS + LAB_BOOT_TIMEOUT)) patience=4 q=/
    [ ! -s "$STATE_DIR/virtiofsd.pid" ] || q=$(printf %q "$(cat "$STATE_DIR/checkout")")
    # On a busy machine the first that succeeds does not mean that the next
    # one does. Who asks before the guest is there waits in vain: so at first
    # for a short time only.
    until {
        LAB_CONNECT_TIMEOUT=$patience lab_ssh true && { [ -S "$STATE_DIR/ssh.sock" ] || lab_ssh -M -N -f -o ServerAliveCountMax=40 9>&- </dev/null >/dev/null; } &&
            lab_ssh "mountpoint -q $q || { mkdir -p $q && mount -t virtiofs checkout $q; } && date -u -s @$(date +%s)"
    } >/dev/null 2>&1; do
        alive "$STATE_DIR/qemu.pid" || { say "the guest ended"; return 1; }
        [ $((deadline - SECONDS)) -gt $((LAB_BOOT_TIMEOUT - 60)) ] || patience=$LAB_CONNECT_TIMEOUT
        [ $SECONDS -lt $deadline ] || { say "no ssh within $LAB_BOOT_TIMEOUT s"; return 1; }
        sleep 0.3
    done
}
