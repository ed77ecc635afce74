# SPDX-License-Identifier: Apache-2.0
"""What the tools print, as they printed it: only its line breaks are ours.

LVM 2.03.16 and thin-provisioning-tools 0.9.0 on Debian 12, in the lab.
``GROUP`` is a full report about a group with a thin pool, a thin and a thick
volume with a snapshot each, and one that only has a name like ours. The
others are what ``pvs --all --foreign --shared`` says while a copy of the
group's disk is there (``COPY``), while two groups have one name (``TWINS``),
and when the group belongs to another machine (``FOREIGN``). ``DELTA`` and
``DUMP`` are about volume 1 and its snapshot 2: of 20 blocks the first two
were discarded since, 5 and 6 written, and 50 and 51 are new.
"""

GROUP = '''
{ "report": [ { "vg": [ { "vg_name": "rec-vg", "vg_uuid":
"MJctqa-6LbO-3p6Y-gwsb-2Zr6-oRf0-XAcved", "vg_seqno": "12", "vg_size":
"4290772992", "vg_free": "4173332480", "vg_extent_size": "4194304",
"vg_mda_size": "1044480", "vg_mda_free": "516608", "vg_missing_pv_count": "0"
} ], "pv": [ { "pv_name": "/dev/vdd", "pv_uuid":
"e96r6u-DDdn-DaAr-4IRj-7nMR-DQfi-C3sGiv", "pv_missing": "" } ], "lv": [ {
"lv_name": "pool", "lv_uuid": "WGaGCp-b6aD-Mb4G-4Mg8-nyIu-h0aE-mjCmix",
"lv_size": "67108864", "lv_tags": "", "lv_role": "private", "lv_layout":
"thin,pool", "lv_active": "active", "lv_device_open": "open", "lv_suspended":
"", "lv_permissions": "writeable", "lv_health_status": "", "lv_check_needed":
"", "lv_snapshot_invalid": "unknown", "lv_when_full": "error",
"lv_metadata_size": "4194304", "lv_skip_activation": "", "origin": "",
"origin_size": "", "pool_lv": "", "data_percent": "0.00", "metadata_percent":
"10.94" }, { "lv_name": "snap-11111111-1111-4111-8111-111111111111",
"lv_uuid": "d6tFfw-XEwx-0tfm-2DA1-CFEU-CI26-hcJNpB", "lv_size": "20971520",
"lv_tags":
"of:33333333-3333-4333-8333-333333333333,snapshot:11111111-1111-4111-8111-111111111111",
"lv_role": "public,snapshot,thicksnapshot", "lv_layout": "linear",
"lv_active": "active", "lv_device_open": "", "lv_suspended": "",
"lv_permissions": "read-only", "lv_health_status": "", "lv_check_needed":
"unknown", "lv_snapshot_invalid": "", "lv_when_full": "", "lv_metadata_size":
"", "lv_skip_activation": "skip activation", "origin":
"volume-33333333-3333-4333-8333-333333333333", "origin_size": "16777216",
"pool_lv": "", "data_percent": "0.00", "metadata_percent": "" }, { "lv_name":
"snap-22222222-2222-4222-8222-222222222222", "lv_uuid":
"RFCKri-dAMp-jKIY-9fVP-hY37-btyD-Wud2Ia", "lv_size": "16777216", "lv_tags":
"of:11111111-1111-4111-8111-111111111111,snapshot:22222222-2222-4222-8222-222222222222",
"lv_role": "public,snapshot,thinsnapshot", "lv_layout": "thin,sparse",
"lv_active": "", "lv_device_open": "unknown", "lv_suspended": "unknown",
"lv_permissions": "read-only", "lv_health_status": "", "lv_check_needed":
"unknown", "lv_snapshot_invalid": "unknown", "lv_when_full": "",
"lv_metadata_size": "", "lv_skip_activation": "skip activation", "origin":
"volume-11111111-1111-4111-8111-111111111111", "origin_size": "", "pool_lv":
"pool", "data_percent": "", "metadata_percent": "" }, { "lv_name":
"volume-11111111-1111-4111-8111-111111111111", "lv_uuid":
"285XEj-ADLG-krH3-mWY2-4MUx-6aTF-uhP3ea", "lv_size": "16777216", "lv_tags":
"note:0:eJyrVspLzE1VslJKSUxSqgUAHi4EZQ==,volume:11111111-1111-4111-8111-111111111111",
"lv_role": "public,origin,thinorigin", "lv_layout": "thin,sparse",
"lv_active": "", "lv_device_open": "unknown", "lv_suspended": "unknown",
"lv_permissions": "unknown", "lv_health_status": "", "lv_check_needed":
"unknown", "lv_snapshot_invalid": "unknown", "lv_when_full": "",
"lv_metadata_size": "", "lv_skip_activation": "skip activation", "origin": "",
"origin_size": "", "pool_lv": "pool", "data_percent": "", "metadata_percent":
"" }, { "lv_name": "volume-22222222-2222-4222-8222-222222222222", "lv_uuid":
"0HqK65-jxUD-s1Fs-Ood8-AxtS-FIGU-X7bvJx", "lv_size": "4194304", "lv_tags": "",
"lv_role": "public", "lv_layout": "linear", "lv_active": "active",
"lv_device_open": "", "lv_suspended": "", "lv_permissions": "writeable",
"lv_health_status": "", "lv_check_needed": "unknown", "lv_snapshot_invalid":
"unknown", "lv_when_full": "", "lv_metadata_size": "", "lv_skip_activation":
"", "origin": "", "origin_size": "", "pool_lv": "", "data_percent": "",
"metadata_percent": "" }, { "lv_name":
"volume-33333333-3333-4333-8333-333333333333", "lv_uuid":
"dRGVGg-zgH9-eGSb-dT6n-tIXV-liLt-dNnhEz", "lv_size": "16777216", "lv_tags":
"volume:33333333-3333-4333-8333-333333333333", "lv_role":
"public,origin,thickorigin", "lv_layout": "linear", "lv_active": "active",
"lv_device_open": "", "lv_suspended": "", "lv_permissions": "writeable",
"lv_health_status": "", "lv_check_needed": "unknown", "lv_snapshot_invalid":
"unknown", "lv_when_full": "", "lv_metadata_size": "", "lv_skip_activation":
"skip activation", "origin": "", "origin_size": "16777216", "pool_lv": "",
"data_percent": "", "metadata_percent": "" } ], "pvseg": [], "seg": [ {
"lv_uuid": "0HqK65-jxUD-s1Fs-Ood8-AxtS-FIGU-X7bvJx", "zero": "unknown",
"thin_id": "", "seg_pe_ranges": "/dev/vdd:27-27" }, { "lv_uuid":
"285XEj-ADLG-krH3-mWY2-4MUx-6aTF-uhP3ea", "zero": "zero", "thin_id": "1",
"seg_pe_ranges": "" }, { "lv_uuid": "RFCKri-dAMp-jKIY-9fVP-hY37-btyD-Wud2Ia",
"zero": "zero", "thin_id": "2", "seg_pe_ranges": "" }, { "lv_uuid":
"WGaGCp-b6aD-Mb4G-4Mg8-nyIu-h0aE-mjCmix", "zero": "zero", "thin_id": "",
"seg_pe_ranges": "pool_tdata:0-15" }, { "lv_uuid":
"d6tFfw-XEwx-0tfm-2DA1-CFEU-CI26-hcJNpB", "zero": "unknown", "thin_id": "",
"seg_pe_ranges": "/dev/vdd:22-26" }, { "lv_uuid":
"dRGVGg-zgH9-eGSb-dT6n-tIXV-liLt-dNnhEz", "zero": "unknown", "thin_id": "",
"seg_pe_ranges": "/dev/vdd:18-21" } ] } ] }
'''

