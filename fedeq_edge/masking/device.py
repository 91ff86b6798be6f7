"""A device's side of a masked sum, sans-IO: messages in, messages out; the secrets live and die with the object."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import LocalWireError, MaskingError, RemoteWireError
from fedeq_edge.masking import messages, shamir
from fedeq_edge.masking.group import Group
from fedeq_edge.masking.identity import Identity, statement
from fedeq_edge.masking.keys import Pair, self_mask_key
from fedeq_edge.masking.masks import add_masks, pack
from fedeq_edge.masking.messages import Delivery, Keys, Masked, Message, Reveal, Roster, Shares, Survivors
from fedeq_edge.masking.terms import Terms

M = TypeVar("M", bound=Message)
_NO_SHARE: Final = bytes(shamir.ELEMENT_BYTES)
_NO_BOX: Final = bytes(messages.BOX_BYTES)


@dataclass(frozen=True, slots=True)
class _Held:
    """The shares of one member's secrets that this device holds."""

    key: bytes
    self_mask: bytes


class MaskingDevice:
    """One device in one session; call `keys`, `share`, `mask`, `reveal` in this order, each when its message comes.

    identity: signs our keys and checks those of the others; None trusts the server to hand out the right ones.
    A message that comes again gets the same answer, another one in its place is refused (RemoteWireError), a call out
    of order raises MaskingError. Nothing is ever stored: a device that restarts has dropped out of its session.
    """

    def __init__(self, device: str, terms: Terms, identity: Identity | None = None) -> None:
        self._device = device
        self._terms = terms
        self._identity = identity
        self._key_seed = shamir.draw()
        self._self_seed = shamir.draw()
        self._mask_pair = Pair.of_seed(self._key_seed, terms.session)
        self._seal_pair = Pair.drawn()
        self._keys = self._signed(Keys(mask=self._mask_pair.public, seal=self._seal_pair.public))
        self._group: Group | None = None
        self._number = -1
        self._held: dict[int, _Held] = {}
        self._senders: set[int] = set()
        self._answered: dict[type[Message], tuple[Message, Message]] = {}

    def keys(self) -> Keys:
        """Our public keys."""
        return self._keys

    def share(self, roster: Roster) -> Shares:
        """Our two secrets, shared among the roster: from here on a quorum of it can finish the sum without us.

        Raises RemoteWireError for a roster without our keys, with a name or key twice, or with a proof that fails,
        ConfigError for more members than a sum under the terms can have.
        """
        return self._once(roster, self._share)

    def mask(self, delivery: Delivery, vector: NDArray[np.int64]) -> Masked:
        """`vector`, (p,) of int64, under our masks: to the server it is uniform noise until a quorum reveals.

        Once a session, whatever comes: two vectors under the same masks would tell their difference; to send again,
        send what was returned. Raises LocalWireError for a vector that breaks the terms, RemoteWireError for a
        delivery that names fewer senders than the quorum or leaves us out.
        """
        group = self._grouped("mask")
        if self._senders:
            raise MaskingError(f"device {self._device}: a vector was masked in this session; send that one again")
        self._check_vector(vector)
        senders = self._quorate(group, delivery.senders, "delivery")
        messages.check_slots(delivery.boxes, messages.BOX_BYTES, group.size, "sealed shares")
        for dealer in senders - {self._number}:
            self._open(group, dealer, messages.slot(delivery.boxes, messages.BOX_BYTES, dealer))
        words = vector.astype(np.uint64)  # modulo 2^64
        self._add_masks(group, senders, words)
        self._senders = senders
        return Masked(vector=pack(words, group.bits))

    def reveal(self, survivors: Survivors) -> Reveal:
        """For every sender one share and never the other: with both, its vector could be unmasked alone.

        Raises RemoteWireError for fewer survivors than the quorum, one that sent no shares, or a list without us.
        """
        return self._once(survivors, self._reveal)

    # ---- the steps -----------------------------------------------------------------------------------------

    def _share(self, roster: Roster) -> Shares:
        group = Group.of(roster, self._terms)
        number = self._find_myself(roster)
        self._check_proofs(roster)
        points = range(1, group.size + 1)
        key_shares = shamir.split(self._key_seed, points, group.quorum)
        self_shares = shamir.split(self._self_seed, points, group.quorum)
        dealt = [
            _Held(shamir.to_bytes(key), shamir.to_bytes(self_mask))
            for key, self_mask in zip(key_shares, self_shares, strict=True)
        ]
        answer = Shares(
            boxes=b"".join(self._sealed(group, number, holder, held) for holder, held in enumerate(dealt)),
            commitments=b"".join(_commitments(group, number, holder, held) for holder, held in enumerate(dealt)),
        )
        self._group, self._number, self._held = group, number, {number: dealt[number]}
        return answer

    def _sealed(self, group: Group, number: int, holder: int, held: _Held) -> bytes:
        if holder == number:
            return _NO_BOX
        content = held.key + held.self_mask
        return self._seal_pair.seal(content, group.keys(holder).seal, self._terms.session, group.context)

    def _open(self, group: Group, dealer: int, box: bytes) -> None:
        """A box that does not open costs its dealer a holder and the sum nothing, while a quorum of others opens."""
        content = self._seal_pair.open(box, group.keys(dealer).seal, self._terms.session, group.context)
        if content is not None:
            self._held[dealer] = _Held(content[: shamir.ELEMENT_BYTES], content[shamir.ELEMENT_BYTES :])

    def _add_masks(self, group: Group, senders: set[int], words: NDArray[np.uint64]) -> None:
        """The lower number of a pair adds their mask and the higher subtracts it, so the pair cancels in the sum."""
        added = [self_mask_key(self._self_seed, self._terms.session)]
        subtracted: list[bytes] = []
        for peer in sorted(senders - {self._number}):
            key = self._mask_pair.mask_key(group.keys(peer).mask, self._terms.session)
            (added if self._number < peer else subtracted).append(key)
        add_masks(words, added=added, subtracted=subtracted)

    def _reveal(self, message: Survivors) -> Reveal:
        group = self._grouped("reveal")
        if not self._senders:
            raise MaskingError(f"device {self._device}: asked to reveal before it masked a vector")
        survivors = self._quorate(group, message.survivors, "list of survivors")
        if not survivors <= self._senders:
            raise RemoteWireError("list of survivors of a masked sum names a device that shared no secrets")
        shares = [_NO_SHARE] * group.size
        for dealer in self._senders & self._held.keys():
            held = self._held[dealer]
            shares[dealer] = held.self_mask if dealer in survivors else held.key
        return Reveal(shares=b"".join(shares))

    # ---- checks --------------------------------------------------------------------------------------------

    def _once(self, message: Message, answer: Callable[..., M]) -> M:
        """The answer to the first message of its kind, for that message alone."""
        kind = type(message)
        if kind not in self._answered:
            self._answered[kind] = (message, answer(message))
        asked, answered = self._answered[kind]
        if asked != message:
            raise RemoteWireError(f"a second, different {kind.__name__.lower()} message in one masked sum")
        return answered  # type: ignore[return-value]  # of the kind that `answer` made

    def _grouped(self, call: str) -> Group:
        if self._group is None:
            raise MaskingError(f"device {self._device}: asked to {call} before it had a roster")
        return self._group

    def _quorate(self, group: Group, bitmap: bytes, what: str) -> set[int]:
        members = messages.numbers(bitmap, group.size)
        if len(members) < group.quorum or self._number not in members:
            raise RemoteWireError(
                f"{what} of a masked sum names {len(members)} devices, {group.quorum} are needed and "
                f"{self._device} among them"
            )
        return members

    def _find_myself(self, roster: Roster) -> int:
        for number, member in enumerate(roster.members):
            if member.device == self._device and member.keys == self._keys:
                return number
        raise RemoteWireError(f"roster of a masked sum does not hold the keys of {self._device}")

    def _check_vector(self, vector: NDArray[np.int64]) -> None:
        terms = self._terms
        if vector.dtype != np.int64 or vector.shape != (terms.length,):
            raise LocalWireError(f"vector to mask is {vector.dtype}{vector.shape}, agreed is int64({terms.length},)")
        if vector.max() > terms.bound or vector.min() < -terms.bound:
            raise LocalWireError(f"vector to mask holds values beyond the agreed bound of {terms.bound}; clip it first")

    def _signed(self, keys: Keys) -> Keys:
        if self._identity is None:
            return keys
        proof = self._identity.prove(statement(self._terms.session, self._device, keys))
        return Keys(mask=keys.mask, seal=keys.seal, proof=proof)

    def _check_proofs(self, roster: Roster) -> None:
        if self._identity is None:
            return
        for member in roster.members:
            claim = statement(self._terms.session, member.device, member.keys)
            if not self._identity.accepts(member.device, claim, member.keys.proof):
                raise RemoteWireError(f"keys of {member.device} in a masked sum are not signed by its certificate")


def _commitments(group: Group, dealer: int, holder: int, held: _Held) -> bytes:
    to_key = group.commitment(held.key, b"key", dealer, holder)
    return to_key + group.commitment(held.self_mask, b"self", dealer, holder)
