"""A device's side of a masked round: its part in one sum, from its keys to what it reveals (masking/)."""

from typing import Final

import msgspec
import numpy as np

from fedeq_edge.consensus.fixed import dual_step, fraction_bits, largest
from fedeq_edge.errors import ConfigError, LocalWireError, MaskingError, RemoteWireError
from fedeq_edge.masking import Delivery, MaskingDevice, Roster, Survivors, Terms, decode, encode
from fedeq_edge.protocol.state import Pending
from fedeq_edge.wire import coding, messages

Answer = tuple[messages.MaskingStep, bytes]
_BITS: Final = fraction_bits(np.float32)


class Part:
    """What one device does in one masked sum. The secrets live and die with the object: a restarted device is out."""

    def __init__(self, device: str, round_number: int, terms: messages.MaskingTerms) -> None:
        self.round = round_number
        self.session = terms.session
        self._terms = terms
        self._delivery: Delivery | None = None
        self._shared = self._masked = False
        self._masking = MaskingDevice(
            device,
            Terms(session=terms.session, length=terms.length, bound=terms.bound, threshold=terms.threshold),
        )

    def keys(self) -> Answer:
        """Our public keys, with which a sum begins."""
        return messages.MaskingStep(session=self.session, step="keys"), encode(self._masking.keys())

    def hear(self, step: messages.MaskingStep, body: memoryview) -> Answer | None:
        """Our answer to a step, None where it needs none. Raises RemoteWireError where it breaks a rule of the sum."""
        try:
            if step.step == "roster":
                shares = self._masking.share(decode(body, Roster))
                self._shared = True
                return messages.MaskingStep(session=self.session, step="shares"), encode(shares)
            if step.step == "survivors":
                reveal = self._masking.reveal(decode(body, Survivors))
                return messages.MaskingStep(session=self.session, step="reveal"), encode(reveal)
            if step.step == "delivery" and self._shared and self._delivery is None:
                self._delivery = decode(body, Delivery)
        except (ConfigError, MaskingError) as error:
            raise RemoteWireError(f"{step.step} of a masked sum: {error}") from error
        return None

    @property
    def ready(self) -> bool:
        """Whether a contribution may be masked now; once in a session."""
        return self._delivery is not None and not self._masked

    def mask(self, pending: Pending) -> bytes:
        """The contribution as it travels: a blob that tells nothing by itself. Only when `ready`.

        Raises LocalWireError where a parameter has moved further than the sum has room for, RemoteWireError for a
        delivery that names too few devices, and ContributionError for a step beyond all limits.
        """
        if self._delivery is None:
            raise MaskingError("asked to mask before the shares were delivered")
        self._masked = True
        received = messages.decode(pending.blob)
        message = messages.contribution(received)
        difference = coding.decode(message.codec, received.body, message.length)
        step = dual_step(difference, pending.kappa, _BITS)
        if largest(step) > min(self._terms.limit, self._terms.bound // self._terms.omega):
            raise LocalWireError(
                f"a parameter moved by {np.abs(difference).max():.3g}, and masked rounds take less; "
                "raise masking.limit on the aggregator, or train with a smaller learning rate"
            )
        masked = self._masking.mask(self._delivery, self._terms.omega * step)
        return messages.encode(msgspec.structs.replace(message, session=self.session), masked.vector)