COPY = '''
{ "report": [ { "pv": [ { "pv_name": "/dev/mapper/copy", "pv_uuid":
"e96r6u-DDdn-DaAr-4IRj-7nMR-DQfi-C3sGiv", "pv_missing": "", "pv_duplicate":
"duplicate", "vg_name": "rec-vg", "vg_uuid":
"MJctqa-6LbO-3p6Y-gwsb-2Zr6-oRf0-XAcved", "vg_lock_type": "", "vg_systemid":
"", "vg_exported": "" }, { "pv_name": "/dev/vda", "pv_uuid": "", "pv_missing":
"", "pv_duplicate": "", "vg_name": "", "vg_uuid": "", "vg_lock_type": "",
"vg_systemid": "", "vg_exported": "" }, { "pv_name": "/dev/vdb", "pv_uuid":
"VxOysr-k7cU-b4Mr-KySG-MmQ6-J5mV-HedYqr", "pv_missing": "", "pv_duplicate":
"", "vg_name": "vg-thintest", "vg_uuid":
"PFiUwe-dQw7-iFAi-zzxR-SrHN-dOID-tSwYWg", "vg_lock_type": "", "vg_systemid":
"", "vg_exported": "" }, { "pv_name": "/dev/vdc", "pv_uuid":
"06NI2w-nSq0-VOsx-I6Gh-x3qe-v8Z7-auj7Hc", "pv_missing": "", "pv_duplicate":
"", "vg_name": "vg-thintest", "vg_uuid":
"PFiUwe-dQw7-iFAi-zzxR-SrHN-dOID-tSwYWg", "vg_lock_type": "", "vg_systemid":
"", "vg_exported": "" }, { "pv_name": "/dev/vdd", "pv_uuid":
"e96r6u-DDdn-DaAr-4IRj-7nMR-DQfi-C3sGiv", "pv_missing": "", "pv_duplicate":
"", "vg_name": "rec-vg", "vg_uuid": "MJctqa-6LbO-3p6Y-gwsb-2Zr6-oRf0-XAcved",
"vg_lock_type": "", "vg_systemid": "", "vg_exported": "" }, { "pv_name":
"/dev/vde", "pv_uuid": "", "pv_missing": "", "pv_duplicate": "", "vg_name":
"", "vg_uuid": "", "vg_lock_type": "", "vg_systemid": "", "vg_exported": "" }
] } ] }
'''

