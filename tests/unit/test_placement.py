# SPDX-License-Identifier: Apache-2.0
"""Which pool a volume gets, and what the operator reads if none fits."""

import unittest

from volume import errors
from volume.placement import Candidate
from volume.placement import choose
from volume.placement import claim_bytes
from volume.placement import Wish

GIB = 1 << 30


def pool(name='a', **values):
    return Candidate(**{
        'backend': name, 'name': 'pool', 'unclaimed_bytes': 10 * GIB,
        'free_bytes': 10 * GIB, **values,
    })


class Choose(unittest.TestCase):
    def chosen(self, pools, **wish):
        return choose(pools, Wish(**{'size_bytes': GIB, **wish})).backend

    def refusal(self, pools, **wish):
        with self.assertRaises(errors.NoSpace) as caught:
            self.chosen(pools, **wish)
        return str(caught.exception)

    def test_the_cheapest_is_taken_before_the_emptiest(self):
        self.assertEqual('b', self.chosen([
            pool('a', cost=2, unclaimed_bytes=90 * GIB),
            pool('b', cost=1, unclaimed_bytes=2 * GIB),
        ]))

    def test_of_equal_cost_the_emptiest_is_taken(self):
        self.assertEqual('b', self.chosen([
            pool('a', unclaimed_bytes=2 * GIB),
            pool('b', unclaimed_bytes=3 * GIB),
            pool('c', unclaimed_bytes=2 * GIB),
        ]))

    def test_the_order_of_the_pools_does_not_matter(self):
        pools = [pool('c'), pool('a'), pool('b')]
        one, other = (
            choose(each, Wish(size_bytes=1)).name
            for each in (pools, pools[::-1])
        )
        self.assertEqual(one, other)

    def test_each_filter_takes_out_what_does_not_fit(self):
        for trace, bad, wish in (
            ('1 down or disabled', {'is_up': False}, {}),
            ('1 down or disabled', {'enabled': False}, {}),
            ('1 of another backend', {}, {'backend': 'other'}),
            ('1 of another name', {}, {'pool': 'other'}),
            ('1 for other projects', {'projects': frozenset({'q'})},
             {'project_id': 'p'}),
            ('1 without the tags', {'tags': frozenset({'ssd'})},
             {'tags': frozenset({'ssd', 'fast'})}),
            ('1 without the features', {}, {'features': frozenset({'Clone'})}),
            ('1 of another role', {'role': 'SAN'}, {'role': 'NAS'}),
            ('1 of another cluster', {'cluster': 'c1'}, {'cluster': 'c2'}),
            ('1 of another cluster', {'cluster': 'c1'}, {}),
            ('1 for smaller volumes only', {'max_volume_bytes': GIB - 1}, {}),
            ('1 without room for it', {'unclaimed_bytes': GIB - 1}, {}),
        ):
            with self.subTest(trace=trace, bad=bad):
                self.assertEqual(
                    f'no pool fits: {trace}; see "volume pools"',
                    self.refusal([pool(**bad)], **wish),
                )

    def test_what_fits_exactly_fits(self):
        self.assertEqual('a', self.chosen(
            [pool(
                unclaimed_bytes=GIB, max_volume_bytes=GIB, free_bytes=4096,
                tags=frozenset({'ssd'}), projects=frozenset({'p'}),
                features=frozenset({'Clone'}), cluster='c', role='SAN',
            )],
            tags=frozenset({'ssd'}), project_id='p', role='SAN',
            features=frozenset({'Clone'}), cluster='c',
            backend='a', pool='pool',
        ))

    def test_a_pool_of_no_cluster_serves_every_cluster(self):
        self.assertEqual('a', self.chosen([pool()], cluster='c'))

    def test_a_refusal_counts_what_each_filter_took(self):
        self.assertEqual(
            'no pool fits: 1 down or disabled, 3 without the tags, 2 without '
            'room for it; see "volume pools"',
            self.refusal(
                [
                    pool('a', is_up=False),
                    pool('b'), pool('c'), pool('d'),
                    pool('e', tags=frozenset({'ssd'}), unclaimed_bytes=0),
                    pool('f', tags=frozenset({'ssd'}), unclaimed_bytes=1),
                ],
                tags=frozenset({'ssd'}),
            ),
        )

    def test_without_pools_the_refusal_says_where_to_look(self):
        self.assertIn('volume backends', self.refusal([]))

    def test_a_claim_is_rounded_up_to_the_pools_granules(self):
        coarse = pool(granularity_bytes=4096, unclaimed_bytes=8192)
        self.assertEqual(8192, claim_bytes(coarse, Wish(size_bytes=4608)))
        self.assertEqual('a', self.chosen([coarse], size_bytes=4608))
        self.assertIn('room', self.refusal([coarse], size_bytes=8704))

    def test_nor_is_a_limit_passed_by_rounding_up(self):
        coarse = pool(granularity_bytes=4096, max_volume_bytes=10000)
        self.assertEqual('a', self.chosen([coarse], size_bytes=8192))
        self.assertIn('smaller', self.refusal([coarse], size_bytes=8704))
