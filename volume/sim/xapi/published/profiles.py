# SPDX-License-Identifier: Apache-2.0
"""The servers that the simulator can be: release, SR types, habits.

A profile says which release of the datamodel answers, which SR types there
are and what each can do, and by switches how the server behaves where
releases differ or where the facts are not known for certain. Any profile can
be given further types by its name: ``xcp-ng-8.3+netapp+equal``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from volume.sim.xapi.published import smtypes

# Drivers of every server between sm 1.9 and today.
CORE = (
    'ext', 'file', 'hba', 'iso', 'lvm', 'lvmoiscsi', 'lvmohba', 'nfs',
    'iscsi', 'shm', 'smb', 'udev',
)

@dataclasses.dataclass(frozen=True)
class Switch:
    """One habit: what it is unless a profile or a test says otherwise."""

    default: Any
    help: str


SWITCHES: dict[str, Switch] = {
    'bare_addresses': Switch(
        False, 'host.address and HOST_IS_SLAVE name an address without a '
        'port; host N listens on 127.0.0.N, all on one port'),
    'data_destroy_wait_s': Switch(
        4, 'how long VDI.data_destroy waits for VBDs to go'),
    'detach_delay_s': Switch(
        0.1, 'how long after the end of a transfer the temporary VBD of '
        'the control domain is still there'),
    'detach_timeout_s': Switch(
        0.2, 'how long VBD.unplug waits for a guest that does not let go'),
    'iscsi_claims': Switch(
        False, '`iscsi` introduces LUNs unmanaged and VDI.create claims '
        'them, as before sm 1.10; since then nothing can be claimed'),
    'json_int_strings': Switch(
        False, '[I] JSON-RPC has integers as strings, as XML-RPC has'),
    'qcow2': Switch(
        False, 'a VDI beyond 2040 GiB is made as qcow2, and sm_config may '
        'ask for one'),
    'smb_licence': Switch(
        True, 'without it SR.create of `smb` is refused'),
    'spaced_xml': Switch(
        False, 'XML of drivers in Python 2: each text stands on a line of '
        'its own, between tabs'),
    'still_booting': Switch(
        False, 'every call answers HOST_STILL_BOOTING'),
    'zeroes_unsent': Switch(
        False, '[I] imports and copies make zero what they do not carry, on '
        'disks of every kind; otherwise on raw ones of LVM alone'),
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """One kind of server."""

    name: str
    title: str
    release: str
    product_version: str
    product_brand: str
    sm: Mapping[str, smtypes.SmType]
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def switch(self, name: str) -> Any:
        """Return how this server does it."""
        return self.switches.get(name, SWITCHES[name].default)


def xenserver_65() -> Profile:
    """Return the last server whose `iscsi` claimed LUNs.

    Its arrays were gone already; they are kept here since no other public
    list of capabilities is nearer to the servers that had them.
    """
    return Profile(
        name='xenserver-6.5',
        title='XenServer 6.5 (with the array types of 6.2)',
        release='creedence',
        product_version='6.5.0',
        product_brand='XenServer',
        sm={
            **smtypes.published(smtypes.OLD),
            **smtypes.modelled('netapp', 'equal', 'cslg'),
        },
        switches={'iscsi_claims': True, 'spaced_xml': True},
    )


def xenserver_76() -> Profile:
    """Return the server of 2018: drivers of today, and those gone since."""
    return Profile(
        name='xenserver-7.6',
        title='XenServer 7.6',
        release='lima',
        product_version='7.6.0',
        product_brand='XenServer',
        sm={
            **smtypes.published(smtypes.XCPNG, *CORE, 'lvmofcoe'),
            **smtypes.published(smtypes.OLD, 'rawhba'),
            **smtypes.modelled('gfs2'),
        },
    )


def xenserver_8() -> Profile:
    """Return XenServer 8; it is updated all the time, this is one of them.

    [I] Which release its updates bring is not known for certain.
    """
    return Profile(
        name='xenserver-8',
        title='XenServer 8',
        release='25.6.0',
        product_version='8.4.0',
        product_brand='XenServer',
        sm={
            **smtypes.published(smtypes.HEAD, *CORE),
            **smtypes.modelled('gfs2'),
        },
    )


def xcp_ng_83() -> Profile:
    """Return XCP-ng 8.3 with qcow2, which came in May 2026.

    `rawhba` is a package that its users still install.
    """
    return Profile(
        name='xcp-ng-8.3',
        title='XCP-ng 8.3, updated to May 2026',
        release='25.6.0',
        product_version='8.3.0',
        product_brand='XCP-ng',
        sm=smtypes.with_formats({
            **smtypes.published(smtypes.XCPNG),
            **smtypes.published(smtypes.OLD, 'rawhba'),
        }),
        switches={'qcow2': True},
    )


def head() -> Profile:
    """Return the development head: newer than anything deployed."""
    return Profile(
        name='head',
        title='xen-api and sm at their heads, August 2026',
        release='26.17.0',
        product_version='26.17.0',
        product_brand='XenServer',
        sm=smtypes.published(smtypes.HEAD),
    )


PROFILES: dict[str, Profile] = {
    profile.name: profile for profile in (
        xenserver_65(), xenserver_76(), xenserver_8(), xcp_ng_83(), head(),
    )
}
# Types that a name may add to any profile.
EXTRA: dict[str, smtypes.SmType] = {
    **smtypes.published(smtypes.OLD, 'rawhba'),
    **smtypes.modelled('netapp', 'equal'),
}


def find(name: str) -> Profile:
    """Return a profile by its name, with the types that the name adds."""
    base, *more = name.split('+')
    if base not in PROFILES:
        raise ValueError(
            f'no profile {base!r}; there are {", ".join(PROFILES)}'
        )
    unknown = [kind for kind in more if kind not in EXTRA]
    if unknown:
        raise ValueError(
            f'profile {name!r} adds {", ".join(unknown)}; a name can add '
            f'{", ".join(EXTRA)}'
        )
    profile = PROFILES[base]
    return dataclasses.replace(
        profile, name=name,
        sm={**profile.sm, **{kind: EXTRA[kind] for kind in more}},
    )