TWINS = '''
{ "report": [ { "pv": [ { "pv_name": "/dev/vda", "pv_uuid": "", "pv_missing":
"", "pv_duplicate": "", "vg_name": "", "vg_uuid": "", "vg_lock_type": "",
"vg_systemid": "", "vg_exported": "" }, { "pv_name": "/dev/vdb", "pv_uuid":
"VxOysr-k7cU-b4Mr-KySG-MmQ6-J5mV-HedYqr", "pv_missing": "", "pv_duplicate":
"", "vg_name": "vg-thintest", "vg_uuid":
"PFiUwe-dQw7-iFAi-zzxR-SrHN-dOID-tSwYWg", "vg_lock_type": "", "vg_systemid":
"", "vg_exported": "" }, { "pv_name": "/dev/vdc", "pv_uuid":
"06NI2w-nSq0-VOsx-I6Gh-x3qe-v8Z7-auj7Hc", "pv_missing": "", "pv_duplicate":
"", "vg_name": "vg-thintest", "vg_uuid":
"PFiUwe-dQw7-iFAi-zzxR-SrHN-dOID-tSwYWg", "vg_lock_type": "", "vg_systemid":
"", "vg_exported": "" }, { "pv_name": "/dev/vdd", "pv_uuid":
"e96r6u-DDdn-DaAr-4IRj-7nMR-DQfi-C3sGiv", "pv_missing": "", "pv_duplicate":
"", "vg_name": "rec-vg", "vg_uuid": "MJctqa-6LbO-3p6Y-gwsb-2Zr6-oRf0-XAcved",
"vg_lock_type": "", "vg_systemid": "", "vg_exported": "" }, { "pv_name":
"/dev/vde", "pv_uuid": "e2pa5C-cvlV-2bcF-qyiI-2Ciz-65a9-qJexQI", "pv_missing":
"", "pv_duplicate": "", "vg_name": "rec-vg", "vg_uuid":
"5QTIX0-dEB3-w64y-YkU0-01lL-DqBQ-6Sfu1t", "vg_lock_type": "", "vg_systemid":
"", "vg_exported": "" } ] } ] }
'''

FOREIGN = '''
{ "report": [ { "pv": [ { "pv_name": "/dev/vda", "pv_uuid": "", "pv_missing":
"", "pv_duplicate": "", "vg_name": "", "vg_uuid": "", "vg_lock_type": "",
"vg_systemid": "", "vg_exported": "" }, { "pv_name": "/dev/vdb", "pv_uuid":
"VxOysr-k7cU-b4Mr-KySG-MmQ6-J5mV-HedYqr", "pv_missing": "", "pv_duplicate":
"", "vg_name": "vg-thintest", "vg_uuid":
"PFiUwe-dQw7-iFAi-zzxR-SrHN-dOID-tSwYWg", "vg_lock_type": "", "vg_systemid":
"", "vg_exported": "" }, { "pv_name": "/dev/vdc", "pv_uuid":
"06NI2w-nSq0-VOsx-I6Gh-x3qe-v8Z7-auj7Hc", "pv_missing": "", "pv_duplicate":
"", "vg_name": "vg-thintest", "vg_uuid":
"PFiUwe-dQw7-iFAi-zzxR-SrHN-dOID-tSwYWg", "vg_lock_type": "", "vg_systemid":
"", "vg_exported": "" }, { "pv_name": "/dev/vdd", "pv_uuid":
"e96r6u-DDdn-DaAr-4IRj-7nMR-DQfi-C3sGiv", "pv_missing": "", "pv_duplicate":
"", "vg_name": "rec-vg", "vg_uuid": "MJctqa-6LbO-3p6Y-gwsb-2Zr6-oRf0-XAcved",
"vg_lock_type": "", "vg_systemid": "other-host", "vg_exported": "" }, {
"pv_name": "/dev/vde", "pv_uuid": "e2pa5C-cvlV-2bcF-qyiI-2Ciz-65a9-qJexQI",
"pv_missing": "", "pv_duplicate": "", "vg_name": "", "vg_uuid": "",
"vg_lock_type": "", "vg_systemid": "", "vg_exported": "" } ] } ] }
'''

