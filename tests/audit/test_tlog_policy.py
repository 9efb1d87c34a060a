from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.errors import MalformedPolicyError, NoKnownSignatureError
from audit.keys import SigningKey
from audit.notes import KeyType, NoteSigner
from audit.tlog_policy import Policy

LOG = NoteSigner("hospital.example/log", SigningKey.generate())
SITES = [NoteSigner(f"site-{c}.example", SigningKey.generate(), KeyType.COSIGNATURE) for c in "abcd"]
HEAD = f"log {LOG.vkey} https://log.example/\n" + "".join(
    f"witness {name} {site.vkey}\n" for name, site in zip("abcd", SITES, strict=True)
)
THREE_OF_FOUR = HEAD + "group sites 3 a b c d\nquorum sites\n"
ONE_OPERATOR = HEAD + "group operator any a b\ngroup quorum-group 2 operator c d\nquorum quorum-group\n"


def test_policy_reads_back() -> None:
    for text in (THREE_OF_FOUR, ONE_OPERATOR, HEAD + "quorum none\n", HEAD + "quorum a\n"):
        policy = Policy.parse(text)
        assert policy.format() == text
        assert Policy.parse(policy.format()) == policy


def test_comments_blank_lines_and_extra_spaces_are_skipped() -> None:
    text = "# ours\n\n" + THREE_OF_FOUR.replace("group sites", "\ngroup \t sites")
    assert Policy.parse(text) == Policy.parse(text.replace("\n", "\r\n")) == Policy.parse(THREE_OF_FOUR)


def test_threshold_counts_members() -> None:
    policy = Policy.parse(THREE_OF_FOUR)
    for count in range(5):
        for names in itertools.combinations("abcd", count):
            result = policy.evaluate(names)
            assert result.satisfied == (count >= 3)
            assert (result.have, result.need) == (count, 3)
            assert set(result.missing) == set("abcd") - set(names)


def test_witnesses_of_one_operator_count_once() -> None:
    policy = Policy.parse(ONE_OPERATOR)
    assert not policy.evaluate(["a", "b"]).satisfied
    assert policy.evaluate(["a", "b"]).missing == ("c", "d")
    assert policy.evaluate(["b", "d"]).satisfied


def test_repeated_and_unknown_names_do_not_count() -> None:
    policy = Policy.parse(THREE_OF_FOUR)
    assert not policy.evaluate(["a", "a", "a", "b", "sites", "none", "x"]).satisfied


def test_all_any_single_and_none_quorums() -> None:
    everyone = Policy.parse(HEAD + "group g all a b c d\nquorum g\n")
    assert not everyone.evaluate("abc").satisfied
    assert everyone.evaluate("abcd").satisfied
    assert Policy.parse(HEAD + "group g any a b\nquorum g\n").evaluate("b").satisfied
    assert not Policy.parse(HEAD + "quorum a\n").evaluate("bcd").satisfied
    assert Policy.parse(HEAD + "quorum none\n").evaluate([]).satisfied


FAULTY = [
    ("", 1, "names no log"),
    ("quorum none\n", 2, "names no log"),
    (HEAD, 6, "no quorum"),
    (HEAD + "quorum x\n", 6, "no witness or group"),
    (HEAD + "quorum none\nquorum none\n", 7, "twice"),
    (HEAD + "quorum\n", 6, "none of"),
    (HEAD + "Quorum none\n", 6, "none of"),
    (HEAD + "group g 5 a b c d\nquorum g\n", 6, "from 1 to 4"),
    (HEAD + "group g 0 a\nquorum g\n", 6, "from 1 to 1"),
    (HEAD + "group g -1 a\nquorum g\n", 6, "from 1 to 1"),
    (HEAD + "group g 01 a\nquorum g\n", 6, "from 1 to 1"),
    (HEAD + "group g most a\nquorum g\n", 6, "not all, any"),
    (HEAD + "group g any\nquorum g\n", 6, "none of"),
    (HEAD + "group g any x\nquorum g\n", 6, "no witness or group"),
    (HEAD + "group g any a a\nquorum g\n", 6, "in a group already"),
    (HEAD + "group g any a\ngroup h any a\nquorum g\n", 7, "in a group already"),
    (HEAD + "group g any g\nquorum g\n", 6, "no witness or group"),
    (HEAD + "group a any b\nquorum a\n", 6, "taken"),
    (HEAD + "group none any b\nquorum none\n", 6, "taken"),
    (HEAD + f"witness a {SITES[0].vkey}\n", 6, "taken"),
    (HEAD + f"witness e {SITES[0].vkey}\n", 6, "another line"),
    (HEAD + f"log {LOG.vkey}\n", 6, "another line"),
    (f"log {SITES[0].vkey}\nquorum none\n", 1, "type 0x04"),
    (f"log {LOG.vkey}\nwitness a {LOG.vkey}\nquorum a\n", 2, "type 0x01"),
    (f"log {LOG.vkey[:-4]}\nquorum none\n", 1, "32 bytes"),
    (f"log {LOG.vkey} url more\nquorum none\n", 1, "none of"),
    (HEAD + "witness \u00e9 x\n", 6, "ASCII"),
    (HEAD + "quorum none\n\x00\n", 7, "ASCII"),
    (HEAD + "quorum\u00a0none\n", 6, "ASCII"),
    (HEAD + "quorum \u2028 none\n", 6, "ASCII"),
    (HEAD + "quorum none\rmore\n", 6, "ASCII"),
    ("log\n", 1, "none of"),
]


