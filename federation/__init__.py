"""Decides what happens: the charter, the data contract, models, rounds, accounting, the registry and its
gates.

Nothing here sees a row of a site's data. Start with `federation.charter.Charter.load`, then
`federation.service`.
"""