DELTA = '''
<superblock uuid="" time="1" transaction="2" data_block_size="128"
 nr_data_blocks="0">
  <diff left="2" right="1">
    <left_only begin="0" length="2"/>
    <same begin="2" length="3"/>
    <different begin="5" length="2"/>
    <same begin="7" length="13"/>
    <right_only begin="50" length="2"/>
  </diff>
</superblock>
'''.strip()

DUMP = '''
<superblock uuid="" time="1" transaction="2" flags="0" version="2"
 data_block_size="128" nr_data_blocks="0">
  <device dev_id="1" mapped_blocks="20" transaction="0" creation_time="0"
   snap_time="1">
    <range_mapping origin_begin="2" data_begin="2" length="3" time="0"/>
    <range_mapping origin_begin="5" data_begin="20" length="2" time="1"/>
    <range_mapping origin_begin="7" data_begin="7" length="13" time="0"/>
    <range_mapping origin_begin="50" data_begin="22" length="2" time="1"/>
  </device>
</superblock>
'''.strip()

# What commands said when they failed, and the kind of error that it is.
FAILURES = (
    ('Unavailable', '  Failed to find logical volume "tvg/nope"\n'),
    ('Unavailable', '  Volume group "nope" not found\n'
     '  Cannot process volume group nope\n'),
    ('Unavailable', '  Existing logical volume "nosuch" not found in volume '
     'group "tvg"\n'),
    ('Unavailable', '  Snapshot origin LV nosuch not found in Volume group '
     'tvg.\n'),
    ('Unavailable', '  WARNING: Couldn\'t find device with uuid '
     '8d7xiR-D218-Tff2-jLpz-zxdm-BqC8-KlcGG5.\n'
     '  Cannot change VG tvg while PVs are missing.\n'
     '  See vgreduce --removemissing and vgextend --restoremissing.\n'
     '  Cannot process volume group tvg\n'),
    ('Unavailable', '  Cannot update volume group rec-vg with duplicate PV '
     'devices.\n'),
    ('Unavailable', '  Multiple VGs found with the same name: skipping '
     'rec-vg\n  Use --select vg_uuid=<uuid> in place of the VG name.\n'),
    ('Invalid', '  Cannot access VG rec-vg with system ID other-host with '
     'unknown local system ID.\n'),
    ('Invalid', '  Volume too large (17.00 PiB) for extent size 4.00 MiB. '
     'Upper limit is less than <16.00 PiB.\n'),
    ('Busy', 'File descriptor 7 (/dev/dm-4) leaked on lvchange invocation. '
     'Parent PID 377: bash\n  Logical volume tvg/clone-a in use.\n'),
    ('Busy', '  Logical volume tvg/snap-c in use.\n'
     '  LV tvg/volume-a has open 1 snapshot(s), not deactivating.\n'),
    ('Busy', '  Snapshot origin volumes can be resized only while inactive: '
     'try lvchange -an.\n'),
    ('Busy', '  Can\'t remove locked logical volume vgx/volume-a.\n'),
    ('Busy', '  Cannot rename locked LV volume-a\n'),
    ('Busy', '  Can\'t resize locked logical volume vgx/volume-a.\n'),
    ('Busy', '  Snapshots of locked volumes are not supported.\n'),
    ('Busy', '  Cannot use locked pool volume vgx/pool.\n'),
    ('Unknown', '  device-mapper: resume ioctl on vgx-a (253:4) failed: '
     'Invalid argument\n  Failed to suspend logical volume vgx/a.\n'),
    ('Unavailable', '  WARNING: VG vgx is missing PV 7hlTWT-BHal-6xQk-7UHe-'
     'n5oJ-xZdm-R1m9Cr (last written to /dev/vdc).\n'
     '  Refusing activation of partial LV vgx/t1.  Use \'--activationmode '
     'partial\' to override.\n'),
    ('Conflict', '  Logical Volume "volume-1" already exists in volume '
     'group "tvg"\n'),
    ('NoSpace', '  Volume group "tvg" has insufficient free space (957 '
     'extents): 25600 required.\n'),
    ('NoSpace', '  Insufficient free space: 25536 extents needed, but only '
     '909 available\n'),
    ('NoSpace', '  WARNING: Thin pool tvg/pool is out of data space.\n'
     '  Cannot create new thin volume, free space in thin pool tvg/pool '
     'reached threshold.\n'),
    ('Unknown', '  Subreport of type "lv" for VG suite-vg contains columns '
     'which lead to change of report type.\n'),
)
