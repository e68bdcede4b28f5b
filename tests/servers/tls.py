"""A certificate authority of the tests' own."""

from __future__ import annotations

import ssl
from pathlib import Path


class Authority:
    """Issues a certificate for 127.0.0.1, localhost and further `names`; `file` is what clients trust (SSL_CERT_FILE, sslrootcert)."""

    def __init__(self, folder: Path, *names: str) -> None:
        import trustme

        self._authority = trustme.CA()
        self._folder = folder
        self.file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.file))
        self.names = ("127.0.0.1", "localhost", *names)
        self.server_context = self.context_for(*self.names)

    def context_for(self, *names: str, ask_clients: bool = False) -> ssl.SSLContext:
        """Return what a server of these names works with; `ask_clients`: it lets in only who shows a certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["postgresql", "http/1.1"])
        self._authority.issue_cert(*names).configure_cert(context)
        if ask_clients:
            context.verify_mode = ssl.CERT_REQUIRED
            self._authority.configure_trust(context)
        return context

    def files_for(self, *names: str, common_name: str | None = None) -> tuple[Path, Path]:
        """Write a certificate with its chain and its key, which nobody else may read, and return both files."""
        issued = self._authority.issue_cert(*names, common_name=common_name)
        certificate, key = self._folder / f"{names[0]}.pem", self._folder / f"{names[0]}.key"
        key.touch(mode=0o600)
        issued.private_key_pem.write_to_path(str(key))
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return certificate, key
