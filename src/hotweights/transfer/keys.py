"""Keys: a directory with the certificates of one job, made and read. Who talks to whom is elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import shlex
import socket
import ssl
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingPackage, UsageError
from ..text import some

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_CA = "ca"  # ca.pem is the authority's certificate, which every host needs; ca.key makes more of them
_HOST = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")
_DAY = datetime.timedelta(days=1)


class Keys:
    """The keys of one job, as one process uses them: it trusts whoever has a certificate of the same directory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Nothing is read yet but what files there are.

        Raises:
            UsageError: there are no keys.
        """
        self.directory = Path(directory)
        check_no_file(self.directory)
        self._hosts = _hosts_in(self.directory)
        if not (self.directory / f"{_CA}.pem").is_file() or not self._hosts:
            raise lacking(self.directory)

    def serving(self, names: Sequence[str]) -> ssl.SSLContext:
        """How to answer whoever connects to a host of one of these names.

        Raises:
            UsageError: as ``connecting``.
        """
        return self._context(ssl.PROTOCOL_TLS_SERVER, names)

    def connecting(self, names: Sequence[str]) -> ssl.SSLContext:
        """How to connect from a host of one of these names.

        Raises:
            UsageError: no certificate is for this host, or the files are broken, or others may read them.
        """
        return self._context(ssl.PROTOCOL_TLS_CLIENT, names)

    def _context(self, protocol: int, names: Sequence[str]) -> ssl.SSLContext:
        path = self.directory / f"{self.pick(names)}.pem"
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            if os.stat(path).st_mode & stat.S_IRWXO:
                raise UsageError(f"everybody can read {path}, a private key: chmod 600 {shlex.quote(str(path))}")
            context.load_cert_chain(path)
            context.load_verify_locations(self.directory / f"{_CA}.pem")
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"the keys in {self.directory} cannot be used: {path.name}: {error}") from error
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # Nobody resumes a session.
        return context

    def pick(self, names: Sequence[str]) -> str:
        """Whose certificate is this process's: the first of these names, this machine's name, or the only one.

        Raises:
            UsageError: none of them has one.
        """
        name = socket.gethostname()
        known = {host.lower(): host for host in self._hosts}  # Addresses are read in lower case.
        for candidate in (*names, name, name.partition(".")[0]):
            if (host := known.get(candidate.lower())) is not None:
                return host
        if len(self._hosts) == 1:
            return self._hosts[0]
        called = [called for called in dict.fromkeys((*names, name)) if not is_any(called)]
        raise UsageError(
            f"no key in {self.directory} is for this host, which is called {' or '.join(called)}; there are keys for "
            f"{some(self._hosts)}. Make one with: {_advice(self.directory, called[0])}"
        )


def check_no_file(directory: Path) -> None:
    """See that it is no file.

    Raises:
        UsageError: it is one.
    """
    if directory.is_file():
        raise UsageError(f"keys= is a directory, and {directory} is a file; give its folder: {directory.parent}")


def lacking(directory: Path) -> UsageError:
    """The error of a directory in which files of a job's keys are not there."""
    path, hosts = directory / f"{_CA}.pem", _hosts_in(directory)
    if hosts and not path.is_file():
        return UsageError(f"{path} is missing, beside keys for {some(hosts)}; copy it from where those were made")
    if path.is_file() and not (directory / f"{_CA}.key").is_file():
        return UsageError(
            f"{directory} has {path.name}, and no host's key; make one for this host where ca.key of the same job is, "
            f"with: hotweights keys DIR --hosts {socket.gethostname()}; and copy its .pem to {directory}"
        )
    return UsageError(
        f"there are no keys in {directory}; make those of the job once, with: {_advice(directory)}; and copy ca.pem "
        "and HOST.pem of those to each other HOST"
    )


def is_any(host: str) -> bool:
    """Whether it stands for all addresses of a host: it can be listened at, and is no name of the host."""
    return host in ("0.0.0.0", "::")


