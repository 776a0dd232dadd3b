"""The same server over many engines, on Ray Serve (extra `ray`).

    client → Front → Ray (FleetRouter) → Replica: an engine and its HTTP application
           ←          bytes             ←

`Front` reads a request, Ray brings it to a replica, and the bytes of the answer come back over a
connection of their own, as that replica's application writes them."""
