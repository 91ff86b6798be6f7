"""What a device says and asks for: actions in order, until its shell takes them."""

from dataclasses import dataclass, field

from fedeq_edge.protocol.actions import ClientAction, Note, Publish
from fedeq_edge.wire import messages


@dataclass(slots=True)
class DeviceOutlet:
    """Actions of one client. topic: where its aggregator listens.

    moved_at: when something that is waited for was asked for last, or came nearer.
    """

    topic: str
    moved_at: float = 0.0
    _actions: list[ClientAction] = field(default_factory=list)

    def send(self, message: messages.Message, body: bytes = b"") -> None:
        """This message, to the aggregator."""
        self.append(Publish(topic=self.topic, payload=messages.encode(message, body)))

    def note(self, event: str, **facts: object) -> None:
        """A line in the log."""
        self.append(Note(event=event, facts=facts))

    def append(self, action: ClientAction) -> None:
        """One more."""
        self._actions.append(action)

    def flush(self) -> list[ClientAction]:
        """All that came since the last flush, in order."""
        actions, self._actions = self._actions, []
        return actions
