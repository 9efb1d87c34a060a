"""Proves what happened: Merkle log, notes, checkpoints, ledger, signer, witness and the offline verifier.

Import the modules by name; this package file stays empty so that `audit.verify` loads the standard library
and `cryptography` only. Order of calls on the writing side: `audit.canonical` makes an entry's bytes,
`audit.ledger` sequences them, `audit.signer` signs the tree, `audit.witness` cosigns it. On the reading side:
`audit.tlog_policy` says whom to believe, `audit.checkpoints` opens the signed tree, `audit.merkle` proves
membership and consistency.
"""
