"""audiocraft: the quantisers of its codecs, which are encodec's with more arguments."""

from __future__ import annotations

from fastvq.interop.encodec import clients

CLIENTS = clients("audiocraft", ("a5e032215f522baf",), ("82dc1e7f95c54a22",))
