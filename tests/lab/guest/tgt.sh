# SPDX-License-Identifier: Apache-2.0
# Says what targets there are at each tgtd, whoever started it.
for pid in $(pgrep -x tgtd); do
    socket=$(tr '\0' '\n' <"/proc/$pid/environ" | sed -n 's/^TGT_IPC_SOCKET=//p')
    port=$(tr '\0' '\n' <"/proc/$pid/cmdline" | sed -n '/^-C$\|^--control-port$/{n;p}')
    TGT_IPC_SOCKET=$socket tgtadm ${port:+-C "$port"} --lld iscsi --mode target --op show
done
exit 0