def _hosts_in(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.pem") if path.stem != _CA)


def _advice(directory: Path, host: str = "HOST") -> str:
    return f"hotweights keys {shlex.quote(str(directory))} --hosts {host}"


def make_keys(directory: str | os.PathLike[str], hosts: Iterable[str], *, days: int = 825) -> list[Path]:
    """Make a key and a certificate for each host, and an authority of this job's own if there is none yet.

    ``ca.pem`` and ``HOST.pem`` are what a host needs. ``ca.key`` can make more of them: it stays where it was made.

    Args:
        directory: is made, mode 700. Hosts that it has keys for keep them.
        hosts: names or numeric addresses, as they stand in ``tcps://HOST:PORT``.
        days: how long they are valid. The authority's certificate is valid ten times as long.

    Returns:
        The new files.

    Raises:
        UsageError: a host's name is none, or has a key already; or the authority's key is not here.
        MissingPackage: ``cryptography`` is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in hosts))
    if wrong := [name for name in names if not _is_host(name)]:
        raise UsageError(
            f"these are no names of hosts: {some(wrong)}; name them as in tcps://HOST:PORT, without tcps:// and port, "
            f"an address of IPv6 without brackets; {_CA} is the authority's own name"
        )
    if not names:
        raise UsageError("a key is for a host; name at least one")
    if wild := [name for name in names if is_any(name)]:
        raise UsageError(
            f"{wild[0]} is every address of a host, and nobody connects to it; name what workers write in "
            "tcps://HOST:PORT. A sender at tcps://0.0.0.0:PORT uses the key of this host's name, or the only one"
        )
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingPackage("cryptography", "hosts") from error
    home = Path(directory)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _hosts_in(home) and not (home / f"{_CA}.pem").exists():
        raise lacking(home)
    if taken := [name for name in names if (home / f"{name}.pem").exists()]:
        raise UsageError(f"{home} has keys for {some(taken)}; remove those files first, or name other hosts")
    authority, new = _authority(home, days)
    return new + [_make_host(home, name, authority, days) for name in names]


def _is_host(name: str) -> bool:
    """Whether it can stand in an address, and be a file's name beside the authority's."""
    if ":" in name:
        with contextlib.suppress(ValueError):
            return bool(ipaddress.IPv6Address(name))
        return False
    return name.lower() != _CA and _HOST.fullmatch(name) is not None


_Authority = tuple["x509.Certificate", "ec.EllipticCurvePrivateKey"]


def _authority(home: Path, days: int) -> tuple[_Authority, list[Path]]:
    """The authority of a directory, and which files were made for it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    certificate_path, key_path = home / f"{_CA}.pem", home / f"{_CA}.key"
    if certificate_path.exists():
        try:
            key = serialization.load_pem_private_key(key_path.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"{key_path} is needed to make more keys; it stays where it was made: {error}") from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return (certificate, key), []
    key = ec.generate_private_key(ec.SECP256R1())
    name = f"hotweights {os.urandom(4).hex()}"  # Two jobs' authorities are told apart by their names, too.
    builder = _builder(name, name, key, 10 * days).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    certificate = _signed(builder, key, key, authority=True)
    _write(key_path, _pem(key))
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
    return (certificate, key), [key_path, certificate_path]


def _make_host(home: Path, host: str, authority: _Authority, days: int) -> Path:
    """Make the key and certificate of one host, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    certificate, authority_key = authority
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = (
        _builder(host, str(issuer), key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(x509.SubjectAlternativeName([_general_name(host)]), False)
        .add_extension(usages, False)
    )
    path = home / f"{host}.pem"
    signed = _signed(builder, key, authority_key, authority=False)
    _write(path, _pem(key) + signed.public_bytes(serialization.Encoding.PEM))
    return path


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject[:64])]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)  # Clocks of hosts differ.
        .not_valid_after(now + days * _DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


def _signed(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    by: ec.EllipticCurvePrivateKey,
    *,
    authority: bool,
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    usage = x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
    return builder.add_extension(usage, True).add_extension(issued_by, False).sign(by, hashes.SHA256())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    encoding, layout = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem: bytes = key.private_bytes(encoding, layout, serialization.NoEncryption())
    return pem


def _write(path: Path, content: bytes) -> None:
    """Write a new file that only this user reads."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
