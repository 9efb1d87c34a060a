"""Holds the data: the site's agent and ledger, its privacy mechanism, and the thin relay that speaks Flower.

Trusted and beside the rows: `clients.agent` with `clients.ledger`, `clients.loader` and `clients.dp`.
Untrusted and beside the network: `clients.client_app`, which carries bytes through `clients.link` and can
read none of them. This file imports nothing, so that the relay never loads what the agent needs.
"""
