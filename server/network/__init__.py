"""The coordinator's end of the network: the gateway, and what `affidavit coordinator up` starts."""
