"""The same server over many engines, on Ray Serve (extra `ray`).

    client → Front → Ray (PrefixRouter) → Replica: an engine and its HTTP application

`Front` reads a request, Ray brings it to a replica, and the bytes of the answer come back as that
replica's application writes them.
"""
