"""The server's side of a masked sum, sans-IO and without randomness: the same messages in the same order, same bits.

Until the survivors are told a sum may be begun again, under another session: nobody has revealed anything. From there
on there must be no other sum of the same vectors, since two sums over different devices tell their difference. So
that is what outlives a restart: `snapshot`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge import structs
from fedeq_edge.errors import ContributionError, MaskingError, RemoteWireError, StateError
from fedeq_edge.masking import keys as session_keys
from fedeq_edge.masking import messages, shamir
from fedeq_edge.masking.group import Group
from fedeq_edge.masking.keys import Pair, self_mask_key
from fedeq_edge.masking.masks import add_masks, centred, unpack
from fedeq_edge.masking.messages import Delivery, Keys, Masked, Member, Reveal, Roster, Shares, Survivors
from fedeq_edge.masking.terms import MEMBERS_MOST, Terms

Phase = Literal["keys", "shares", "masked", "reveal"]
_COMMITMENTS_BYTES: Final = 2 * messages.COMMITMENT_BYTES  # of a dealer to a holder, one for each secret


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedSum:
    """The result. total: (p,) of int64, the exact sum of the contributors' vectors, which are in roster order.

    wrong: (holder, dealer) of every revealed share that was not the one its dealer committed to.
    """

    total: NDArray[np.int64]
    contributors: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...]


class _Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """terms: as they were given. commitments: of each member that shared its secrets. survivors: numbers."""

    session: bytes
    length: int
    bound: int
    bits: int | None
    threshold: float
    roster: bytes
    commitments: dict[int, bytes]
    survivors: set[int]
    total: NDArray[np.int64]


class MaskingServer:
    """One session. Messages are added as they come, and the caller closes each step when it has waited enough.

    The device of a message is the one that the broker authorised for its topic. What a device gets wrong is refused by
    ContributionError and changes nothing; fewer answers than the quorum raise MaskingError when a step is closed, and
    the session is over. Memory: one sum, O(p), and about 100 bytes for every pair of members.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._phase: Phase = "keys"
        self._keys: dict[str, Keys] = {}
        self._group: Group | None = None
        self._numbers: dict[str, int] = {}
        self._boxes: dict[int, bytes] = {}
        self._commitments: dict[int, bytes] = {}
        self._sum = np.zeros(terms.length, np.uint64)
        self._contributors: set[int] = set()
        self._reveals: dict[int, bytes] = {}
        self._holders: dict[int, list[int]] = {}  # dealer -> who revealed a sound share of it, a quorum at most
        self._wrong: list[tuple[str, str]] = []

    @property
    def phase(self) -> Phase:
        """What it takes now."""
        return self._phase

    @property
    def answered(self) -> set[str]:
        """The devices whose message of this step is here."""
        if self._phase == "keys":
            return set(self._keys)
        held = {"shares": self._commitments, "masked": self._contributors, "reveal": self._reveals}[self._phase]
        return {device for device, number in self._numbers.items() if number in held}

    def keys_of(self, device: str) -> Keys | None:
        """The keys that count of this device, None where it is not in the session."""
        return self._keys.get(device)

    # ---- step 1: keys --------------------------------------------------------------------------------------

    def add_keys(self, device: str, keys: Keys) -> None:
        """These are the keys of `device`, in place of earlier ones: an agent that restarted has new ones.

        Refusals: "out_of_turn", "bad_key", "full".
        """
        self._expect("keys", device)
        if len(self._keys) == MEMBERS_MOST and device not in self._keys:
            raise ContributionError("full", f"device {device}: a masked sum takes at most {MEMBERS_MOST} devices")
        others = {key for name, other in self._keys.items() if name != device for key in (other.mask, other.seal)}
        if keys.mask == keys.seal or {keys.mask, keys.seal} & others:
            raise ContributionError("bad_key", f"device {device}: a key for a masked sum is in use already")
        try:
            session_keys.check(keys.mask)
            session_keys.check(keys.seal)
        except RemoteWireError as error:
            raise ContributionError("bad_key", f"device {device}: {error}") from error
        self._keys[device] = keys

    def close_keys(self) -> Roster:
        """The roster, for every device in it. Raises MaskingError below 3 devices."""
        self._closing("keys")
        self._require(len(self._keys), self._terms.quorum(0), "sent keys")
        members = tuple(Member(device=device, keys=keys) for device, keys in sorted(self._keys.items()))
        roster = Roster(members=members)
        self._begin(roster)
        return roster

    # ---- step 2: shares ------------------------------------------------------------------------------------

    def add_shares(self, device: str, shares: Shares) -> None:
        """`device` has shared its secrets. Refusals: "out_of_turn", "not_in_session", "duplicate", "wrong_size"."""
        self._expect("shares", device)
        group, number = self._member(device, self._boxes)
        _check_slots(device, shares.boxes, messages.BOX_BYTES, group.size)
        _check_slots(device, shares.commitments, _COMMITMENTS_BYTES, group.size)
        self._boxes[number], self._commitments[number] = shares.boxes, shares.commitments

    def close_shares(self) -> dict[str, Delivery]:
        """What each device that sent shares gets; the others have dropped out. Raises MaskingError."""
        self._closing("shares")
        group = self._grouped()
        senders = set(self._commitments)
        self._require(len(senders), group.quorum, "shared their secrets")
        bitmap = messages.bitmap(senders, group.size)
        deliveries = {
            device: Delivery(senders=bitmap, boxes=self._boxes_for(number, group.size))
            for device, number in self._numbers.items()
            if number in senders
        }
        self._boxes.clear()  # 48 n^2 bytes that nobody needs again
        self._phase = "masked"
        return deliveries

    # ---- step 3: masked vectors ----------------------------------------------------------------------------

    def add_masked(self, device: str, masked: Masked) -> None:
        """The vector of `device` is in the sum. Refusals: as for shares, and of devices that shared none."""
        self._expect("masked", device)
        group, number = self._member(device, self._contributors)
        if number not in self._commitments:
            raise ContributionError("not_in_session", f"device {device}: shared no secrets in this masked sum")
        expected = self._terms.vector_bytes(group.size)
        if len(masked.vector) != expected:
            raise ContributionError(
                "wrong_size", f"device {device}: masked vector has {len(masked.vector)} bytes, expected {expected}"
            )
        self._sum += unpack(masked.vector, self._terms.length, group.bits)
        self._contributors.add(number)

    def close_masked(self) -> Survivors:
        """Who is in the sum, for those who are; a vector that comes later can no longer be. Raises MaskingError."""
        self._closing("masked")
        group = self._grouped()
        self._require(len(self._contributors), group.quorum, "sent a masked vector")
        self._await_reveals()
        return self.survivors

    @property
    def survivors(self) -> Survivors:
        """Who is in the sum, by number; of a session whose survivors are known."""
        return Survivors(survivors=messages.bitmap(self._contributors, self._grouped().size))

    def snapshot(self) -> bytes:
        """The session, as `restore` takes it, for our own disk. Once the survivors are known, and without reveals."""
        self._closing("reveal")
        terms = self._terms
        return structs.pack(
            _Snapshot(
                session=terms.session,
                length=terms.length,
                bound=terms.bound,
                bits=terms.bits,
                threshold=terms.threshold,
                roster=messages.encode(self._grouped().roster),
                commitments=self._commitments,
                survivors=self._contributors,
                total=self._sum.view(np.int64),
            )
        )

    @classmethod
    def restore(cls, snapshot: bytes) -> "MaskingServer":
        """A session that waits for all its reveals. Raises StateError where `snapshot` is none."""
        try:
            saved = structs.unpack(snapshot, _Snapshot)
            roster = messages.decode(saved.roster, Roster)
        except (msgspec.ValidationError, ValueError, RemoteWireError) as error:
            raise StateError(f"snapshot of a masked sum is damaged ({error})") from error
        terms = Terms(
            session=saved.session,
            length=saved.length,
            bound=saved.bound,
            bits=saved.bits,
            threshold=saved.threshold,
        )
        server = cls(terms)
        server._begin(roster)
        server._commitments, server._contributors = saved.commitments, saved.survivors
        server._sum = saved.total.view(np.uint64)
        server._await_reveals()
        return server

    # ---- step 4: unmasking ---------------------------------------------------------------------------------

    def add_reveal(self, device: str, reveal: Reveal) -> None:
        """The shares that `device` held are known; those that their dealer did not commit to are left out, and named.

        Refusals: as for shares, and of devices that are not in the sum.
        """
        self._expect("reveal", device)
        group, holder = self._member(device, self._reveals)
        if holder not in self._contributors:
            raise ContributionError("not_in_session", f"device {device}: is not in this masked sum")
        _check_slots(device, reveal.shares, shamir.ELEMENT_BYTES, group.size)
        self._reveals[holder] = reveal.shares
        for dealer, holders in self._holders.items():
            if not self._sound(group, dealer, holder):
                self._wrong.append((device, group.roster.members[dealer].device))
            elif len(holders) < group.quorum:
                holders.append(holder)

    @property
    def complete(self) -> bool:
        """Whether the shares of every secret reach the quorum, so that `unmask` will do."""
        if self._phase != "reveal":
            return False
        return all(len(holders) == self._grouped().quorum for holders in self._holders.values())

    @property
    def unsound(self) -> tuple[str, ...]:
        """Members of whose shares too few fit, though a quorum has revealed: what they dealt was nonsense."""
        group = self._grouped()
        if self._phase != "reveal" or len(self._reveals) < group.quorum:
            return ()
        missing = len(self._contributors) - len(self._reveals)
        dealers = (dealer for dealer, holders in self._holders.items() if len(holders) + missing < group.quorum)
        return tuple(group.roster.members[dealer].device for dealer in sorted(dealers))

    def unmask(self) -> MaskedSum:
        """The sum of the contributors' vectors, bit for bit. Raises MaskingError where shares are missing."""
        self._closing("reveal")
        group = self._grouped()
        self._require(min(map(len, self._holders.values())), group.quorum, "revealed sound shares")
        secrets = self._secrets()
        added, subtracted = self._leftovers(group, secrets)
        total = self._sum.copy()
        add_masks(total, added=added, subtracted=subtracted)
        members = group.roster.members
        return MaskedSum(
            total=centred(total, group.bits),
            contributors=tuple(members[number].device for number in sorted(self._contributors)),
            wrong=tuple(self._wrong),
        )

    # ---- within --------------------------------------------------------------------------------------------

    def _begin(self, roster: Roster) -> None:
        self._keys = {member.device: member.keys for member in roster.members}
        self._group = Group.of(roster, self._terms)
        self._numbers = {member.device: number for number, member in enumerate(roster.members)}
        self._phase = "shares"

    def _await_reveals(self) -> None:
        self._holders = {dealer: [] for dealer in self._commitments}
        self._phase = "reveal"

    def _secrets(self) -> dict[int, int]:
        """Dealer -> self-mask secret of a contributor, pairwise secret of one that dropped out."""
        weights: dict[tuple[int, ...], list[int]] = {}
        secrets: dict[int, int] = {}
        for dealer, holders in self._holders.items():
            points = tuple(holder + 1 for holder in holders)
            if points not in weights:  # one and the same set of holders, unless somebody revealed wrong shares
                weights[points] = shamir.weights(points)
            shares = [int.from_bytes(self._share(dealer, holder), "little") for holder in holders]
            secrets[dealer] = shamir.combine(weights[points], shares)
        return secrets

    def _leftovers(self, group: Group, secrets: dict[int, int]) -> tuple[list[bytes], list[bytes]]:
        """Keys of the masks to add and to subtract: self masks, and pairwise masks whose other end dropped out."""
        added: list[bytes] = []
        subtracted = [self_mask_key(secrets[number], self._terms.session) for number in sorted(self._contributors)]
        for dropped in sorted(secrets.keys() - self._contributors):
            pair = self._recovered(group, dropped, secrets[dropped])
            for number in sorted(self._contributors):
                key = pair.mask_key(group.keys(number).mask, self._terms.session)
                (subtracted if number < dropped else added).append(key)
        return added, subtracted

    def _recovered(self, group: Group, dropped: int, secret: int) -> Pair:
        pair = Pair.of_seed(secret, self._terms.session)
        if pair.public != group.keys(dropped).mask:
            device = group.roster.members[dropped].device
            raise MaskingError(
                f"masked sum: the shares of {device} do not give its key, so its masks cannot be taken out; "
                "begin a new session without it",
                (device,),
            )
        return pair

    def _share(self, dealer: int, holder: int) -> bytes:
        return messages.slot(self._reveals[holder], shamir.ELEMENT_BYTES, dealer)

    def _sound(self, group: Group, dealer: int, holder: int) -> bool:
        """Whether the revealed share is the one its dealer committed to, of the secret that is asked for."""
        both = messages.slot(self._commitments[dealer], _COMMITMENTS_BYTES, holder)
        to_key, to_self = both[: messages.COMMITMENT_BYTES], both[messages.COMMITMENT_BYTES :]
        share = self._share(dealer, holder)
        if dealer in self._contributors:
            return group.commitment(share, b"self", dealer, holder) == to_self
        return group.commitment(share, b"key", dealer, holder) == to_key

    def _boxes_for(self, receiver: int, members: int) -> bytes:
        nothing = bytes(messages.BOX_BYTES * members)
        boxes = (self._boxes.get(dealer, nothing) for dealer in range(members))
        return b"".join(messages.slot(box, messages.BOX_BYTES, receiver) for box in boxes)

    def _grouped(self) -> Group:
        if self._group is None:
            raise MaskingError("masked sum: the roster is not closed yet")
        return self._group

    def _expect(self, phase: Phase, device: str) -> None:
        if self._phase != phase:
            raise ContributionError(
                "out_of_turn", f"device {device}: this masked sum takes {self._phase} now, not {phase}"
            )

    def _closing(self, phase: Phase) -> None:
        if self._phase != phase:
            raise MaskingError(f"masked sum: asked to close the step {phase!r} while {self._phase!r} is open")

    def _member(self, device: str, seen: Iterable[int]) -> tuple[Group, int]:
        number = self._numbers.get(device)
        if number is None:
            raise ContributionError("not_in_session", f"device {device}: is not on the roster of this masked sum")
        if number in seen:
            raise ContributionError("duplicate", f"device {device}: this step has its message already")
        return self._grouped(), number

    def _require(self, answers: int, quorum: int, what: str) -> None:
        if answers < quorum:
            raise MaskingError(
                f"masked sum: {answers} devices {what}, {quorum} are needed; nothing was unmasked, begin a new session"
            )


def _check_slots(device: str, content: bytes, size: int, members: int) -> None:
    try:
        messages.check_slots(content, size, members, "shares")
    except RemoteWireError as error:
        raise ContributionError("wrong_size", f"device {device}: {error}") from error
