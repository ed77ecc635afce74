# SPDX-License-Identifier: Apache-2.0
# Gives each portal an address on an interface of its own, so that the way to
# one can be cut and the others go on.
modprobe dummy numdummies=0
number=0
for address in "$@"; do
    number=$((number + 1))
    ip link show "portal$number" >/dev/null 2>&1 ||
        ip link add "portal$number" type dummy
    ip address replace "$address/32" dev "portal$number"
    ip link set "portal$number" up
done
