"""Local servers that speak the protocols of outside services over a real socket, with their failures.

`python -m tests.servers openai --port 8901 --latency 0.2` runs one by itself; in a test, `with OpenAIServer() as server:`.
"""

from tests.servers.blackhole import blackhole
from tests.servers.faults import Fault, Script
from tests.servers.http import LocalServer, Request, Response
from tests.servers.llamaparse import LlamaParseServer
from tests.servers.openai import OpenAIServer
from tests.servers.proxy import PostgresTls, TunnelProxy
from tests.servers.tally import Tally
from tests.servers.tls import Authority

__all__ = [
    "Authority",
    "Fault",
    "LlamaParseServer",
    "LocalServer",
    "OpenAIServer",
    "PostgresTls",
    "Request",
    "Response",
    "Script",
    "Tally",
    "TunnelProxy",
    "blackhole",
]
