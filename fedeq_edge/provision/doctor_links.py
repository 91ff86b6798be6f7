"""Whether service and broker answer, with certificates of this fleet that are still good."""

import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fedeq_edge.errors import Exit, FedEqError, ProvisionError
from fedeq_edge.provision.findings import DAY_S, Check, Clock, check
from fedeq_edge.transport.mqtt import Endpoint

ANEW: Final = "fedeq fleet gateway --host NAME"
_CERTIFICATE_WARN_S: Final = 30 * DAY_S  # devices renew half a year before the end
_ANSWER_S: Final = 5.0


def service(url: str, authority: Path, settings: Path) -> Check:
    """The fleet's service answers, and is ours. settings: the file that names it."""
    from fedeq_edge.provision import link  # noqa: PLC0415  # only where there is a fleet

    try:
        link.ask(url, link.trusting(authority.read_bytes()), "GET", "/.well-known/est/cacerts")
    except FedEqError as error:
        reason, _, remedy = str(error).partition("; ")
        lost = isinstance(error, ProvisionError) and error.exit is Exit.LOST
        unknown = isinstance(error.__cause__, socket.gaierror)
        mend = "on the host: fedeq fleet serve" if lost else f"correct `service` in {settings}, or: {ANEW}"
        return Check(name="service", saw=reason, verdict="fail", remedy=remedy if unknown else mend)
    return Check(name="service", saw=f"{url} answers, with a certificate of this fleet")


def broker(endpoint: Endpoint) -> Check:
    """It accepts a connection and, with TLS, both sides like each other's certificate."""
    host, port, _ = endpoint.address()
    where = endpoint.shown()
    try:
        with contextlib.ExitStack() as open_:
            link = open_.enter_context(socket.create_connection((host, port), _ANSWER_S))
            context = endpoint.tls_context()
            saw = f"{where} answers"
            if context is not None:
                tls = open_.enter_context(context.wrap_socket(link, server_hostname=host))
                saw += f", {tls.version()}, certificate until {(tls.getpeercert() or {}).get('notAfter')}"
    except ssl.SSLError as error:
        reason = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
        remedy = "compare ca.crt here with the broker's cafile, and its names: fedeq fleet gateway --host NAME"
        return Check(name="broker", saw=f"{where}: {reason}", verdict="fail", remedy=remedy)
    except socket.gaierror as error:
        remedy = "check the name and this machine's DNS (.local names need avahi-daemon and libnss-mdns)"
        return Check(
            name="broker", saw=f"{where}: no address is known ({error.strerror})", verdict="fail", remedy=remedy
        )
    except OSError as error:
        remedy = "sudo systemctl status mosquitto, on the gateway"
        return Check(name="broker", saw=f"{where}: {error.strerror or error}", verdict="fail", remedy=remedy)
    return Check(name="broker", saw=saw)


def certificates(
    paths: Sequence[Path], clock: Clock, remedy: str, early_s: float = _CERTIFICATE_WARN_S
) -> Iterator[Check]:
    """How long they are good. early_s: from when on before its end that is a warning."""
    from cryptography import x509  # noqa: PLC0415  # an extra

    for path in paths:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        left = certificate.not_valid_after_utc.timestamp() - clock()
        saw = f"{path}: until {certificate.not_valid_after_utc:%Y-%m-%d}, {left / DAY_S:.0f} days"
        yield check("certificate", saw, fail=left < 0, warn=left < early_s, remedy=remedy)
