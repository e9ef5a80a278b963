"""The server's process: uvicorn with the engine's thread beside it, and an orderly end."""

import asyncio
import socket

import uvicorn

from psysafe.cli import say
from psysafe.data.tokenizer import Tokenizer
from psysafe.serve.app import App, Policy
from psysafe.serve.page import Page
from psysafe.serve.protocol import Served
from psysafe.serve.settings import Settings, host_names
from psysafe.serve.worker import Worker

LATE_S = 5  # after the grace: for the errors that end what is left


def serve(
    served: Served, tokenizer: Tokenizer, worker: Worker, settings: Settings, listener: socket.socket, key: str
) -> None:
    """Answers requests until a signal comes. listener: bound, and not yet listening."""
    limits = settings.limits
    hosts = host_names(settings.host, listener)
    policy = Policy(hosts, key, limits.max_body, limits.request_timeout, settings.origins)
    server = Server(App(served, tokenizer, worker, policy, Page(settings.services)), limits.grace)
    asyncio.run(server.serve(sockets=[listener]))


class Server(uvicorn.Server):
    """uvicorn with the engine's thread, and an end in which answers that are on their way are finished first."""

    def __init__(self, app: App, grace_s: float):
        # Its own log is off: it would hold addresses and paths. "h11" and "asyncio" need no further package.
        config = uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None, log_level="critical",
            access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=grace_s + LATE_S,
        )  # fmt: skip
        super().__init__(config)
        self.worker, self.models, self.grace_s = app.worker, list(app.served.models), grace_s

    # uvicorn calls these two.

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.start(asyncio.get_running_loop())
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        say(f"serving {', '.join(self.models)}: clients at {url}/v1, the page at {url}/")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.drain()
        say(f"stopping; answers on their way have {self.grace_s:g} s")
        abort_timer = asyncio.get_running_loop().call_later(self.grace_s, self.worker.abort)
        await super().shutdown(sockets)
        abort_timer.cancel()
        self.worker.stop()
