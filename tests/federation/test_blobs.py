"""Files by digest: many small ones share a pack, and nothing is believed because of where it lies."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from federation.blobs import PACKED_FROM, SMALL_BYTES, BlobStore
from federation.errors import BlobAlteredError, BlobMissingError


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def many():
    return [os.urandom(20 + i) for i in range(PACKED_FROM)]


@pytest.fixture
def packed(tmp_path, many):
    BlobStore(tmp_path).put_all(many)
    (pack,) = (tmp_path / "packs").iterdir()
    return pack


def test_many_small_files_are_one_and_read_like_any_other(tmp_path, many):
    large = os.urandom(SMALL_BYTES + 1)
    store = BlobStore(tmp_path)
    assert store.put_all([*many, large, many[0]]) == [digest_of(data) for data in [*many, large, many[0]]]
    assert len(list((tmp_path / "packs").iterdir())) == 1
    for reader in (store, BlobStore(tmp_path)):  # the writer, and another process
        for data in (*many, large):
            digest = digest_of(data)
            assert reader.get(digest) == reader.find(digest) == data
            assert reader.size_bytes(digest) == len(data)
            with reader.open(digest) as file:
                assert file.read() == data


def test_few_files_have_their_own(tmp_path, many):
    BlobStore(tmp_path).put_all(many[1:])
    assert not (tmp_path / "packs").exists()


def test_a_reader_finds_packs_that_came_later(tmp_path, many):
    reader = BlobStore(tmp_path)
    assert reader.find(digest_of(many[0])) is None
    BlobStore(tmp_path).put_all(many)
    assert reader.get(digest_of(many[0])) == many[0]


def test_the_same_files_again_are_the_same_pack(tmp_path, many):
    for _ in range(2):
        BlobStore(tmp_path).put_all(many)
    assert len(list((tmp_path / "packs").iterdir())) == 1


@pytest.mark.parametrize("last", [0, -1])
def test_an_altered_byte_is_found(packed, tmp_path, many, last):
    data = bytearray(packed.read_bytes())
    data[last if last else data.index(b"\n") + 1] ^= 1
    packed.write_bytes(data)
    with pytest.raises(BlobAlteredError):
        BlobStore(tmp_path).get(digest_of(many[last]))


def test_a_pack_that_is_cut_off_gives_no_whole_file(packed, tmp_path, many):
    packed.write_bytes(packed.read_bytes()[:-3])
    with pytest.raises(BlobAlteredError):
        BlobStore(tmp_path).get(digest_of(many[-1]))
    assert BlobStore(tmp_path).get(digest_of(many[0])) == many[0]


@pytest.mark.parametrize(
    "line",
    [
        b"", b"no json", b"[1]", b'[["a"]]', b'{"a":1}', b"null",
        json.dumps([["x", -5]]).encode(), json.dumps([[1, "2"]]).encode(),
    ],
)  # fmt: skip
def test_a_first_line_that_lists_nothing_hides_its_files_and_no_others(packed, tmp_path, many, line):
    others = [os.urandom(30) for _ in range(PACKED_FROM)]
    BlobStore(tmp_path).put_all(others)
    packed.write_bytes(line + packed.read_bytes()[packed.read_bytes().index(b"\n") :])
    with pytest.raises(BlobMissingError):
        BlobStore(tmp_path).get(digest_of(many[0]))
    assert BlobStore(tmp_path).get(digest_of(others[3])) == others[3]


def test_a_pack_removed_is_missing(packed, tmp_path, many):
    store = BlobStore(tmp_path)
    assert store.get(digest_of(many[0])) == many[0]
    packed.unlink()
    with pytest.raises(BlobMissingError):
        store.get(digest_of(many[1]))


def test_a_file_of_its_own_comes_first(packed, tmp_path, many):
    packed.write_bytes(b"[]\n")
    store = BlobStore(tmp_path)
    store.put(many[0])
    assert store.get(digest_of(many[0])) == many[0]
