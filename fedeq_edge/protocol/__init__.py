"""Sans-IO state machines of a federation: events in, actions out, time is an argument."""
