# SPDX-License-Identifier: Apache-2.0
# Puts the agent of the checkout $1 where the service asks for it. What Python
# compiles stays in the guest.
cat >/usr/local/bin/volume-node <<END
#!/bin/sh
export PYTHONPATH=$1 PYTHONPYCACHEPREFIX=/var/cache/volume-node
exec python3 -m volume.remote.agent "\$@"
END
chmod 755 /usr/local/bin/volume-node
# It shall be there after a power cut.
sync -f /usr/local/bin/volume-node
