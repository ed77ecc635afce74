# SPDX-License-Identifier: Apache-2.0
"""A new pool: its hosts, their control domains, one network, the types."""

from __future__ import annotations

from typing import Final, TYPE_CHECKING

from volume.sim.xapi.published.datamodel import ROLES

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

MEMORY_BYTES: Final = 32 << 30
DOM0_BYTES: Final = 2 << 30


def fill(pool: Pool, name: str, hosts: int) -> None:
    """Make the rows of a pool that was never there before."""
    rows = pool.rows
    network = rows.new(
        'network', name_label='Pool-wide network associated with eth0',
        bridge='xenbr0',
    )
    made = [_host(pool, name, at, network) for at in range(hosts)]
    rows.new('pool', name_label=name, master=made[0])
    for label in ROLES:
        rows.new('role', name_label=label)
    for kind in pool.profile.sm.values():
        record = kind.record()
        fields = pool.model.fields('SM')
        rows.new('SM', **{
            name: value for name, value in record.items() if name in fields
        })


def _host(pool: Pool, name: str, at: int, network: str) -> str:
    rows, profile = pool.rows, pool.profile
    metrics = rows.new(
        'host_metrics', memory_total=MEMORY_BYTES,
        memory_free=MEMORY_BYTES - DOM0_BYTES, live=True,
        last_updated=pool.now(),
    )
    label = f'{name}-host-{at + 1}'
    host = rows.new(
        'host', name_label=label, hostname=label, enabled=True,
        metrics=metrics, edition='free', API_version_major=2,
        API_version_minor=21, API_version_vendor='XenSource',
        software_version=_version(pool), capabilities=['xen-3.0-x86_64'],
        iscsi_iqn=f'iqn.2016-04.com.example:{name}-{at + 1}',
        other_config={'iscsi_iqn': f'iqn.2016-04.com.example:{name}-{at + 1}'},
        license_params={'restrict_cbt': 'false', 'sku_type': 'free'},
        cpu_info={'cpu_count': '4', 'vendor': profile.product_brand},
    )
    domain = rows.new(
        'VM', name_label=f'Control domain on host: {label}',
        is_control_domain=True, power_state='Running', domid=0,
        resident_on=host, affinity=host, memory_static_max=DOM0_BYTES,
        memory_dynamic_max=DOM0_BYTES, memory_dynamic_min=DOM0_BYTES,
        VCPUs_max=2, VCPUs_at_startup=2, domain_type='pv',
    )
    rows.update('host', host, control_domain=domain)
    rows.new(
        'PIF', device='eth0', network=network, host=host, physical=True,
        management=True, MAC=f'02:00:00:00:00:{at + 1:02x}', MTU=1500,
        VLAN=-1, ip_configuration_mode='Static', netmask='255.0.0.0',
    )
    return host


def _version(pool: Pool) -> dict[str, str]:
    profile = pool.profile
    release = profile.release
    return {
        'product_version': profile.product_version,
        'product_brand': profile.product_brand,
        'platform_name': 'XCP',
        'platform_version': '3.4.0',
        'xapi': release if release[0].isdigit() else '1.0',
        'hostname': 'localhost',
        'build_number': 'simulated',
    }


def readdress(pool: Pool, host: str, address: str, ip: str) -> None:
    """Say where a host listens, as it starts."""
    pool.rows.update('host', host, address=address)
    for pif in pool.rows.find('PIF', host=host):
        pool.rows.update('PIF', pif, IP=ip)


