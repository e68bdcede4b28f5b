"""A certificate authority of the tests' own."""

from __future__ import annotations

import ssl
from pathlib import Path


class Authority:
    """Issues a certificate for 127.0.0.1, localhost and further `names`; `file` is what clients trust (SSL_CERT_FILE)."""

    def __init__(self, folder: Path, *names: str) -> None:
        import trustme

        authority = trustme.CA()
        self.file = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.file))
        self.server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued = authority.issue_cert("127.0.0.1", "localhost", *names)
        issued.configure_cert(self.server_context)
        self.key_file = folder / "server.pem"
        """The private key with the certificates, for servers in processes of their own."""
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.key_file))