@pytest.mark.parametrize(("text", "line", "match"), FAULTY, ids=[str(i) for i in range(len(FAULTY))])
def test_error_names_the_line_and_the_fault(text: str, line: int, match: str) -> None:
    with pytest.raises(MalformedPolicyError, match=match) as caught:
        Policy.parse(text)
    assert caught.value.line == line
    assert f"line {line}:" in str(caught.value)


def test_one_key_under_two_cosigner_names_is_refused() -> None:
    alias = NoteSigner("alias.example", SITES[0].key, KeyType.COSIGNATURE)
    with pytest.raises(MalformedPolicyError, match="another line"):
        Policy.parse(HEAD + f"witness e {alias.vkey}\nquorum a\n")


def test_log_key_that_would_also_witness_is_refused() -> None:
    double = NoteSigner("double", LOG.key, KeyType.COSIGNATURE)
    with pytest.raises(MalformedPolicyError, match="another line"):
        Policy.parse(f"log {LOG.vkey}\nwitness w {double.vkey}\nquorum w\n")


def test_forty_witnesses_are_supported() -> None:
    keys = [NoteSigner(f"w{i}", SigningKey.generate(), KeyType.COSIGNATURE) for i in range(40)]
    lines = "".join(f"witness w{i} {key.vkey}\n" for i, key in enumerate(keys))
    names = " ".join(f"w{i}" for i in range(40))
    policy = Policy.parse(f"log {LOG.vkey}\n{lines}group g 21 {names}\nquorum g\n")
    assert policy.evaluate(f"w{i}" for i in range(21)).satisfied


@pytest.mark.parametrize("count", [3, 4, 5])
def test_split_view_reaches_two_quorums_only_if_2w_is_at_most_n_plus_f(count: int) -> None:
    """Every way in which f corrupt witnesses cosign both histories and each honest one cosigns either."""
    keys = [NoteSigner(f"w{i}", SigningKey.generate(), KeyType.COSIGNATURE) for i in range(count)]
    head = f"log {LOG.vkey}\n" + "".join(f"witness w{i} {key.vkey}\n" for i, key in enumerate(keys))
    names = [f"w{i}" for i in range(count)]
    for need, corrupt in itertools.product(range(1, count + 1), range(count)):
        policy = Policy.parse(f"{head}group g {need} {' '.join(names)}\nquorum g\n")
        both, honest = names[:corrupt], names[corrupt:]
        split = any(
            policy.evaluate([*both, *left]).satisfied
            and policy.evaluate([*both, *(name for name in honest if name not in left)]).satisfied
            for size in range(len(honest) + 1)
            for left in itertools.combinations(honest, size)
        )
        assert split == (2 * need <= count + corrupt)


def test_size_caps_are_enforced() -> None:
    with pytest.raises(MalformedPolicyError, match="cap"):
        Policy.parse("\n" * 2000)
    with pytest.raises(MalformedPolicyError, match="cap"):
        Policy.parse("#" * (1 << 19))


@given(
    st.lists(
        st.sampled_from([*THREE_OF_FOUR.split(), "\n", "none", "0", "#", "\u2028", "x" * 9]), max_size=40
    )
)
def test_fuzzed_policy_raises_the_declared_error_only(words: list[str]) -> None:
    try:
        policy = Policy.parse(" ".join(words))
    except MalformedPolicyError:
        return
    assert Policy.parse(policy.format()) == policy


def test_opening_a_note_maps_keys_to_the_policys_names() -> None:
    note = sign_checkpoint(Checkpoint(LOG.name, 3, b"r" * 32), LOG)
    note = add_signatures(note, [cosign(note, site, 100) for site in SITES[1:]])
    accepted = Policy.parse(THREE_OF_FOUR).open(note, now=100)
    assert accepted.witnesses == ("b", "c", "d")
    assert accepted.quorum.satisfied
    assert accepted.quorum.missing == ("a",)


def test_rekeyed_log_of_the_same_name_is_refused() -> None:
    thief = NoteSigner(LOG.name, SigningKey.generate())
    note = sign_checkpoint(Checkpoint(LOG.name, 3, b"r" * 32), thief)
    with pytest.raises(NoKnownSignatureError):
        Policy.parse(THREE_OF_FOUR).open(note, now=100)


def test_log_that_the_policy_does_not_know_is_refused() -> None:
    other = NoteSigner("other.example/log", SigningKey.generate())
    note = sign_checkpoint(Checkpoint(other.name, 3, b"r" * 32), other)
    with pytest.raises(NoKnownSignatureError, match=r"other\.example"):
        Policy.parse(THREE_OF_FOUR).open(note, now=100)
