# SPDX-License-Identifier: Apache-2.0
"""Lists of the REST door: pages, filters, order, and what they cost."""

import unittest
import urllib.parse

from tests import database
from tests.integration import serving
from volume import ids
from volume.db import engine
from volume.db import models


@database.on_all
class Lists(unittest.TestCase):
    """Paging, filters and order, on one filled service."""

    def setUp(self):
        self.world = serving.World(self)
        self.ask = self.world.ask
        self.ids = [
            self.world.make(
                size=None, size_bytes=512 * (9 - number), name=f'v{number}',
                metadata={'n': str(number), 'even': str(number % 2 == 0)},
            )['id']
            for number in range(5)
        ]

    def listed(self, query='', path='/v3/volumes/detail', **options):
        asked = self.ask('GET', f'{path}?{query}', **options)
        self.assertEqual(200, asked.status, asked.text)
        return [each['id'] for each in asked.json['volumes']]

    def test_the_newest_comes_first(self):
        self.assertEqual(self.ids[::-1], self.listed())

    def test_a_list_without_details_has_ids_names_and_links(self):
        asked = self.ask('GET', '/v3/volumes')
        self.assertEqual(
            {'id', 'name', 'links'}, set(asked.json['volumes'][0])
        )

    def test_pages_follow_each_other_to_the_end(self):
        seen, path = [], '/v3/volumes?limit=2&sort=name:asc'
        while path:
            page = self.ask('GET', path).json
            seen.append([each['name'] for each in page['volumes']])
            links = page.get('volumes_links')
            path = links[0]['href'].removeprefix('http://localhost') if (
                links) else None
        self.assertEqual([['v0', 'v1'], ['v2', 'v3'], ['v4']], seen)

    def test_a_page_goes_on_where_the_last_one_ended_whatever_was_deleted(
        self,
    ):
        first = self.ask('GET', '/v3/volumes?limit=2').json
        last = first['volumes'][-1]['id']
        self.ask('DELETE', f'/v3/volumes/{last}')
        self.world.gone(last)
        self.assertEqual(
            self.ids[2::-1], self.listed(f'marker={last}')
        )

    def test_ties_are_never_split_wrongly(self):
        seen, marker = [], ''
        while True:
            page = self.listed(
                f'limit=1&sort=status:asc{marker}', path='/v3/volumes'
            )
            if not page:
                break
            seen += page
            marker = f'&marker={page[-1]}'
        self.assertEqual(sorted(self.ids), sorted(seen))

    def test_an_unknown_marker_is_not_found(self):
        self.assertEqual(
            404, self.ask('GET', f'/v3/volumes?marker={ids.new()}').status
        )
        self.assertEqual(400, self.ask('GET', '/v3/volumes?marker=x').status)

    def test_offset_and_limit_are_counted(self):
        self.assertEqual(
            self.ids[::-1][1:3], self.listed('offset=1&limit=2')
        )
        self.assertEqual([], self.listed('limit=0'))
        for query in 'limit=-1', 'limit=x', 'offset=-1', 'offset=1.5':
            self.assertEqual(
                400, self.ask('GET', f'/v3/volumes?{query}').status, query
            )

    def test_filters_choose(self):
        for query, numbers in (
            ('name=v3', [3]), ('display_name=v3', [3]), ('name=v9', []),
            ('status=available', [4, 3, 2, 1, 0]), ('status=error', []),
            ('bootable=true', []), ('bootable=False', [4, 3, 2, 1, 0]),
            (f'id={self.ids[2]}', [2]), ('backend=fast&name=v1', [1]),
            (urllib.parse.urlencode({'metadata': {'n': '2'}}), [2]),
            (urllib.parse.urlencode({'metadata': {
                'even': 'True', 'n': '4'}}), [4]),
            ('metadata={"even":"False"}', [3, 1]),
        ):
            self.assertEqual(
                [self.ids[number] for number in numbers],
                self.listed(query), query,
            )

    def test_a_filter_finds_a_part_from_3_34_on(self):
        self.assertEqual([self.ids[3]], self.listed('name~=3'))
        self.assertEqual([], self.listed('name~=%25'))
        self.assertEqual(400, self.ask(
            'GET', '/v3/volumes?name~=3', version='3.33').status)

    def test_a_filter_that_is_not_known_is_refused_not_ignored(self):
        for query in (
            'colour=red', 'metadata=x', 'metadata={}', 'bootable=maybe',
            'metadata={"a":1}', 'bootable~=t', 'metadata~={"n":"2"}',
            'all_tenants=maybe', 'size=1', "metadata={'a\"b':'c'}",
        ):
            self.assertEqual(
                400, self.ask('GET', f'/v3/volumes?{query}').status, query
            )

    def test_order_is_by_any_known_key(self):
        self.assertEqual(self.ids, self.listed('sort=name:asc'))
        self.assertEqual(self.ids[::-1], self.listed('sort=name'))
        self.assertEqual(self.ids[::-1], self.listed('sort=size:asc'))
        self.assertEqual(
            self.ids, self.listed('sort_key=display_name&sort_dir=asc')
        )
        for query in (
            'sort=colour', 'sort=name:up', 'sort=name&sort_key=name',
            'sort=' + ','.join(['name'] * 9), 'sort_dir=x',
        ):
            self.assertEqual(
                400, self.ask('GET', f'/v3/volumes?{query}').status, query
            )

    def test_the_count_is_of_all_that_fit(self):
        for query, minor, count in (
            ('limit=1&with_count=true', 45, 5),
            ('name=v1&with_count=true', 45, 1),
            ('limit=1', 45, None), ('with_count=true', 44, None),
        ):
            asked = self.ask(
                'GET', f'/v3/volumes?{query}', version=f'3.{minor}'
            )
            self.assertEqual(count, asked.json.get('count'), query)

    def test_a_list_of_a_thousand_costs_five_statements_at_most(self):
        self.world.core.db.write(lambda session: session.add_all(
            row for number in range(995) for row in a_used_volume(number)
        ))
        with engine.statements(self.world.core.db.engine) as seen:
            asked = self.ask('GET', '/v3/volumes/detail?with_count=true')
        ours = [text for text in seen if 'services' not in text]  # heartbeat
        self.assertLessEqual(len(ours), 5, ours)
        page = asked.json
        self.assertEqual((1000, 1000), (page['count'], len(page['volumes'])))
        self.assertNotIn('volumes_links', page)
        self.assertEqual(995, sum(
            len(each['attachments']) for each in page['volumes']
        ))


def a_used_volume(number):
    """Return the rows of a volume that a host has."""
    volume_id = ids.new()
    return models.Volume(
        id=volume_id, project_id='default', user_id='u', name=f'n{number}',
        status='in-use', size_bytes=512, created_at=float(number),
        updated_at=0.0,
    ), models.Attachment(
        id=ids.new(), volume_id=volume_id, project_id='default',
        backend='fast', status='attached', host='h', created_at=0.0,
    )
