# SPDX-License-Identifier: Apache-2.0
# Puts volume-connect of the checkout $1 into the guest, for the service $2;
# with the entry points of the checkout, which is not installed there.
site=/run/volume-connect
mkdir -p $site/volume_service-0.dist-info
printf 'Metadata-Version: 2.1\nName: volume-service\nVersion: 0\n' \
    >$site/volume_service-0.dist-info/METADATA
sed -n '/^volume.connectors =/,/^$/{s/^volume.connectors =/[volume.connectors]/;s/^ *//;p}' \
    "$1/setup.cfg" >$site/volume_service-0.dist-info/entry_points.txt
cat >/usr/local/bin/volume-connect <<END
#!/bin/sh
export PYTHONPATH=$1:$site PYTHONPYCACHEPREFIX=/var/cache/volume-node
export VOLUME_URL=$2
exec python3 -m volume.cli.connect "\$@"
END
chmod 755 /usr/local/bin/volume-connect
