"""The site's end of the network: joining, the supervised processes, leaving. No inbound port is opened."""
