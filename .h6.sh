set -e
modprobe target_core_mod iscsi_target_mod 2>/dev/null || modprobe -a target_core_mod iscsi_target_mod iscsi_tcp nvme-tcp nvmet-tcp dm-multipath
mount | grep -q configfs || mount -t configfs none /sys/kernel/config
ip addr add 10.1.0.1/32 dev lo 2>/dev/null || true
ip addr add 10.1.0.2/32 dev lo 2>/dev/null || true
truncate -s 256M /root/v1.img
targetcli /backstores/fileio create v1 /root/v1.img 256M
echo 11111111-2222-4333-8444-555555555555 | tr -d - > /sys/kernel/config/target/core/fileio_0/v1/wwn/vpd_unit_serial
I=iqn.2010-10.org.openstack:volume-11111111-2222-4333-8444-555555555555.aaaaaaaa-2222-4333-8444-555555555555
targetcli /iscsi create $I
targetcli /iscsi/$I/tpg1/portals delete 0.0.0.0 3260
targetcli /iscsi/$I/tpg1/portals create 10.1.0.1
targetcli /iscsi/$I/tpg1/portals create 10.1.0.2
targetcli /iscsi/$I/tpg1/luns create /backstores/fileio/v1
IN=$(sed -n s/InitiatorName=//p /etc/iscsi/initiatorname.iscsi)
targetcli /iscsi/$I/tpg1/acls create $IN
targetcli /iscsi/$I/tpg1 set attribute authentication=1
targetcli /iscsi/$I/tpg1/acls/$IN set auth userid=u1 password=passwordpassword
systemctl start iscsid
