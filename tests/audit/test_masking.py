"""Masks cancel in a sum and in nothing else; shares give a secret back, or nothing of it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.masking import (
    MODULUS,
    MaskError,
    combined,
    coordinate_limit,
    mask_bytes,
    mask_words,
    own_mask_key,
    pair_mask_key,
    same_point,
    sign_of,
)
from audit.secure_bodies import SharesOpened
from audit.secure_round import SecureTerms
from audit.shamir import SHARE_BYTES, Opening, P, ShareError, split
from federation.secure_round import MOST_TRIES, giver_sets
from federation.secure_round import combined as fast_combined

INT64 = st.integers(-(2**63), 2**63 - 1)


def is_probable_prime(number: int) -> bool:
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True


def test_the_field_is_the_least_prime_above_every_secret() -> None:
    assert is_probable_prime(P)
    assert not any(is_probable_prime((1 << 256) + offset) for offset in range(1, P - (1 << 256)))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, holders))
    shares = split(secret, holders=holders, threshold=threshold)
    places = data.draw(st.permutations(range(1, holders + 1)))[:threshold]
    assert Opening(places).join({place: shares[place - 1] for place in places}) == secret


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """For two of three shares and any other secret there is a third share that gives it: they say nothing."""
    secret = bytes(range(32))
    shares = split(secret, holders=3, threshold=3)
    for other in (bytes(32), b"\xff" * 32, bytes(reversed(secret))):
        line = Opening([0 + 1, 2, 3])
        value = int.from_bytes(other, "big")
        known = sum(
            weight * int.from_bytes(share, "big")
            for weight, share in zip(line._weights[:2], shares[:2], strict=True)
        )
        third = (value - known) * pow(line._weights[2], -1, P) % P
        joined = line.join({1: shares[0], 2: shares[1], 3: third.to_bytes(SHARE_BYTES, "big")})
        assert joined == other


@pytest.mark.parametrize(
    "shares",
    [
        {1: bytes(33)},
        {1: bytes(33), 2: bytes(32)},
        {1: bytes(33), 2: P.to_bytes(33, "big")},
        {1: b"\x01" + bytes(32), 2: b"\xff" * 33},
        {1: bytes(33), 2: bytes(32) + b"\x01" * 2},
    ],
)
def test_malformed_shares_are_refused(shares: dict[int, bytes]) -> None:
    with pytest.raises(ShareError):
        Opening([1, 2]).join(shares)


@pytest.mark.parametrize("places", [[], [1, 1], [0, 1], [-1]])
def test_places_are_distinct_and_positive(places: list[int]) -> None:
    with pytest.raises(ShareError):
        Opening(places)


@pytest.mark.parametrize(("secret", "holders", "threshold"), [(31, 3, 2), (33, 3, 2), (32, 3, 4), (32, 3, 0)])
def test_a_secret_has_32_bytes_and_a_possible_threshold(secret: int, holders: int, threshold: int) -> None:
    with pytest.raises(ShareError):
        split(bytes(secret), holders=holders, threshold=threshold)


def raw(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(INT64, min_size=3, max_size=3), min_size=2, max_size=5))
def test_pair_masks_cancel_over_all_sites(vectors: list[list[int]]) -> None:
    sites = [f"site-{number}" for number in range(len(vectors))]
    keys = {site: X25519PrivateKey.generate() for site in sites}
    masked = []
    for site, vector in zip(sites, vectors, strict=True):
        parts: list[tuple[int, object]] = [(1, vector)]
        for other in sites:
            if other != site:
                key = pair_mask_key(keys[site], raw(keys[other]), b"b" * 32, (site, other))
                parts.append((sign_of(site, other), mask_words(key, 3)))
        masked.append(combined(3, parts))  # type: ignore[arg-type]
    assert combined(3, [(1, vector) for vector in masked]) == combined(3, [(1, v) for v in vectors])
    assert masked != vectors


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, -1]), st.lists(INT64, min_size=4, max_size=4)), max_size=6))
def test_the_fast_sum_is_the_defined_one(parts: list[tuple[int, list[int]]]) -> None:
    expected = [sum(sign * vector[place] for sign, vector in parts) % MODULUS for place in range(4)]
    found = combined(4, parts)
    assert [value % MODULUS for value in found] == expected
    assert all(-(2**63) <= value < 2**63 for value in found)
    assert fast_combined(4, parts) == found
    words = [(1, mask_words(bytes(32), 4))]
    assert fast_combined(4, words) == combined(4, words)


def test_vectors_of_two_lengths_are_not_added() -> None:
    for add in (combined, fast_combined):
        with pytest.raises(MaskError):
            add(3, [(1, [1, 2, 3]), (1, [1, 2])])


def test_a_mask_is_the_whole_stream_of_its_whole_key() -> None:
    """Two keys that share all bits but one have streams that share nothing; a longer mask begins alike."""
    base = bytearray(32)
    streams = {bytes(mask_bytes(bytes(base), 64))}
    for bit in range(256):
        key = bytearray(base)
        key[bit // 8] ^= 1 << bit % 8
        streams.add(mask_bytes(bytes(key), 64))
    assert len(streams) == 257
    assert mask_bytes(bytes(32), 100)[:512] == mask_bytes(bytes(32), 64)
    assert list(mask_words(bytes(32), 5)) == np.frombuffer(mask_bytes(bytes(32), 5), "<u8").tolist()
    with pytest.raises(MaskError):
        mask_bytes(bytes(16), 1)


def test_a_key_that_makes_the_exchange_void_is_refused() -> None:
    with pytest.raises(MaskError):
        pair_mask_key(X25519PrivateKey.generate(), bytes(32), bytes(32), ("alpha", "beta"))
    for small in SMALL_POINTS:
        with pytest.raises(MaskError):
            same_point(bytes.fromhex(small))


# of an order that divides 8, from which every private key makes zeros (RFC 7748, section 6.1)
SMALL_POINTS = (
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
)


def in_another_dress(public: bytes) -> list[bytes]:
    """Return other keys that every private key has the same secret with: with the bit that the exchange
    ignores, and with the point of order 2 added, which every private key, a multiple of 8, takes off.
    """
    p = 2**255 - 19
    u = int.from_bytes(public, "little")
    order_2 = pow(u, -1, p)  # u' = 1/u is u + (0, 0) on every Montgomery curve
    return [(u | 1 << 255).to_bytes(32, "little"), order_2.to_bytes(32, "little")]


def test_one_key_in_another_dress_is_known_and_makes_another_mask() -> None:
    """A site that shows its neighbour's key as its own must not get the neighbour's mask: with the other sign
    it would take it off, and leave the victim between them with no mask but its own, which is opened.
    """
    victim, neighbour = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    public, binding = raw(neighbour), b"b" * 32
    honest = pair_mask_key(victim, public, binding, ("beta", "alpha"))
    for dressed in in_another_dress(public):
        assert dressed != public
        shared = victim.exchange(X25519PublicKey.from_public_bytes(dressed))
        assert shared == victim.exchange(neighbour.public_key())
        assert same_point(dressed) == same_point(public)
        assert pair_mask_key(victim, dressed, binding, ("beta", "gamma")) != honest
    assert same_point(raw(victim)) != same_point(public)


def test_keys_for_two_purposes_rounds_or_sites_differ() -> None:
    seed, pair = b"s" * 32, ("alpha", "beta")
    mine, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    found = {
        own_mask_key(seed, b"a" * 32, "alpha"),
        own_mask_key(seed, b"a" * 32, "beta"),
        own_mask_key(seed, b"b" * 32, "alpha"),
        pair_mask_key(mine, raw(other), b"a" * 32, pair),
        pair_mask_key(mine, raw(other), b"a" * 32, ("alpha", "gamma")),
        pair_mask_key(mine, raw(other), b"b" * 32, pair),
    }
    assert len(found) == 6
    theirs = pair_mask_key(other, raw(mine), b"a" * 32, ("beta", "alpha"))
    assert pair_mask_key(mine, raw(other), b"a" * 32, pair) == theirs


@given(st.integers(3, 1000), st.integers(0, 2**40))
def test_no_sum_of_limited_coordinates_wraps(sites: int, noise: int) -> None:
    limit = coordinate_limit(sites, noise)
    assert sites * (limit + noise) < 2**63 <= sites * (limit + 1 + noise) + sites


@pytest.mark.parametrize("sites", range(3, 12))
def test_two_sets_with_enough_signatures_share_an_honest_site(sites: int) -> None:
    """For every t below half and every allowed minimum, whatever the colluders sign."""
    for tolerated in range((sites + 1) // 2):
        for least in range(sites - tolerated, sites + 1):
            terms = SecureTerms(sites=sites, tolerated=tolerated, least=least)
            colluders = terms.colluders(least)
            assert 0 <= colluders <= tolerated
            # each set needs `least` signers; honest sites sign one set, colluders both
            assert 2 * least > sites + colluders
            assert least > colluders  # colluders alone never reach the threshold
            assert least - colluders >= 2  # and the sum they know is of two honest sites or more


def test_whoever_gives_false_shares_is_left_out_of_one_of_the_first_sets() -> None:
    """With many sites the sets that hold the first liar are more than anybody tries one after the other."""

    def giver(number: int) -> SharesOpened:
        texts = {"run": "", "charter": "", "roster": "", "signature": ""}
        return SharesOpened(round=1, site=f"{number:03}", seeds=(), keys=(), **texts)

    for count, least in ((4, 3), (12, 8), (40, 21), (200, 150)):
        givers = [giver(number) for number in range(count)]
        tried = list(giver_sets(givers, least))
        assert all(
            len(found) == least and list(found) == sorted(found, key=lambda item: item.site)
            for found in tried
        )
        assert len(tried) <= count + MOST_TRIES
        for liar in givers:
            assert any(liar not in found for found in tried[:count])
    assert list(giver_sets(givers[:2], 3)) == []
    assert [len(found) for found in giver_sets(givers[:3], 3)] == [3]


# whom a coordinator could make open what: every way to tell the sites different things


Told = tuple[frozenset[int], frozenset[int] | None]  # whose masks a site carries, and which set it signed


def learnable(told: list[Told], sites: int, least: int, *, careless: bool = False) -> list[set[int]]:
    """Return the sets of honest sites whose sums follow from what is given away.

    Sites 0 to len(told) - 1 are honest, the others collude. A site gives its shares of seeds at once for a
    set that lacks none of its members, else, with shares of the dropped sites' mask keys, once `least` sites
    have signed the same set under the same roster. What keeps an update hidden is its own seed, and each pair
    mask that no other term of a sum takes off; so sums are those of whole components of the graph of masks.
    """
    honest, colluders = range(len(told)), sites - len(told)
    seeds, keys = dict.fromkeys(honest, colluders), dict.fromkeys(honest, colluders)
    for members, signed in told:
        if signed is None:
            continue
        signers = told.count((members, signed)) + sum(site >= len(told) for site in signed)
        if signed != members and signers < least and not careless:
            continue
        for site in honest:
            seeds[site] += site in signed
            keys[site] += site in members - signed
    hidden = {site for site in honest if seeds[site] < least}
    parent = list(honest)

    def root(site: int) -> int:
        while parent[site] != site:
            site = parent[site]
        return site

    for one, other in itertools.combinations(honest, 2):
        if keys[one] >= least or keys[other] >= least:
            continue
        carried = (other in told[one][0], one in told[other][0])
        if all(carried):
            parent[root(one)] = root(other)
        elif any(carried):
            hidden.add(one if carried[0] else other)
    found: dict[int, set[int]] = {}
    for site in honest:
        found.setdefault(root(site), set()).add(site)
    return [component for component in found.values() if not component & hidden]


def ways(site: int, sites: int, least: int) -> list[Told]:
    """Return everything that a coordinator can tell one site."""
    others = [other for other in range(sites) if other != site]
    rosters = [
        frozenset({site, *chosen})
        for size in range(least - 1, sites)
        for chosen in itertools.combinations(others, size)
    ]
    return [
        (members, signed)
        for members in rosters
        for signed in (None, *(roster for roster in rosters if roster <= members))
    ]


CASES = [
    (sites, tolerated, least)
    for sites in range(3, 7)
    for tolerated in range((sites + 1) // 2)
    for least in range(sites - tolerated, sites + 1)
]


def told_ways(sites: int, honest: int, least: int) -> Iterator[tuple[Told, ...]]:
    """Yield every way, or some thousand at random where there are too many."""
    choices = [ways(site, sites, least) for site in range(honest)]
    if math.prod(map(len, choices)) <= 40_000:
        yield from itertools.product(*choices)
        return
    rng = random.Random(f"{sites} {honest} {least}")
    for _ in range(6_000):
        few = [rng.sample(options, min(2, len(options))) for options in choices]  # some must be told alike
        shared = rng.choice(few)[0]
        yield tuple(
            shared
            if site in shared[0] and site in (shared[1] or shared[0]) and rng.random() < 0.6
            else few[site][0]
            for site in range(honest)
        )


@pytest.mark.parametrize(("sites", "tolerated", "least"), CASES)
def test_whatever_sites_are_told_one_sum_at_most_is_opened_and_of_enough(
    sites: int, tolerated: int, least: int
) -> None:
    colluders = least - (sites - tolerated)
    for told in told_ways(sites, sites - colluders, least):
        sums = learnable(list(told), sites, least)
        assert len(sums) <= 1, told
        assert all(len(found) >= sites - tolerated for found in sums), told


def test_mask_keys_given_before_enough_have_signed_would_open_a_smaller_sum() -> None:
    """Five honest sites, each told that two others are gone: the mask keys of three of them come together."""
    gone = [(3, 4), (2, 4), (3, 4), (2, 4), (2, 3)]
    everybody = frozenset(range(5))
    told: list[Told] = [(everybody, everybody - {*two}) for two in gone]
    assert learnable(told, 5, 3) == []
    assert learnable(told, 5, 3, careless=True) == [{0, 1}]


def test_with_more_colluders_than_the_charter_covers_the_search_finds_what_they_learn() -> None:
    everybody = frozenset(range(4))
    assert learnable([(everybody, frozenset({0, 1, 3}))] * 2 + [(everybody, everybody)], 4, 3) == [{0, 1}]
    apart: list[Told] = [(frozenset({site, 2, 3}),) * 2 for site in range(2)]
    assert learnable(apart, 4, 3) == [{0}, {1}]


def test_a_set_that_all_are_told_is_opened_and_one_that_too_few_are_told_is_not() -> None:
    everybody = frozenset(range(5))
    assert learnable([(everybody, everybody)] * 5, 5, 4) == [set(range(5))]
    silent: list[Told] = [(everybody, None)] * 2
    assert learnable([(everybody, everybody)] * 3 + silent, 5, 4) == []
