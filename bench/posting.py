"""A request over HTTP on a connection of its own, whose answer is read as bytes.

For clients of many streams: what httpx does for each event takes more than a server does for it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

LIMIT = 2**16  # bytes that are taken before they are read


@asynccontextmanager
async def posted(
    url: str, path: str, body: bytes, limit: int = LIMIT
) -> AsyncIterator[asyncio.StreamReader]:
    """The answer, head and all, up to its end. Leaving before it closes the connection."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=limit)
    head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        yield reader
    finally:
        writer.close()
