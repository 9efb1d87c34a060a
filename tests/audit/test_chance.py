"""Random bytes kept in stock are given out once each, to threads and to forked children too."""

from __future__ import annotations

import os
import threading

import pytest

from audit import chance


def test_no_piece_is_given_out_twice() -> None:
    found: list[list[bytes]] = [[] for _ in range(4)]

    def draw(mine: list[bytes]) -> None:
        mine.extend(chance.piece() for _ in range(5000))

    threads = [threading.Thread(target=draw, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pieces = [piece for mine in found for piece in mine]
    assert len(set(pieces)) == len(pieces) == 20_000
    assert {len(piece) for piece in pieces} == {chance.PIECE}


def test_child_has_none_of_its_parents_stock() -> None:
    chance.piece()
    while not chance._pieces:
        chance.piece()
    stock = list(chance._pieces)
    assert stock
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"".join(chance.piece() for _ in range(len(stock))))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert len(theirs) == chance.PIECE * len(stock)
    assert not {theirs[k : k + chance.PIECE] for k in range(0, len(theirs), chance.PIECE)} & set(stock)
    assert chance.piece() == stock[0]  # the parent goes on with its own


def test_digits_are_as_many_as_asked_for() -> None:
    assert [len(chance.hex_text(size)) for size in (1, 16, 23, 32)] == [2, 32, 46, 64]
    assert chance.hex_text(16) != chance.hex_text(16)


@pytest.mark.parametrize("size", [0, -1, 33])
def test_more_than_a_piece_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 32"):
        chance.hex_text(size)
