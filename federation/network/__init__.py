"""What both ends of the network agree on: certificates, invitations, the roster of sites, supervised
processes.

`pki` makes keys and certificates, `invitation` the line that a site is given, `roster` reads from the log
who belongs, `membership` writes it, `supervisor` keeps processes alive, `bundle` and `submit` bring a run to
Flower's SuperLink. The gateway is `server.network`, the site's end `clients.network`.
"""
