from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from tuft.app import _listen
from tuft.config import load_config


async def test_answers_are_sent_at_once(tmp_path: Path) -> None:
    with _listen(load_config(home=tmp_path, **{"server.port": 0})) as listener:
        accepted: asyncio.Future[asyncio.BaseTransport] = asyncio.get_running_loop().create_future()

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                accepted.set_result(transport)

        server = await asyncio.get_running_loop().create_server(Connection, sock=listener)
        with socket.create_connection(listener.getsockname()):
            transport = await accepted
            assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            transport.close()
            server.close()
            await server.wait_closed()
